"""Compiled blocks compute what uncompiled ones do, from one graph for all of them, compiled once."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megalm.errors import KernelError
from megalm.kernels.linear.torch_native import TorchLinear
from megalm.models.blocks.arrangement import Spread
from megalm.models.gpt.build import choose_kernels, plan_gpt
from megalm.models.gpt.model import GPT
from megalm.telemetry.console import Console
from megalm.train.compile import CompileWatch, compile_blocks, obstacle
from megalm.train.watchdog import Watchdog
from tests.support.triton_device import ABSENT, INSTALLED, triton_device
from tests.unit.models.small import bloom, gpt2, randomise

CPU = torch.device("cpu")


def compiled(module: GPT, *, watchdog: Watchdog | None = None, backend: str = "aot_eager") -> CompileWatch:
    return compile_blocks(
        module,
        requested="on",
        device=CPU,
        zero_stage=1,
        console=Console(False, "error"),
        watchdog=watchdog,
        backend=backend,
    )


def a_watchdog() -> Watchdog:
    dog = Watchdog(rank=0, world_size=1, limit_seconds=600.0, folder=None, board=None)
    dog.at("training", 900)
    return dog


def loss_and_gradients(module: GPT) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 96, (2, 17), generator=generator).to(next(module.parameters()).device)
    module.zero_grad()
    loss = module(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("model", [bloom(num_layers=4), gpt2(num_layers=4)], ids=["bloom", "gpt2"])
@pytest.mark.parametrize("recompute", ["none", "full", "selective", "activation"])
def test_compiled_blocks_give_the_same_loss_and_gradients_and_compile_once(model: object, recompute: str) -> None:
    torch._dynamo.reset()
    kernels, _ = choose_kernels(model, device=CPU, linear="torch")  # type: ignore[arg-type]
    plan = plan_gpt(model, kernels=kernels, spread=Spread(recompute=recompute))  # type: ignore[arg-type]
    plain = GPT(plan)
    randomise(plain)
    module = copy.deepcopy(plain)
    watch = compiled(module)

    loss, gradients = loss_and_gradients(module)
    wanted_loss, wanted_gradients = loss_and_gradients(plain)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=0)
    for got, wanted in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)

    first = watch.report("step 1", expected=True)
    # Cut once, at BLOOM's attention core, the block and the modules it calls are eight frames, and the cut at a
    # recomputed activation makes four more; each block more would add as many if they did not share them.
    assert 0 < first <= (12 if recompute == "activation" else 8)
    loss_and_gradients(module)
    assert watch.report("step 2", expected=False) == 0


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_the_gelu_inside_the_products_gives_the_same_compiled_or_not(recompute: str) -> None:
    torch._dynamo.reset()
    config = bloom()
    apart, _ = choose_kernels(config, device=CPU, linear="torch")
    inside, names = choose_kernels(config, device=CPU, linear="torch", gelu_linear="torch")
    assert (apart.gelu_linear, inside.gelu_linear, names["gelu_linear"].name) == (None, "torch", "torch")
    plain, module = (
        GPT(plan_gpt(config, kernels=kernels, spread=Spread(recompute=recompute))) for kernels in (apart, inside)
    )
    randomise(plain)
    module.load_state_dict(plain.state_dict())
    wanted_loss, wanted_gradients = loss_and_gradients(plain)
    for _ in range(2):
        loss, gradients = loss_and_gradients(module)
        torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=0)
        for got, wanted in zip(gradients, wanted_gradients, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        compiled(module)


@pytest.mark.skipif(not INSTALLED, reason=ABSENT)
def test_a_block_with_tritons_attention_is_one_graph() -> None:
    from megalm.kernels.attention.triton_flash import TritonAttention

    torch._dynamo.reset()
    with triton_device() as device:
        kernels, _ = choose_kernels(bloom(), device=device, linear="torch", head="reference")
        plain = GPT(plan_gpt(bloom(), kernels=replace(kernels, attention=TritonAttention())))
        randomise(plain)
        plain.to(device)
        module = copy.deepcopy(plain)
        compiled(module)
        torch._dynamo.utils.counters.clear()
        loss, gradients = loss_and_gradients(module)
        wanted_loss, wanted_gradients = loss_and_gradients(plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=0)
    for got, wanted in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_products_that_are_not_torchs_own_stay_outside_of_the_graph() -> None:
    torch._dynamo.reset()
    kernels, _ = choose_kernels(bloom(), device=CPU, linear="torch")
    plain = GPT(plan_gpt(bloom(), kernels=replace(kernels, linear=Renamed())))
    randomise(plain)
    module = copy.deepcopy(plain)
    dog = a_watchdog()
    mark = dog._mark
    compiled(module, watchdog=dog)
    torch.testing.assert_close(loss_and_gradients(module)[0], loss_and_gradients(plain)[0], rtol=1e-6, atol=0)
    assert (dog._mark, dog._mark is mark) == (mark, False)  # It has compiled, and that was progress.


def test_a_late_compilation_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    dog = a_watchdog()
    watch = CompileWatch(Console(True, "info"), watchdog=dog)
    watch._on_start()
    assert dog._mark.words == "compiling, step 900"
    watch._on_end()
    assert dog._mark.words == "training, step 900"
    assert watch.report("step 900", expected=False) == 1
    assert "warning: recompiled 1 graph(s)" in "".join(capsys.readouterr())
    assert watch.report("step 901", expected=False) == 0


def test_without_compiler_or_under_zero_3_it_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "ZeRO-3" in str(obstacle(CPU, zero_stage=3))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no compiler among g++" in str(obstacle(CPU, zero_stage=1))
    with pytest.raises(KernelError, match=r"output\.compile = on cannot be done on cpu: there is no compiler"):
        compiled(GPT(plan_gpt(bloom())), backend="inductor")


class Renamed(TorchLinear):
    """torch's products under another name."""

    name = "renamed"
