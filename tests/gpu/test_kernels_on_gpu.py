"""What only a GPU can show of the kernels: memory at full size, and that the shipped launches compute what they should.

tests/unit/kernels runs the same kernels on a GPU, at small shapes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = torch.device("cuda")


def _normal(*size: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (scale * torch.randn(*size, generator=generator, device=DEVICE)).bfloat16().requires_grad_()


def test_head_of_bloom_takes_a_gibibyte_and_gives_the_gradients_of_the_logits_in_full() -> None:
    from megalm.kernels.cross_entropy.triton_rows import TritonRows
    from megalm.kernels.linear.torch_native import TorchLinear
    from megalm.parallel.head_loss import head_cross_entropy
    from megalm.topology.group import SOLO

    num_tokens, vocab, width = 8192, 250_880, 1024
    x, weight = _normal(num_tokens, width), _normal(vocab, width, scale=0.03, seed=1)
    labels = torch.arange(num_tokens, device=DEVICE) * 7919 % vocab
    weights = torch.full((num_tokens,), 1 / num_tokens, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = head_cross_entropy(x, weight, labels, weights, tp=SOLO, rows=TritonRows(), kernel=TorchLinear())
    loss.backward()
    gradients = sum(value.grad.numel() * value.grad.element_size() for value in (x, weight))
    assert torch.cuda.max_memory_allocated() - before - gradients <= 2**30
    # 64 tokens in fp32: their losses are a part of the mean, and their rows of x's gradient are whole.
    few = x[:64].detach().float().requires_grad_()
    each = functional.cross_entropy(functional.linear(few, weight.detach().float()), labels[:64], reduction="none")
    (each.sum() / num_tokens).backward()
    difference = x.grad[:64].float() - few.grad
    # Logits of about 1 are rounded to bf16, and so is every gradient; sums over the vocabulary average that out.
    assert difference.norm() <= 2**-7 * few.grad.norm()
    # Rows of the weight's gradient, with the logits of all tokens in fp32, some at a time.
    columns = labels[:64].unique()
    exact = torch.zeros(columns.numel(), width, device=DEVICE)
    for part in range(0, num_tokens, 512):
        tokens = x[part : part + 512].detach().float()
        hot = (labels[part : part + 512, None] == columns).float()
        share = functional.linear(tokens, weight.detach().float()).softmax(-1)[:, columns] - hot
        exact += share.t() @ tokens / num_tokens
    # Rounded to bf16 as a gradient of logits, and in each of four chunks as a sum.
    assert exact.norm() > 0
    assert (weight.grad[columns].float() - exact).norm() <= 2**-6 * exact.norm()
    # Softmax minus one-hot sums to 0 over the vocabulary, so that the label's rows, most of the norm, are cancelled by
    # all others; what is left is the rounding of the label's rows to bf16, in four chunks.
    assert weight.grad.float().sum(0).norm() <= 2**-5 * weight.grad.float().norm()


@pytest.mark.parametrize("width", [1024, 2048, 4096, 14336, 16384])
def test_layer_norm_after_an_addition_at_shipped_widths(width: int) -> None:
    from megalm.kernels.layer_norm import oracle
    from megalm.kernels.layer_norm.triton_norm import add_layer_norm

    inputs = [_normal(1000, width), _normal(width, seed=1), _normal(1000, width, seed=2)]
    inputs += [_normal(width, seed=3), _normal(width, seed=4)]
    exact = [value.detach().double().requires_grad_() for value in inputs]
    results, expected = add_layer_norm(*inputs, 1e-5), oracle.add_layer_norm(*exact, 1e-5)
    upstream = [_normal(1000, width, seed=5).detach(), _normal(1000, width, seed=6).detach()]
    torch.autograd.backward(results, upstream)
    torch.autograd.backward(expected, [value.double() for value in upstream])
    pairs = [*zip(results, expected, strict=True), *((a.grad, b.grad) for a, b in zip(inputs, exact, strict=True))]
    for ours, theirs in pairs:
        # The sum is rounded to bf16 before it is normalised, and every result once.
        assert (ours.double() - theirs).norm() <= 2**-8 * theirs.norm()


def test_activation_at_the_shipped_width_repeats_to_the_bit() -> None:
    from megalm.kernels.bias_gelu.triton_activation import bias_gelu

    results = []
    for _ in range(2):
        x, bias = _normal(5000, 8192), _normal(8192, seed=1)
        y = bias_gelu(x, bias)
        y.backward(torch.ones_like(y))
        results.append((y.detach(), x.grad, bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    exact = functional.gelu(x.detach().double() + bias.detach().double(), approximate="tanh")
    assert (results[0][0].double() - exact).norm() <= 2**-9 * exact.norm()
