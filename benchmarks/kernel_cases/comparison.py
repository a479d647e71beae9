"""What one row of the table of kernels is: an operation at a shape, by one side, forward and backward."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLUSHED_BYTES = 256 << 20
CYCLES_AHEAD = 8_000_000
"""What a GPU waits before the clock starts, some 4 ms: the host has launched everything by then."""
ROWS_OF_ERROR = 192


@dataclass(frozen=True)
class Comparison:
    """One operation at one shape, and the sides that compute it.

    `make` gives the differentiable inputs for a number of rows and a device's generator; every side and `exact` take
    them. `exact` is in float64 on the same values. `moved_bytes` or `flops` are what a perfect kernel has to do. Sides
    that are `in_place` have no gradients, and change their inputs.
    """

    operation: str
    shape: str
    num_rows: int
    make: Callable[[int], tuple[Tensor, ...]]
    sides: dict[str, Callable[..., Any]]
    exact: Callable[..., Any] | None
    moved_bytes: float = 0.0
    flops: float = 0.0
    in_place: bool = False


@dataclass
class Row:
    """The figures of one side."""

    operation: str
    shape: str
    side: str
    milliseconds: float = 0.0
    rate: str = ""
    peak_extra_bytes: int | None = None
    """Beyond the inputs, the result and the gradients of the inputs; None where it is not measured."""
    error: float | None = None
    """Largest difference of result and gradients from float64, over the largest value of each, on few rows."""
    failure: str = ""


def measure(comparison: Comparison, side: str, device: torch.device, *, rounds: int) -> Row:
    """Run one side; a side that fails gives the reason in place of figures."""
    row = Row(comparison.operation, comparison.shape, side)
    function = comparison.sides[side]
    try:
        inputs = comparison.make(comparison.num_rows)
        run = _once(function, inputs) if comparison.in_place else _forward_and_backward(function, inputs)
        run()
        row.peak_extra_bytes = _peak_extra_bytes(run, inputs, device)
        row.milliseconds = milliseconds(run, device, rounds=rounds)
        row.rate = _rate(comparison, row.milliseconds)
        # What is compiled computes the same formulas, and would be compiled again for another shape.
        if comparison.exact is not None and side != "torch.compile":
            row.error = _error(function, comparison)
    except Exception as failure:  # A peer that is absent, refuses or runs out of memory must not end the table.
        row.failure = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:100]}"
    return row


def milliseconds(run: Callable[[], Any], device: torch.device, *, rounds: int) -> float:
    """The median time of one call; on a GPU with a cold L2 cache and without what launches cost the host."""
    for _ in range(3):
        run()
    if device.type != "cuda":
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    flush = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)
    times = []
    for _ in range(rounds):
        flush.zero_()
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(CYCLES_AHEAD)
        start_event.record()
        run()
        end_event.record()
        torch.cuda.synchronize()
        times.append(start_event.elapsed_time(end_event))
    return statistics.median(times)


def _forward_and_backward(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
    upstream = _upstream(function(*inputs))

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(_as_tuple(function(*inputs)), inputs, upstream)

    return run


def _once(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
    def run() -> tuple[Tensor, ...]:
        function(*inputs)
        return ()

    return run


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _upstream(result: Any) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    gradients = []
    for part in _as_tuple(result):
        # A scalar is a loss, whose gradient is 1. A small random block is repeated: large ones take long to draw.
        block = torch.randn(min(part.numel(), 1 << 16), generator=generator)
        drawn = torch.ones(1) if part.dim() == 0 else block.repeat(-(-part.numel() // block.numel()))[: part.numel()]
        gradients.append(drawn.to(part.device, part.dtype).view(part.shape))
    return tuple(gradients)


def _peak_extra_bytes(run: Callable[[], Any], inputs: tuple[Tensor, ...], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    gradients = run()
    peak = torch.cuda.max_memory_allocated(device)
    known = sum(gradient.numel() * gradient.element_size() for gradient in gradients)
    return max(0, peak - before - known)


def _rate(comparison: Comparison, elapsed: float) -> str:
    amount, unit = (comparison.flops, "FLOP/s") if comparison.flops else (comparison.moved_bytes, "B/s")
    per_second = 1e3 * amount / elapsed
    if per_second >= 1e12:
        return f"{per_second / 1e12:.2f} T{unit}"
    return f"{per_second / 1e9:.1f} G{unit}"


def _error(function: Callable[..., Any], comparison: Comparison) -> float:
    assert comparison.exact is not None
    inputs = comparison.make(min(comparison.num_rows, ROWS_OF_ERROR))
    exact_inputs = tuple(value.detach().double().requires_grad_() for value in inputs)
    result, exact = function(*inputs), comparison.exact(*exact_inputs)
    pairs = [*zip(_as_tuple(result), _as_tuple(exact), strict=True)]
    if not comparison.in_place:
        upstream = _upstream(result)
        gradients = torch.autograd.grad(_as_tuple(result), inputs, upstream)
        exact_gradients = torch.autograd.grad(_as_tuple(exact), exact_inputs, tuple(part.double() for part in upstream))
        pairs += zip(gradients, exact_gradients, strict=True)
    differences = [(ours.double() - theirs).abs().max() / theirs.abs().max() for ours, theirs in pairs]
    return torch.stack(differences).max().item()
