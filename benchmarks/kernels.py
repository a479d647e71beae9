#!/usr/bin/env python
"""Every kernel beside its peers, forward and backward: milliseconds, rate, memory, and the error against float64.

    python benchmarks/kernels.py                        all operations, on the GPU if there is one
    python benchmarks/kernels.py --only LayerNorm head  those whose name contains a word
    python benchmarks/kernels.py --json FILE            the table for benchmarks/draw.py

On a GPU the shapes are those of docs/performance.md and all sides run in bf16 (a few minutes, most of them compiling);
on a CPU they are small, in fp32, and what only runs on GPUs is left out. liger_kernel and NVIDIA's apex join where they
are installed. Times are medians with a cold L2 cache and without the host's launches. Bytes and operations are those
that must be, whatever a side does beyond them. extra is the peak of memory beyond inputs and gradients; error is the
largest difference from float64 over the largest value, of results and gradients, on at least 192 rows.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.kernel_cases.comparison import Row, measure, milliseconds
from benchmarks.kernel_cases.operations import comparisons

HEAD = "| operation | shape | side | ms | rate | extra | error |\n|---|---|---|---|---|---|---|"
PACKAGES = ("torch", "triton", "liger_kernel", "apex")


def main(arguments: list[str]) -> int:
    options = _options(arguments)
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(f"{device_name(device)}; forward + backward, {'bf16' if device.type == 'cuda' else 'fp32'}\n\n{HEAD}")
    rows = []
    for row in measured(device, only=options.only, rounds=options.rounds):
        rows.append(row)
        print(line(row), flush=True)
    if options.json:
        found = {
            "device": device_name(device),
            "versions": versions(PACKAGES),
            "date": datetime.date.today().isoformat(),
            "rows": [asdict(row) for row in rows],
        }
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not rows:
        print(
            f"no operation's name contains {' or '.join(options.only)}; without --only all are compared",
            file=sys.stderr,
        )
    failed = [row for row in rows if row.failure and row.side.startswith("megalm")]
    return 1 if failed or not rows else 0


def measured(device: torch.device, *, only: list[str], rounds: int) -> Iterator[Row]:
    """Row by row, each operation's own sides first."""
    for comparison in comparisons(device):
        if only and not any(word.lower() in comparison.operation.lower() for word in only):
            continue
        for side in comparison.sides:
            yield measure(comparison, side, device, rounds=rounds)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if device.type == "cuda" and (not only or any(word.lower() in "attention" for word in only)):
        yield from _attention(device, rounds=rounds)


def _attention(device: torch.device, *, rounds: int) -> Iterator[Row]:
    from benchmarks.kernel_cases.attention import attention_cases

    for case in attention_cases(device):
        side = f"megalm {case.side}" if case.side.startswith("triton") else case.side
        row = Row(case.operation, case.shape, side)
        try:
            row.milliseconds = milliseconds(case.forward_and_backward, device, rounds=rounds)
            row.rate = f"{case.flops / row.milliseconds / 1e9:.0f} TFLOP/s"
        except Exception as failure:  # As in `measure`.
            row.failure = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:100]}"
        yield row


def line(row: Row) -> str:
    """One line of the table."""
    if row.failure:
        return f"| {row.operation} | {row.shape} | {row.side} | {row.failure} | | | |"
    extra = "" if row.peak_extra_bytes is None else f"{row.peak_extra_bytes / 2**30:.3f} GiB"
    error = "" if row.error is None else f"{row.error:.1e}"
    return f"| {row.operation} | {row.shape} | {row.side} | {row.milliseconds:.3f} | {row.rate} | {extra} | {error} |"


def device_name(device: torch.device) -> str:
    """As a person would name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s), {torch.backends.cpu.get_cpu_capability()}"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cpu_only = os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    parser.add_argument("--device", default="cpu" if cpu_only else "cuda", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="operations whose name contains a word")
    parser.add_argument("--rounds", type=int, default=20, help="calls whose median counts")
    parser.add_argument("--json", metavar="FILE", help="write the table for benchmarks/draw.py")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} must be at least 1")
    return options


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
