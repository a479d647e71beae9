"""A model whose every operation is a Triton kernel gives the reference's loss and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megalm.kernels.attention import triton_launch
from megalm.kernels.attention.triton_launch import Blocks, Cut
from megalm.kernels.linear.torch_native import TorchLinear
from megalm.models.gpt.build import build_model, choose_kernels, plan_gpt
from tests.support import triton_device as support
from tests.unit.models import small

pytestmark = pytest.mark.skipif(not support.INSTALLED, reason=support.ABSENT)

TINY = Cut(Blocks(32, 16, 4, 1), Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1))
# One rounding to bf16 is 2^-9 of a value; it passes through two blocks, the head and back.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-5}


@pytest.mark.parametrize("dtype, compiled", [(torch.float32, False), (torch.bfloat16, True)])
def test_loss_and_gradients_are_the_reference_s(
    dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megalm.kernels.attention.triton_flash import TritonAttention
    from megalm.kernels.bias_gelu.triton_activation import bias_gelu
    from megalm.kernels.cross_entropy.triton_rows import TritonRows
    from megalm.kernels.dropout_add.triton_dropout import bias_dropout_add
    from megalm.kernels.layer_norm.triton_norm import add_layer_norm, layer_norm, layer_norm_and_pass

    monkeypatch.setattr(triton_launch, "cut_for", lambda *_, **__: TINY)
    config = small.bloom(hidden_size=64, num_heads=4)
    chosen, _ = choose_kernels(config, device=torch.device("cpu"))
    plain = replace(chosen, linear=TorchLinear(), head_linear=TorchLinear(), head=None)
    kernels = replace(
        plain,
        attention=TritonAttention(),
        layer_norm=layer_norm,
        add_layer_norm=add_layer_norm,
        layer_norm_and_pass=layer_norm_and_pass,
        bias_gelu=bias_gelu,
        dropout_add=bias_dropout_add,
        head=TritonRows(),
    )
    tokens = torch.randint(0, 96, (2, 41), generator=torch.Generator().manual_seed(0))
    with support.triton_device() as device:
        reference, ours = (build_model(plan_gpt(config, kernels=k), seed=1) for k in (plain, kernels))
        small.randomise(reference)
        ours.load_state_dict(reference.state_dict())
        reference, ours, tokens = reference.to(device), ours.to(device, dtype), tokens.to(device)
        if compiled:
            for block in ours.h:
                block._compute = torch.compile(block._compute, dynamic=False, backend="aot_eager", fullgraph=True)
        losses = [model(tokens[:, :-1], tokens[:, 1:]) for model in (ours, reference)]
        for loss in losses:
            loss.backward()
    torch.testing.assert_close(*(loss.float() for loss in losses), rtol=TOLERANCE[dtype], atol=0.0)
    for (name, mine), theirs in zip(ours.named_parameters(), reference.parameters(), strict=True):
        difference = (mine.grad.float() - theirs.grad).norm()
        assert difference <= TOLERANCE[dtype] * theirs.grad.norm() + 1e-6, name
