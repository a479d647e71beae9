"""Rows of logits in Triton: read and written once where the gradient is wanted, read once for the statistics alone.

A row of BLOOM's vocabulary is 490 KiB, more than a multiprocessor holds, and the largest logit and the sum of
exponentials are known when all of it has been read. The gradient needs neither while it is written: its part that is as
long as the row is exp(logit), up to a factor that all elements share and that the products with it can take later. So
exponentials of the distance from a guess of the largest logit replace the logits, their sum is taken on the way, and
what depends on it is one factor a row and one element, the label's.

The guess is the largest of the label's logit and of the row's first 4,096. An exponential overflows where a logit is
more than 119 above it; the loss is then infinite, and the step left out and counted as any other such step.
Many small programs a row are faster than one that hopes for the L2 cache (docs/log.md). The sums of the parts of a row
are added in a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalm.kernels.triton_language import ceil_div, jit, next_power_of_two, tl

MOST_COLUMNS_AT_ONCE = 2048
PART_COLUMNS = 16384
"""Columns of a row whose sum one program takes."""
GUESS_COLUMNS, GUESS_WARPS = 4096, 8
ROWS_TO_JOIN = 8
SCALE_BLOCK, MOST_COLUMNS_TO_SCALE = 4096, 4096


@jit
def cross_entropy_statistics(
    logits: tl.tensor,
    peaks: tl.tensor,
    totals: tl.tensor,
    num_columns: tl.tensor,
    row_stride: tl.tensor,
    num_parts: tl.tensor,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The peak and the sum of exponentials of one part of a row. Shapes: peaks, totals [rows, num_parts].

    Each lane keeps its own until the part ends, so that no block waits for another thread; its eight columns share a
    peak, so that moving to a new one costs an eighth of an exponential each.
    """
    index = tl.program_id(0) // num_parts
    part = tl.program_id(0) % num_parts
    row = logits + index.to(tl.int64) * row_stride
    columns = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    peak = tl.full([BLOCK // 8], -3.4028234663852886e38, tl.float32)
    total = tl.zeros([BLOCK // 8], tl.float32)
    end = tl.minimum((part + 1) * PART, num_columns)
    for start in tl.range(part * PART, end, BLOCK):
        x = tl.load(row + start + columns, mask=start + columns < end, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(x, axis=1))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(x - higher[:, None]), axis=1)
        peak = higher
    highest = tl.max(peak, axis=0)
    tl.store(peaks + tl.program_id(0), highest)
    tl.store(totals + tl.program_id(0), tl.sum(total * tl.exp(peak - highest), axis=0))


@jit
def cross_entropy_join(
    peaks: tl.tensor,
    totals: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    num_rows: tl.tensor,
    num_parts: tl.tensor,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """The statistics of rows from their parts'. Shapes: peaks, totals [rows, num_parts] -> peak, total [rows]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    parts = tl.arange(0, PARTS)
    inside = (rows < num_rows)[:, None] & (parts < num_parts)[None, :]
    places = rows[:, None] * num_parts + parts[None, :]
    each = tl.load(peaks + places, mask=inside, other=-3.4028234663852886e38)
    highest = tl.max(each, axis=1)
    sums = tl.load(totals + places, mask=inside, other=0.0) * tl.exp(each - highest[:, None])
    tl.store(peak + rows, highest, mask=rows < num_rows)
    tl.store(total + rows, tl.sum(sums, axis=1), mask=rows < num_rows)


@jit
def cross_entropy_guess(
    logits: tl.tensor,
    labels: tl.tensor,
    guesses: tl.tensor,
    targets: tl.tensor,
    num_columns: tl.tensor,
    row_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """The label's logit, 0 without a label, and a guess of the largest one. Shapes: guesses, targets [rows]."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * row_stride
    label = tl.load(labels + index)
    columns = tl.arange(0, BLOCK)
    guess = tl.max(tl.load(row + columns, mask=columns < num_columns, other=float("-inf")).to(tl.float32), axis=0)
    target = tl.load(row + tl.maximum(label, 0)).to(tl.float32)
    tl.store(guesses + index, tl.where(label < 0, guess, tl.maximum(guess, target)))
    tl.store(targets + index, tl.where(label < 0, 0.0, target))


@jit
def cross_entropy_exponentials(
    logits: tl.tensor,
    guesses: tl.tensor,
    totals: tl.tensor,
    num_columns: tl.tensor,
    row_stride: tl.tensor,
    num_parts: tl.tensor,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """exp(logit - guess) / 2^46 in place of the logits of one part of a row, and its sum in totals [rows, num_parts].

    bf16 and fp32 reach to 2^127, 119 nats above the guess; what vanishes below 2^-126 is 55 nats below it.
    """
    index = tl.program_id(0) // num_parts
    part = tl.program_id(0) % num_parts
    row = logits + index.to(tl.int64) * row_stride
    guess = tl.load(guesses + index)
    total = tl.zeros([BLOCK], tl.float32)
    end = tl.minimum((part + 1) * PART, num_columns)
    for start in tl.range(part * PART, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(row + columns, mask=columns < end, other=float("-inf")).to(tl.float32)
        value = tl.exp2((x - guess) * 1.4426950408889634 - 46.0)
        total += value
        tl.store(row + columns, value.to(logits.dtype.element_ty), mask=columns < end)
    tl.store(totals + tl.program_id(0), tl.sum(total, axis=0))


@jit
def cross_entropy_factors(
    logits: tl.tensor,
    labels: tl.tensor,
    guesses: tl.tensor,
    targets: tl.tensor,
    totals: tl.tensor,
    weights: tl.tensor,
    log_sums: tl.tensor,
    factors: tl.tensor,
    z_loss: tl.tensor,
    num_rows: tl.tensor,
    row_stride: tl.tensor,
    num_parts: tl.tensor,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """log_sum and factor of every row, and the label's element of the gradient over its factor in place of its own."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = rows < num_rows
    parts = tl.arange(0, PARTS)
    inside = present[:, None] & (parts < num_parts)[None, :]
    places = rows[:, None] * num_parts + parts[None, :]
    total = tl.sum(tl.load(totals + places, mask=inside, other=0.0), axis=1)
    guess = tl.load(guesses + rows, mask=present, other=0.0)
    # log(2^46 * total), without cancellation where that would matter.
    large = total > 1.0
    log_total = tl.log(tl.where(large, total, total * 70368744177664.0)) + tl.where(large, 31.884770250957, 0.0)
    log_sum = guess + log_total
    slope = 1.0 + 2.0 * z_loss * log_sum
    tl.store(log_sums + rows, log_sum, mask=present)
    tl.store(factors + rows, tl.load(weights + rows, mask=present, other=0.0) * slope / total, mask=present)
    label = tl.load(labels + rows, mask=present, other=-1)
    target = tl.load(targets + rows, mask=present, other=0.0)
    value = tl.exp2((target - guess) * 1.4426950408889634 - 46.0) - total / slope
    tl.store(
        logits + rows.to(tl.int64) * row_stride + tl.maximum(label, 0),
        value.to(logits.dtype.element_ty),
        mask=present & (label >= 0),
    )


@jit
def cross_entropy_gradient(
    logits: tl.tensor,
    labels: tl.tensor,
    log_sums: tl.tensor,
    weights: tl.tensor,
    z_loss: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    row_stride: tl.tensor,
    num_blocks: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """The gradient in place of the logits, the last rows first: they may still be in the L2 cache."""
    index = num_rows - 1 - tl.program_id(0) // num_blocks
    columns = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    row = logits + index.to(tl.int64) * row_stride
    log_sum = tl.load(log_sums + index)
    weight = tl.load(weights + index)
    label = tl.load(labels + index)
    slope = weight * (1.0 + 2.0 * z_loss * log_sum)
    x = tl.load(row + columns, mask=columns < num_columns, other=float("-inf")).to(tl.float32)
    gradient = tl.exp(x - log_sum) * slope - tl.where(columns == label, weight, 0.0)
    tl.store(row + columns, gradient.to(logits.dtype.element_ty), mask=columns < num_columns)


@jit
def cross_entropy_scale(x: tl.tensor, factor: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr) -> None:
    scale = tl.load(factor)
    if scale != 1.0:
        indices = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + indices, mask=indices < size, other=0.0).to(tl.float32)
        tl.store(x + indices, (value * scale).to(x.dtype.element_ty), mask=indices < size)


@jit
def cross_entropy_scale_rows(
    x: tl.tensor,
    out: tl.tensor,
    factor: tl.tensor,
    factors: tl.tensor,
    width: tl.tensor,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """out = x * factors[row], with SCALES times one factor more; x and out may be the same."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(factors + row)
    if SCALES:
        scale *= tl.load(factor)
    places = row.to(tl.int64) * width + columns
    value = tl.load(x + places, mask=columns < width, other=0.0).to(tl.float32)
    tl.store(out + places, (value * scale).to(out.dtype.element_ty), mask=columns < width)


def _block(num_columns: int) -> tuple[int, int]:
    """Columns at once, and warps: 16 elements a thread."""
    block = max(512, min(MOST_COLUMNS_AT_ONCE, next_power_of_two(num_columns)))
    return block, block // 512


@torch.library.custom_op("megalm::row_statistics", mutates_args=(), schema="(Tensor logits) -> (Tensor, Tensor)")
def _row_statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, num_columns = logits.shape
    block, num_warps = _block(num_columns)
    num_parts = ceil_div(num_columns, PART_COLUMNS)
    peaks = logits.new_empty((num_rows, num_parts), dtype=torch.float32)
    totals = torch.empty_like(peaks)
    cross_entropy_statistics[(num_rows * num_parts,)](
        logits, peaks, totals, num_columns, logits.stride(0), num_parts,
        PART=PART_COLUMNS, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip
    peak, total = peaks.new_empty(num_rows), peaks.new_empty(num_rows)
    cross_entropy_join[(ceil_div(num_rows, ROWS_TO_JOIN),)](
        peaks, totals, peak, total, num_rows, num_parts,
        ROWS=ROWS_TO_JOIN, PARTS=next_power_of_two(num_parts), num_warps=1,
    )  # fmt: skip
    return peak, total


@_row_statistics.register_fake
def _(logits: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.size(0), dtype=torch.float32), logits.new_empty(logits.size(0), dtype=torch.float32)


@torch.library.custom_op(
    "megalm::row_gradient_",
    mutates_args=("logits",),
    schema="(Tensor(a!) logits, Tensor labels, Tensor log_sum, Tensor weights, float z_loss) -> ()",
)
def _row_gradient(logits: Tensor, labels: Tensor, log_sum: Tensor, weights: Tensor, z_loss: float) -> None:
    num_rows, num_columns = logits.shape
    block, num_warps = _block(num_columns)
    num_blocks = ceil_div(num_columns, block)
    cross_entropy_gradient[(num_rows * num_blocks,)](
        logits, labels, log_sum, weights, z_loss, num_rows, num_columns, logits.stride(0), num_blocks,
        BLOCK=block, num_warps=num_warps,
    )  # fmt: skip


@torch.library.custom_op(
    "megalm::row_exponentials_",
    mutates_args=("logits",),
    schema="(Tensor(a!) logits, Tensor labels, Tensor weights, float z_loss) -> (Tensor, Tensor)",
)
def _row_exponentials(logits: Tensor, labels: Tensor, weights: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """log_sum and factor of every row, the gradient over the factor in place of the logits."""
    num_rows, num_columns = logits.shape
    block, num_warps = _block(num_columns)
    num_parts = ceil_div(num_columns, PART_COLUMNS)
    guesses, targets, log_sums, factors = (logits.new_empty(num_rows, dtype=torch.float32) for _ in range(4))
    totals = logits.new_empty((num_rows, num_parts), dtype=torch.float32)
    cross_entropy_guess[(num_rows,)](
        logits, labels, guesses, targets, num_columns, logits.stride(0), BLOCK=GUESS_COLUMNS, num_warps=GUESS_WARPS
    )
    cross_entropy_exponentials[(num_rows * num_parts,)](
        logits, guesses, totals, num_columns, logits.stride(0), num_parts,
        PART=PART_COLUMNS, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip
    cross_entropy_factors[(ceil_div(num_rows, ROWS_TO_JOIN),)](
        logits, labels, guesses, targets, totals, weights, log_sums, factors, z_loss, num_rows, logits.stride(0),
        num_parts, ROWS=ROWS_TO_JOIN, PARTS=next_power_of_two(num_parts), num_warps=1,
    )  # fmt: skip
    return log_sums, factors


@_row_exponentials.register_fake
def _(logits: Tensor, labels: Tensor, weights: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weights), torch.empty_like(weights)


class TritonRows:
    """A `VocabularyRows` for logits of 16 or 32 bits on a GPU; overwrites them in place, without temporaries."""

    def bytes_per_logit(self, dtype: torch.dtype) -> int:
        return dtype.itemsize

    def statistics(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        peak, total = _row_statistics(logits)
        return peak, total

    def gradient_(self, logits: Tensor, labels: Tensor, log_sum: Tensor, weights: Tensor, *, z_loss: float) -> None:
        _row_gradient(logits, labels, log_sum, weights, z_loss)

    def log_sum_and_gradient_(
        self, logits: Tensor, labels: Tensor, weights: Tensor, *, z_loss: float
    ) -> tuple[Tensor, Tensor | None]:
        if logits.dtype == torch.float16:  # has no room for exponentials of any size
            peak, total = _row_statistics(logits)
            log_sum = total.log_().add_(peak)
            _row_gradient(logits, labels, log_sum, weights, z_loss)
            return log_sum, None
        log_sum, factors = _row_exponentials(logits, labels, weights, z_loss)
        return log_sum, factors

    def scale_(self, x: Tensor, factor: Tensor, factors: Tensor | None = None) -> None:
        """Reads the factor on the device: a host that asked whether it is 1 would wait for the whole forward pass."""
        if factors is not None:
            _scale_rows(x, x, factor, factors)
        else:
            size = x.numel()
            cross_entropy_scale[(ceil_div(size, SCALE_BLOCK),)](x, factor, size, BLOCK=SCALE_BLOCK, num_warps=8)

    def scaled(self, x: Tensor, factors: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        _scale_rows(x, out, None, factors)
        return out


def _scale_rows(x: Tensor, out: Tensor, factor: Tensor | None, factors: Tensor) -> None:
    num_rows, width = x.shape
    block = max(128, min(MOST_COLUMNS_TO_SCALE, next_power_of_two(width)))
    cross_entropy_scale_rows[(num_rows, ceil_div(width, block))](
        x, out, factors if factor is None else factor, factors, width,
        SCALES=factor is not None, BLOCK=block, num_warps=max(1, block // 512),
    )  # fmt: skip
