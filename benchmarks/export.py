#!/usr/bin/env python
"""How fast a checkpoint becomes a Hugging Face folder, against a copy of the same bytes.

    python benchmarks/export.py [--hidden-size 2048] [--num-layers 20] [--tp 2] [--repeats 7]

Both sides read through the page cache, which holds the checkpoint, and end when every byte is on the disk. The copy is
`cp` of the layer files and an fsync of each. They take turns in every order, so that all see the same machine; the
medians are compared. The export hashes what it writes. The third figure is the whole tool's work: it verifies the
hashes of what it reads first.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megalm.checkpoint.export import export_checkpoint
from megalm.checkpoint.find import find_checkpoint
from megalm.config.model import ModelConfig
from tests.support.checkpoints import config_of, write_checkpoint


def copy(source: Path, target: Path) -> None:
    """`cp` and fsync of every layer file."""
    target.mkdir()
    files = sorted(source.glob("layer_*"))
    subprocess.run(["cp", "--", *map(str, files), str(target)], check=True)
    for file in target.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def wait_for_idle(seconds: float) -> None:
    """Wait for a moment at which nothing else runs on this machine, but no longer than that."""
    deadline = time.monotonic() + seconds
    idle = 0
    while idle < 5 and time.monotonic() < deadline:
        running = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0])
        idle = idle + 1 if running <= 1 else 0
        time.sleep(0.02)


def seconds_of(action: Callable[[], object], target: Path) -> float:
    """Time of one run; what it wrote goes afterwards, and the disk comes to rest."""
    started = time.monotonic()
    action()
    elapsed = time.monotonic() - started
    shutil.rmtree(target)
    os.sync()
    return elapsed


def main(arguments: list[str]) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden-size", 2048), ("num-layers", 20), ("tp", 2), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--family", choices=("bloom", "gpt2"), default="bloom")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the export; default: the checkpoint's")
    parser.add_argument(
        "--wait-for-idle", type=float, default=0.0, help="seconds to wait for an idle machine before each measurement"
    )
    parser.add_argument("--folder", help="where to write; default: a temporary folder")
    given = parser.parse_args(arguments)
    if given.repeats < 1 or given.num_layers < 1 or given.hidden_size < 1 or given.hidden_size % 16:
        parser.error("--hidden-size must be a multiple of its 16 heads, --num-layers and --repeats at least 1")
    if given.tp < 1 or 16 % given.tp:
        parser.error(f"--tp {given.tp} must divide the 16 heads")
    bloom = given.family == "bloom"
    model = ModelConfig(
        num_layers=given.num_layers,
        hidden_size=given.hidden_size,
        num_heads=16,
        position_embedding="alibi" if bloom else "learned",
        embed_layernorm=bloom,
        vocab_size=50_000,
        make_vocab_size_divisible_by=64,
    )
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        source = folder / "run" / "global_step3"
        write_checkpoint(source, config_of(model), tp_size=given.tp, dtype=torch.bfloat16)
        size = sum(file.stat().st_size for file in source.glob("layer_*"))
        print(
            f"checkpoint of {size / 1e6:,.0f} MB in bf16, tp {given.tp}, {given.num_layers} layers, as {given.family}"
        )
        sides: dict[str, Callable[[Path], object]] = {
            "copy": lambda target: copy(source, target),
            "export": lambda target: export_checkpoint(source, target, dtype=given.dtype),
            "tool": lambda target: export_checkpoint(find_checkpoint(source), target, dtype=given.dtype),
        }
        found: dict[str, list[float]] = {side: [] for side in sides}
        for repeat in range(given.repeats + 1):
            # Every side follows every other one: pages that a side frees are cheap for the next.
            order = list(sides.items())[repeat % 3 :] + list(sides.items())[: repeat % 3]
            for side, action in order if repeat % 2 else reversed(order):
                target = folder / side
                wait_for_idle(given.wait_for_idle)
                elapsed = seconds_of(lambda action=action, target=target: action(target), target)
                if repeat:  # the first fills the page cache
                    found[side].append(elapsed)
    labels = {"copy": "cp and fsync", "export": "export", "tool": "export with verification of what it reads"}
    base = statistics.median(found["copy"])
    for side, times in found.items():
        median, best = statistics.median(times), min(times)
        print(
            f"{labels[side]:<42} {size / median / 1e6:7.0f} MB/s  ({best:.2f} to {max(times):.2f} s, median "
            f"{median:.2f} s; {base / median:.2f} of the copy's speed, {min(found['copy']) / best:.2f} at best)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
