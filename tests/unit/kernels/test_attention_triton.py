"""The Triton attention core against float64, on a GPU where there is one and in the interpreter elsewhere."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.support.triton_device import ABSENT, INSTALLED, ON_GPU

if not INSTALLED:
    pytest.skip(ABSENT, allow_module_level=True)

from megalm.errors import KernelError
from megalm.kernels.alibi import alibi_slopes
from megalm.kernels.attention import triton_flash, triton_launch
from megalm.kernels.attention.baddbmm import BaddbmmAttention
from megalm.kernels.attention.triton_flash import TritonAttention, attention
from megalm.kernels.attention.triton_launch import Blocks, Cut

# The interpreter runs several blocks even at tiny lengths; a GPU runs the blocks that are shipped, at lengths to match.
TINY = Cut(Blocks(32, 16, 4, 2), Blocks(16, 16, 4, 2), Blocks(16, 32, 4, 2))
LONG = 900 if ON_GPU else 130

# Largest error as test_attention.py has it for the oracle, 3e-6 and 6e-2; twice that for fp32, where sums are longer
# here and in another order. fp16 has 8 times the digits of bf16.
TOLERANCE = {torch.float32: 6e-6, torch.bfloat16: 6e-2, torch.float16: 1e-2}


@pytest.fixture(autouse=True)
def device(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if not ON_GPU:
        monkeypatch.setattr(triton_launch, "cut_for", lambda *_, **__: TINY)
    return triton_device


def float64_attention(
    q: Tensor, k: Tensor, v: Tensor, *, slopes: Tensor | None, starts: Tensor | None, kept: Tensor | None = None
) -> Tensor:
    """Shapes: q [b, n, s, d], k, v [b, n/g, s, d], starts [b, s], kept [b, n, s, s], what multiplies each weight."""
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    positions = torch.arange(q.size(2), dtype=torch.float64, device=q.device)
    distances = positions[None, :] - positions[:, None]
    scores = torch.einsum("bnid,bnjd->bnij", q, k) / math.sqrt(q.size(-1))
    if slopes is not None:
        scores = scores + slopes.double()[:, None, None] * distances
    hidden = (distances > 0)[None, None]
    if starts is not None:
        hidden = hidden | (positions[None, None, None, :] < starts[:, None, :, None])
    weights = torch.softmax(scores.masked_fill(hidden, -1e300), dim=-1).masked_fill(hidden, 0.0)
    return torch.einsum("bnij,bnjd->bnid", weights if kept is None else weights * kept, v)


def example(
    dtype: torch.dtype, device: torch.device, *, b: int = 1, n: int = 2, kv_heads: int = 0, s: int = 40, d: int = 16
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(s + d)
    shapes = [(b, n, s, d), (b, kv_heads or n, s, d), (b, kv_heads or n, s, d)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def check(
    inputs: list[Tensor],
    *,
    slopes: Tensor | None,
    starts: Tensor | None = None,
    dropout: float = 0.0,
    kept: Tensor | None = None,
) -> None:
    """Result and gradients of the core against float64."""
    tolerance = TOLERANCE[inputs[0].dtype]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    generator = torch.Generator().manual_seed(9)
    incoming = torch.randn(inputs[0].shape, generator=generator).to(inputs[0])
    result = TritonAttention()(*inputs, slopes=slopes, mask=starts, dropout=dropout, training=True)
    expected = float64_attention(*exact, slopes=slopes, starts=starts, kept=kept)
    gradients = torch.autograd.grad(result, inputs, incoming)
    exact_gradients = torch.autograd.grad(expected, exact, incoming.double())
    assert result.dtype == inputs[0].dtype
    assert result.permute(2, 0, 1, 3).is_contiguous()
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=tolerance)
    for ours, reference in zip(gradients, exact_gradients, strict=True):
        # Sums over keys grow with the group and with dropout's factor.
        torch.testing.assert_close(ours.double(), reference, rtol=0, atol=tolerance * max(1.0, reference.abs().max()))


def starts_of(lengths: list[int], device: torch.device) -> Tensor:
    """The first key that each token sees. Shapes: -> [1, s] int32."""
    first = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    return torch.repeat_interleave(first, torch.tensor(lengths)).to(device, torch.int32)[None]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("s", [1, 17, 65, LONG])
def test_alibi_attention_matches_float64_at_odd_lengths(dtype: torch.dtype, s: int, device: torch.device) -> None:
    # 6 heads have slopes of both series; two of them keep the interpreter fast.
    check(example(dtype, device, s=s), slopes=alibi_slopes(6)[[1, 4]].to(device))


@pytest.mark.parametrize("d", [64, 80, 96, 112, 128])
def test_every_head_size_matches_float64(d: int, device: torch.device) -> None:
    check(example(torch.bfloat16, device, n=1, s=LONG, d=d), slopes=alibi_slopes(3)[:1].to(device))
    check(example(torch.float32, device, n=1, s=35, d=d), slopes=None)


def test_attention_without_alibi_matches_float64(device: torch.device) -> None:
    check(example(torch.float32, device, s=65), slopes=None)


@pytest.mark.parametrize("dtype, s", [(torch.float32, 65), (torch.bfloat16, LONG), (torch.float16, 65)])
def test_documents_do_not_see_each_other(dtype: torch.dtype, s: int, device: torch.device) -> None:
    starts = torch.cat([starts_of([5, 1, 30, 4, s - 40], device), starts_of([s], device)])
    inputs = example(dtype, device, b=2, s=s)
    check(inputs, slopes=alibi_slopes(2).to(device), starts=starts)
    check(inputs, slopes=None, starts=starts)


def test_queries_that_see_nothing_give_zeros_and_no_gradient(device: torch.device) -> None:
    inputs = example(torch.float32, device, s=40)
    starts = torch.zeros(1, 40, dtype=torch.int32, device=device)
    starts[0, :20] = 20  # Padding on the left.
    starts[0, 20:] = 20
    result = TritonAttention()(*inputs, slopes=alibi_slopes(2).to(device), mask=starts, dropout=0.0, training=True)
    gradients = torch.autograd.grad(result.sum(), inputs)
    assert not result[:, :, :20].any()
    assert result[:, :, 20:].any()
    assert not any(gradient[:, :, :20].any() for gradient in gradients)
    check(inputs, slopes=None, starts=starts)


@pytest.mark.parametrize(
    "kv_heads, dtype, s",
    [(1, torch.float32, 49), (2, torch.float32, 49), (2, torch.bfloat16, LONG), (1, torch.float16, 49)],
)
def test_heads_that_share_keys_match_float64(kv_heads: int, dtype: torch.dtype, s: int, device: torch.device) -> None:
    check(example(dtype, device, n=4, kv_heads=kv_heads, s=s), slopes=alibi_slopes(4).to(device))


def test_shapes_that_do_not_agree_are_refused(device: torch.device) -> None:
    core, options = TritonAttention(), {"slopes": None, "dropout": 0.0, "training": False}
    q, k, v = example(torch.float32, device, n=4, kv_heads=3, s=8)
    with pytest.raises(ValueError, match="the 3 heads of k and v must divide the 4 of q"):
        core(q, k, v, mask=None, **options)
    q, k, v = example(torch.float32, device, s=8)
    with pytest.raises(ValueError, match="must agree but in heads"):
        core(q, k[:, :, :7], v[:, :, :7], mask=None, **options)
    with pytest.raises(ValueError, match="one for each of 1 x 8 queries"):
        core(q, k, v, mask=torch.zeros(1, 7, dtype=torch.int32, device=device), **options)
    mixed = torch.zeros(8, 2, 2, 3, 16, device=device)
    with pytest.raises(ValueError, match="one for each of 2 x 8 queries"):
        core.from_fused(mixed, mask=torch.zeros(1, 8, dtype=torch.int32, device=device), **options)


def test_in_16_bits_more_is_skipped_and_results_stay_within_their_rounding(device: torch.device) -> None:
    slopes = torch.tensor([0.7], device=device)
    first = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = example(dtype, device, n=1, s=LONG, d=40)
        first[dtype] = attention(*inputs, slopes, None, None, 0.0)[2][0, 0, -1].item()
        check(inputs, slopes=slopes)
    assert first[torch.bfloat16] >= first[torch.float32] > 0


def test_blocks_that_cannot_matter_are_skipped_and_nothing_changes(device: torch.device) -> None:
    s = LONG
    q, k, v = example(torch.float32, device, n=2, s=s, d=40)
    slopes = torch.tensor([0.7, 1e-4], device=device)
    _, _, first_key = attention(q, k, v, slopes, None, None, 0.0)
    assert first_key[0, 0, -1] > s // 3  # exp(-0.7 * distance) vanishes beside scores of a few units.
    assert not first_key[0, 1].any()
    check([q, k, v], slopes=slopes)
    # One key so long that it matters from anywhere, and to queries that live in the second piece of the head alone.
    with torch.no_grad():
        q[0, 0, :, :32] = 0.0
        k[0, 0, 3] = 1.5 * 0.7 * s * 40**0.5 / q[0, 0, s - 1].square().sum() * q[0, 0, s - 1]
    _, _, first_key = attention(q, k, v, slopes, None, None, 0.0)
    assert not first_key[0, 0].any()
    check_far_key = TritonAttention()(q, k, v, slopes=slopes, mask=None, dropout=0.0, training=False)
    exact = float64_attention(*(x.detach().double() for x in (q, k, v)), slopes=slopes, starts=None)
    # Scores are near s here, and fp32 resolves 6e-5 at 1,000.
    torch.testing.assert_close(check_far_key.double(), exact, rtol=0, atol=1e-3)


def kept_by(seed: Tensor, q: Tensor, dropout: float) -> Tensor:
    """What dropout multiplies each weight by, read off the kernel with one-hot values and uniform weights."""
    b, n, s, _ = q.shape
    parts = []
    for first in range(0, s, 16):
        v = torch.zeros(b, n, s, 16, device=q.device)
        v[:, :, torch.arange(first, min(first + 16, s)), torch.arange(min(16, s - first))] = 1.0
        zeros = torch.zeros(b, n, s, 16, device=q.device)
        parts.append(attention(zeros, zeros, v, None, None, seed, dropout)[0])
    weights = torch.cat(parts, dim=-1)[..., :s]
    return weights * torch.arange(1, s + 1, device=q.device)[:, None]  # Row i had weights 1 / (i + 1).


@pytest.mark.parametrize("dtype, s", [(torch.float32, 40), (torch.bfloat16, 65)])
def test_dropout_drops_the_same_weights_forward_and_backward(dtype: torch.dtype, s: int, device: torch.device) -> None:
    inputs = example(dtype, device, s=s, d=40)  # Heads of two pieces.
    torch.manual_seed(5)
    seed = torch.randint(2**62, (1,), dtype=torch.int64, device=device)
    kept = kept_by(seed, inputs[0], 0.3)
    seen = torch.ones(s, s, device=device, dtype=torch.bool).tril()
    # At least 1,640 weights: standard deviation of the rate 0.011. Four of those.
    assert abs((kept[:, :, seen] > 0).float().mean().item() - 0.7) < 0.045
    assert not torch.equal(kept[0, 0], kept[0, 1])
    torch.manual_seed(5)
    check(inputs, slopes=alibi_slopes(2).to(device), dropout=0.3, kept=kept.double().round(decimals=5) * 1.0)


def test_dropout_follows_the_generator_and_acts_in_training_only(device: torch.device) -> None:
    inputs = example(torch.float32, device, s=20)
    core = TritonAttention()
    arguments: dict[str, Any] = {"slopes": alibi_slopes(2).to(device), "mask": None, "dropout": 0.25}
    torch.manual_seed(3)
    first = core(*inputs, training=True, **arguments)
    second = core(*inputs, training=True, **arguments)
    torch.manual_seed(3)
    assert torch.equal(core(*inputs, training=True, **arguments), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    still = core(*inputs, training=False, **arguments)
    assert torch.equal(torch.get_rng_state(), state)
    oracle = BaddbmmAttention()(*inputs, **{**arguments, "dropout": 0.0}, training=False)
    torch.testing.assert_close(still, oracle, rtol=0, atol=6e-6)


def test_two_runs_agree_to_the_last_bit(device: torch.device) -> None:
    inputs = example(torch.bfloat16, device, n=2, kv_heads=1, s=LONG)
    slopes = alibi_slopes(2).to(device)
    runs = []
    for _ in range(2):
        result = TritonAttention()(*inputs, slopes=slopes, mask=None, dropout=0.0, training=True)
        runs.append([result, *torch.autograd.grad(result.float().square().sum(), inputs)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_the_order_of_heads_changes_nothing(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Three heads of keys for six of queries: all at once, one by one, and two at once, which do not divide them."""
    results = []
    for heads in (1000, 1, 2):
        inputs = example(torch.bfloat16, device, n=6, kv_heads=3, s=49)
        bytes_of_a_head = 2 * 49 * inputs[1].size(-1) * 2
        monkeypatch.setattr(triton_launch, "L2_BYTES", heads * bytes_of_a_head)
        result = TritonAttention()(*inputs, slopes=alibi_slopes(6).to(device), mask=None, dropout=0.0, training=True)
        results.append((result, *torch.autograd.grad(result, inputs, torch.ones_like(result))))
    for others in results[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(results[0], others, strict=True))


def test_a_fused_projection_gives_the_same_and_takes_its_gradient_whole(device: torch.device) -> None:
    s, b, n, d = 33, 2, 2, 16
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(s, b, n, 3, d, generator=generator).to(device).requires_grad_()
    arguments: dict[str, Any] = {"slopes": alibi_slopes(n).to(device), "mask": None, "dropout": 0.0, "training": True}
    incoming = torch.randn(s, b, n * d, generator=generator).to(device)
    results = [core.from_fused(mixed, **arguments) for core in (TritonAttention(), BaddbmmAttention())]
    gradients = [torch.autograd.grad(result, mixed, incoming)[0] for result in results]
    assert results[0].is_contiguous()
    assert gradients[0].is_contiguous()
    torch.testing.assert_close(*results, rtol=0, atol=6e-6)
    torch.testing.assert_close(*gradients, rtol=0, atol=6e-6)


@pytest.mark.parametrize("d", [16, 40])
@pytest.mark.parametrize("queries, keys", [(32, 32), (64, 32)])
def test_the_bias_of_a_projection_gets_the_sum_of_its_gradient(
    queries: int, keys: int, d: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    cut = Cut(Blocks(64, 32, 4, 2), Blocks(queries, 32, 4, 1), Blocks(32, keys, 4, 1))
    monkeypatch.setattr(triton_launch, "cut_for", lambda *_, **__: cut)
    s, b, n = 77, 2, 2
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(s, b, n, 3, d, generator=generator).to(device).requires_grad_()
    bias = torch.zeros(n * 3 * d, device=device, requires_grad=True)
    core, slopes = TritonAttention(), alibi_slopes(n).to(device)
    result = core.from_fused(mixed, slopes=slopes, mask=None, dropout=0.0, training=True, bias=bias)
    whole, summed = torch.autograd.grad(result, (mixed, bias), torch.randn(s, b, n * d, generator=generator).to(device))
    # fp32 sums of 154 terms below 4, in another order.
    torch.testing.assert_close(summed, whole.sum((0, 1)).flatten(), rtol=0, atol=154 * 4 * 2.0**-23)


def test_strides_that_the_hardware_cannot_read_are_copied(device: torch.device) -> None:
    wide = torch.randn(1, 2, 16, 40, generator=torch.Generator().manual_seed(2)).to(device)
    q = wide.transpose(2, 3)  # The head is the slow dimension.
    k = torch.randn(1, 2, 40, 17, device=device)[..., 1:]  # Rows start at odd addresses.
    v = torch.randn(1, 1, 1, 16, device=device).expand(1, 2, 40, 16)
    check([x.detach().requires_grad_() for x in (q, k, v)], slopes=alibi_slopes(2).to(device))


@pytest.mark.parametrize("b, s", [(0, 8), (2, 0)])
def test_empty_batches_give_empty_results(b: int, s: int, device: torch.device) -> None:
    inputs = example(torch.float32, device, b=b, s=s)
    result = TritonAttention()(*inputs, slopes=alibi_slopes(2).to(device), mask=None, dropout=0.0, training=True)
    assert result.shape == inputs[0].shape
    assert [x.shape for x in torch.autograd.grad(result.sum(), inputs)] == [x.shape for x in inputs]


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that operations return, those inside of megalm's own operations included."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.inside: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("megalm::")
        own = getattr(triton_flash, name, None) if name != func.name() else None
        if own is not None:
            self.inside.add(name)
            with self:  # torch would run what is inside without this mode
                return own._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, list | tuple) else [out]:
            self.bytes = max(self.bytes, x.nbytes if isinstance(x, Tensor) else 0)
        return out


def _attend(device: torch.device) -> tuple[_Largest, int]:
    """The largest tensor of forward and backward with everything on, and the bytes of q."""
    inputs = example(torch.float32, device, n=1, s=LONG)
    starts = starts_of([LONG // 2, LONG - LONG // 2], device)
    torch.manual_seed(0)
    with _Largest() as largest:
        result = TritonAttention()(*inputs, slopes=alibi_slopes(1).to(device), mask=starts, dropout=0.1, training=True)
        result.backward(torch.ones_like(result))
    assert largest.inside == {"attention", "attention_backward"}
    return largest, inputs[0].nbytes


def test_nothing_of_the_size_of_the_scores_is_in_memory(device: torch.device) -> None:
    largest, size = _attend(device)
    assert 0 < largest.bytes <= size < 4 * LONG * LONG


def test_scores_inside_of_an_operation_would_be_seen(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = triton_flash.launch_forward

    def with_scores(q: Tensor, *rest: Any) -> Any:
        q.new_empty(q.size(2), q.size(2))
        return launch(q, *rest)

    monkeypatch.setattr(triton_flash, "launch_forward", with_scores)
    largest, _ = _attend(device)
    assert largest.bytes >= 4 * LONG * LONG


def test_recomputation_repeats_the_dropped_weights(device: torch.device) -> None:
    mixed = torch.randn(20, 1, 2, 3, 16, generator=torch.Generator().manual_seed(4)).to(device).requires_grad_()
    arguments: dict[str, Any] = {"slopes": alibi_slopes(2).to(device), "mask": None, "dropout": 0.2, "training": True}

    def attend(x: Tensor) -> Tensor:
        return TritonAttention().from_fused(x, **arguments).square().sum()

    torch.manual_seed(6)
    kept = torch.autograd.grad(attend(mixed), mixed)[0]
    torch.manual_seed(6)
    again = torch.autograd.grad(checkpoint(attend, mixed, use_reentrant=False), mixed)[0]
    assert torch.equal(kept, again)


def test_compiled_regions_hold_the_kernels_without_a_break(device: torch.device) -> None:
    mixed = torch.randn(20, 1, 2, 3, 16, generator=torch.Generator().manual_seed(4)).to(device).requires_grad_()
    slopes = alibi_slopes(2).to(device)

    def region(x: Tensor) -> Tensor:
        return TritonAttention().from_fused(2.0 * x, slopes=slopes, mask=None, dropout=0.0, training=True) + 1.0

    compiled = torch.compile(region, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    for result, expected in zip(
        *([f(mixed), torch.autograd.grad(f(mixed).square().sum(), mixed)[0]] for f in (compiled, region)), strict=True
    ):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_operations_keep_the_promises_of_their_fake_forms(device: torch.device) -> None:
    inputs = example(torch.float32, device, s=20)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    for extras in ((alibi_slopes(2).to(device), None, None, 0.0), (None, starts_of([8, 12], device), seed, 0.1)):
        torch.library.opcheck(
            attention, (*inputs, *extras), test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
        )


def test_a_square_mask_is_refused(device: torch.device) -> None:
    inputs = example(torch.float32, device, s=8)
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool, device=device)
    with pytest.raises(KernelError, match=r"\(1, 1, 8, 8\)(.|\n)*first key"):
        TritonAttention()(*inputs, slopes=None, mask=mask, dropout=0.0, training=False)


@pytest.mark.parametrize(
    "cut",
    [
        (Blocks(64, 128, 8, 2), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)),
        (Blocks(128, 64, 8, 2), Blocks(64, 128, 4, 2), Blocks(64, 64, 4, 2)),
        (Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2), Blocks(128, 64, 4, 2)),
        (Blocks(64, 64, 8, 2), Blocks(128, 64, 4, 2), Blocks(64, 64, 4, 2)),
        (Blocks(64, 32, 8, 2), Blocks(32, 32, 4, 2), Blocks(64, 64, 4, 2)),
    ],
)
def test_blocks_that_would_miss_the_diagonal_are_refused(cut: tuple[Blocks, Blocks, Blocks]) -> None:
    with pytest.raises(ValueError, match="divide one another"):
        Cut(*cut)


@pytest.mark.parametrize(
    "d, parts",
    [(8, (16, 0)), (24, (32, 0)), (40, (32, 16)), (64, (64, 0)), (80, (64, 16)), (96, (64, 32)), (112, (128, 0))],
)
def test_heads_are_held_in_the_fewest_columns(d: int, parts: tuple[int, int]) -> None:
    assert triton_launch.head_parts(d) == parts
