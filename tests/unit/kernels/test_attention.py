"""Both attention cores against a formula in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megalm.kernels import cpu
from megalm.kernels.alibi import alibi_slopes
from megalm.kernels.attention import sdpa
from megalm.kernels.attention.baddbmm import BaddbmmAttention
from megalm.kernels.attention.protocol import AttentionCore
from megalm.kernels.attention.sdpa import SdpaAttention

CORES: list[Callable[[], AttentionCore]] = [BaddbmmAttention, SdpaAttention]
NUM_HEADS = 6  # Not a power of two: slopes of both series.


def float64_attention(q: Tensor, k: Tensor, v: Tensor, *, slopes: Tensor | None, mask: Tensor | None) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    positions = torch.arange(q.size(2), dtype=torch.float64)
    distances = positions[None, :] - positions[:, None]
    scores = torch.einsum("bnid,bnjd->bnij", q, k) / math.sqrt(q.size(-1))
    if slopes is not None:
        scores = scores + slopes.double()[:, None, None] * distances
    hidden = (distances > 0)[None, None]
    if mask is not None:
        hidden = hidden | mask
    weights = torch.softmax(scores.masked_fill(hidden, -1e300), dim=-1).masked_fill(hidden, 0.0)
    return torch.einsum("bnij,bnjd->bnid", weights, v)


def example(
    dtype: torch.dtype, *, seed: int = 0, b: int = 2, n: int = NUM_HEADS, s: int = 24, d: int = 8
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(b, n, s, d, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def document_mask(lengths: list[int], *, batch_size: int) -> Tensor:
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (document[:, None] != document[None, :]).expand(batch_size, 1, -1, -1)


def padding_mask(kept: list[list[int]]) -> Tensor:
    return (torch.tensor(kept) == 0)[:, None, None, :].expand(-1, 1, len(kept[0]), -1)


MASKS: dict[str, Tensor | None] = {
    "no mask": None,
    "documents": document_mask([5, 1, 10, 8], batch_size=2),
    "one mask for all": document_mask([12, 12], batch_size=1),
    "padding left and right": padding_mask([[0] * 6 + [1] * 18, [1] * 18 + [0] * 6]),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("slopes", [alibi_slopes(NUM_HEADS), None], ids=["alibi", "plain"])
@pytest.mark.parametrize("build", CORES)
# Largest error in units of the dtype's epsilon: some 24 products and sums for fp32; two roundings of values below 4
# (weights, then result) for bf16, and one more for each factor of the backward pass.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.bfloat16, 6e-2)])
def test_core_matches_float64_forward_and_grad(
    build: Callable[[], AttentionCore], slopes: Tensor | None, mask: Tensor | None, dtype: torch.dtype, tolerance: float
) -> None:
    ours = example(dtype)
    exact = [x.detach().double().requires_grad_() for x in ours]
    generator = torch.Generator().manual_seed(9)
    incoming = torch.randn(ours[0].shape, generator=generator).to(dtype)

    result = build()(*ours, slopes=slopes, mask=mask, dropout=0.0, training=True)
    expected = float64_attention(*exact, slopes=slopes, mask=mask)
    result.backward(incoming)
    expected.backward(incoming.double())

    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=tolerance)
    for x, reference in zip(ours, exact, strict=True):
        torch.testing.assert_close(x.grad.double(), reference.grad, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("slopes", [alibi_slopes(NUM_HEADS), None], ids=["alibi", "plain"])
def test_queries_in_blocks_match_float64_forward_and_grad(
    slopes: Tensor | None, mask: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdpa, "CPU_QUERIES", 7)  # of 24: three blocks and a shorter one
    test_core_matches_float64_forward_and_grad(SdpaAttention, slopes, mask, torch.float32, 3e-6)


def test_queries_in_blocks_meet_no_keys_beyond_their_block(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    attend = functional.scaled_dot_product_attention

    def recorded(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((q.size(2), k.size(2)))
        return attend(q, k, v, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", recorded)
    q, k, v = (x.detach() for x in example(torch.float32, b=1, s=2 * sdpa.CPU_QUERIES + 37))
    slopes = alibi_slopes(NUM_HEADS)
    result = SdpaAttention()(q, k, v, slopes=slopes, mask=None, dropout=0.0, training=True)
    assert seen == [(256, 256), (256, 512), (37, 549)]
    expected = float64_attention(q, k, v, slopes=slopes, mask=None)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("build", CORES)
def test_query_that_sees_nothing_gives_zeros_and_no_gradient(build: Callable[[], AttentionCore]) -> None:
    q, k, v = example(torch.float32)
    mask = padding_mask([[0] * 6 + [1] * 18, [1] * 24])
    result = build()(q, k, v, slopes=alibi_slopes(NUM_HEADS), mask=mask, dropout=0.0, training=True)
    result.sum().backward()
    assert torch.equal(result[0, :, :6], torch.zeros(NUM_HEADS, 6, 8))
    assert torch.equal(v.grad[0, :, :6], torch.zeros(NUM_HEADS, 6, 8))
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


@pytest.mark.parametrize("build", CORES)
def test_future_tokens_do_not_change_the_past(build: Callable[[], AttentionCore]) -> None:
    q, k, v = (x.detach() for x in example(torch.float32))
    core = build()
    slopes = alibi_slopes(NUM_HEADS)
    before = core(q, k, v, slopes=slopes, mask=None, dropout=0.0, training=False)
    k[:, :, 15:] += 3.0
    v[:, :, 15:] -= 5.0
    after = core(q, k, v, slopes=slopes, mask=None, dropout=0.0, training=False)
    assert torch.equal(before[:, :, :15], after[:, :, :15])
    assert not torch.equal(before[:, :, 15:], after[:, :, 15:])


@pytest.mark.parametrize("build", CORES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_alibi_is_as_exact_at_2048_positions_as_the_dtype_allows(
    build: Callable[[], AttentionCore], dtype: torch.dtype
) -> None:
    slopes = alibi_slopes(12)[[3, 8]]
    q, k, v = (x.detach() for x in example(dtype, b=1, n=2, s=2048, d=16))
    result = build()(q, k, v, slopes=slopes, mask=None, dropout=0.0, training=False)
    expected = float64_attention(q, k, v, slopes=slopes, mask=None)
    relative_error = (result.double() - expected).norm() / expected.norm()
    # Rounding weights and result costs under half an epsilon each. A bias kept in bf16 as slope * j is 0.3 off.
    assert relative_error < 0.5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("build", CORES)
def test_scores_beyond_the_range_of_fp16_stay_finite(build: Callable[[], AttentionCore]) -> None:
    q = k = torch.full((1, 1, 4, 64), 48.0, dtype=torch.float16)  # q k^T is 147,456, times 1/8 is 18,432.
    v = torch.ones(1, 1, 4, 64, dtype=torch.float16)
    result = build()(q, k, v, slopes=None, mask=None, dropout=0.0, training=False)
    assert torch.equal(result, v)


@pytest.mark.parametrize("build", CORES)
def test_dropout_acts_in_training_only_and_keeps_the_mean(build: Callable[[], AttentionCore]) -> None:
    q, k, _ = (x.detach() for x in example(torch.float32, b=1, s=64))
    v = torch.ones_like(q)
    arguments: dict[str, Any] = {"slopes": None, "mask": None, "dropout": 0.25}
    core = build()
    torch.manual_seed(3)
    dropped = core(q, k, v, training=True, **arguments)
    torch.manual_seed(3)
    assert torch.equal(core(q, k, v, training=True, **arguments), dropped)
    torch.testing.assert_close(core(q, k, v, training=False, **arguments), v)
    # The weights of a row sum to 1 in the mean; 64 * 6 rows of standard deviation below 0.6 give 0.03: four of those.
    assert abs(dropped[..., 0].mean().item() - 1.0) < 0.12
    assert dropped[..., 0].std().item() > 0.05


@pytest.mark.parametrize("build", CORES)
def test_core_accepts_heads_cut_from_a_fused_projection(build: Callable[[], AttentionCore]) -> None:
    fused = torch.randn(10, 2, NUM_HEADS, 3, 8, generator=torch.Generator().manual_seed(1))  # [s, b, n, 3, d]
    q, k, v = (x.permute(1, 2, 0, 3) for x in fused.unbind(dim=3))
    slopes = alibi_slopes(NUM_HEADS)
    result = build()(q, k, v, slopes=slopes, mask=None, dropout=0.0, training=True)
    expected = float64_attention(q, k, v, slopes=slopes, mask=None)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_without_16_bit_products_a_cpu_attends_in_fp32_and_rounds_once(
    mask: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_has_products", lambda dtype: False)
    slopes = alibi_slopes(NUM_HEADS)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [value.detach().bfloat16().to(dtype).requires_grad_() for value in example(torch.float32)]
        context = SdpaAttention()(*leaves, slopes=slopes, mask=mask, dropout=0.0, training=True)
        context.backward(torch.ones_like(context))
        results.append([context.detach(), *(leaf.grad for leaf in leaves)])
    for narrow, wide in zip(*results, strict=True):
        assert narrow.dtype == torch.bfloat16
        assert torch.equal(narrow, wide.bfloat16())
