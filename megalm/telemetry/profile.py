"""A torch profile of some steps: a trace to look at, and a table of what each family of kernels takes of a step."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# The first pattern found in a name says its family: names of CUDA kernels, and of torch's operations on a CPU.
FAMILIES: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl|gloo|all_?reduce|all_?gather|reduce_?scatter|broadcast|c10d"),
    ("attention", r"flash|fmha|attn|attention|sdpa"),
    ("head and cross-entropy", r"cross_entropy|log_softmax|nll_loss|logit"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|\bxmma|::addmm|::mm\b|::bmm|::baddbmm|::linear|mkldnn|_scaled_mm"),
    ("normalisation", r"layer_?norm|rms_?norm"),
    ("softmax", r"softmax"),
    ("GELU and gates", r"gelu|silu|sigmoid|tanh|activation|gate_backward"),
    ("dropout", r"dropout|philox|bernoulli"),
    ("gradient sums", r"gradient_sum"),
    ("optimizer", r"adam|multi_tensor|foreach|l2norm"),
    ("embedding", r"embedding|index_select|indexing_backward"),
    ("copies and casts", r"memcpy|memset|copy|::to\b|_to_copy|::cat\b|::clone|::contiguous|fill|zero_"),
    ("compiled regions", r"triton_|cpp_fused|CompiledFxGraph|inductor"),
    ("elementwise and reductions", r"elementwise|reduce|::(add|mul|sum|div|sub|exp|pow|mean|where|neg)"),
)


def family(name: str) -> str:
    """The family of a kernel or operation by its name."""
    for known, pattern in FAMILIES:
        if re.search(pattern, name, re.IGNORECASE):
            return known
    return "other"


@dataclass(frozen=True)
class KernelTime:
    """What one kernel took in the profiled steps, in microseconds, and how often it ran."""

    name: str
    microseconds: float
    calls: int


def share_table(kernels: Iterable[KernelTime], *, wall_seconds: float, num_steps: int, on: str) -> str:
    """Milliseconds a step and share of the step for every family, then for the longest kernels.

    What the kernels leave of the step is the row "idle": the device waiting for the host, or Python on a CPU.
    """
    kernels = sorted(kernels, key=lambda kernel: -kernel.microseconds)
    families: dict[str, list[KernelTime]] = {}
    for kernel in kernels:
        families.setdefault(family(kernel.name), []).append(kernel)
    step = wall_seconds / num_steps
    rows = [
        (
            name,
            sum(one.microseconds for one in members) / 1e3 / num_steps,
            sum(one.calls for one in members) / num_steps,
        )
        for name, members in families.items()
    ]
    rows.append(("idle", max(0.0, step * 1e3 - sum(row[1] for row in rows)), 0.0))
    lines = [f"{num_steps} step(s) of {step * 1e3:.2f} ms, kernels on {on}", ""]
    lines.append(f"{'family':<28}{'ms a step':>11}{'share':>9}{'calls a step':>14}")
    for name, milliseconds, calls in sorted(rows, key=lambda row: -row[1]):
        lines.append(f"{name:<28}{milliseconds:>11.3f}{milliseconds / 1e3 / step:>9.1%}{calls:>14.1f}")
    lines += ["", f"{'longest kernels':<84}{'ms a step':>11}{'calls a step':>14}  family"]
    for kernel in kernels[:40]:
        per_step = f"{kernel.microseconds / 1e3 / num_steps:>11.3f}{kernel.calls / num_steps:>14.1f}"
        lines.append(f"{kernel.name[:82]:<84}{per_step}  {family(kernel.name)}")
    return "\n".join(lines) + "\n"


class StepProfiler:
    """Profiles the steps `first` to `last`, counted from 1, on the ranks that are asked for; nothing on others.

    The profiler itself slows the steps down, more on a CPU than on a GPU: shares count, not the milliseconds.
    """

    def __init__(
        self, folder: Path | None, *, first: int, last: int, rank: int, report: Callable[[str], None] = print
    ) -> None:
        self._folder = folder
        self._first, self._last, self._rank = first, last, rank
        self._report = report
        self._profile: Any = None
        self._wall_seconds = 0.0
        self._num_steps = 0

    def step(self, number: int) -> AbstractContextManager[None]:
        """Wrap one step."""
        wanted = self._folder is not None and self._first <= number <= self._last
        return self._recorded(number) if wanted else contextlib.nullcontext()

    def close(self) -> None:
        """Write what was recorded; a run that ends before the last step to profile keeps what there is."""
        if self._folder is not None and not self._num_steps:
            self._report(f"nothing was profiled: no step was one of those from {self._first} to {self._last}")
        if self._profile is None or self._folder is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = self._folder / f"steps_{self._first}_to_{self._first + self._num_steps - 1}_rank_{self._rank}"
        on_gpu = torch.cuda.is_available() and any(_device_time(event) for event in profile.key_averages())
        table = share_table(
            _kernels(profile, on_gpu=on_gpu),
            wall_seconds=self._wall_seconds,
            num_steps=self._num_steps,
            on="the GPU" if on_gpu else "the CPU, operations without those they call",
        )
        Path(f"{stem}.txt").write_text(table, encoding="utf-8")
        profile.export_chrome_trace(f"{stem}.trace.json.gz")
        self._report(f"profile of {self._num_steps} step(s): {stem}.txt and {stem}.trace.json.gz")

    @contextlib.contextmanager
    def _recorded(self, number: int) -> Iterator[None]:
        if self._profile is None:
            self._profile = torch.profiler.profile()
            self._profile.start()
            self._first = number
        started = _now()
        yield
        self._wall_seconds += _now() - started
        self._num_steps += 1
        if number == self._last:
            self.close()


def _now() -> float:
    """Seconds, after everything that the GPU was given is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _kernels(profile: Any, *, on_gpu: bool) -> list[KernelTime]:
    """Kernels of the GPU, or on a CPU the operations of torch, each without the operations it calls."""
    found = []
    for event in profile.key_averages():
        # Ranges that somebody named, such as an optimizer's step, cover kernels that are counted themselves.
        if on_gpu and event.device_type == torch.autograd.DeviceType.CUDA and not _is_range(event):
            found.append(KernelTime(event.key, _device_time(event), event.count))
        if not on_gpu and event.device_type == torch.autograd.DeviceType.CPU:
            found.append(KernelTime(event.key, event.self_cpu_time_total, event.count))
    return [kernel for kernel in found if kernel.microseconds > 0]


def _is_range(event: Any) -> bool:
    return bool(getattr(event, "is_user_annotation", False)) or "#" in event.key


def _device_time(event: Any) -> float:
    return float(getattr(event, "self_device_time_total", 0.0))
