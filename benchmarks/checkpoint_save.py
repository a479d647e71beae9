#!/usr/bin/env python
"""How long a step waits for a save, synchronous and in the background, and what hashing costs a load.

    python benchmarks/checkpoint_save.py [--hidden-size 192] [--num-layers 4] [--tp 2] [--pp 2]

Prints one line a figure: medians over --repeats saves of the same run on this machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.ranks import run_ranks


def measure(folder: str, options: dict[str, Any], repeats: int) -> dict[str, list[float]]:
    """On one rank: seconds of each kind, a value a repetition."""
    from megalm.checkpoint.background import BackgroundSaver
    from megalm.checkpoint.find import find_checkpoint
    from megalm.checkpoint.manifest import read_manifest, verify
    from megalm.checkpoint.save import save_checkpoint
    from tests.support.training import TinyRun, tiny_config

    config = tiny_config(**options)
    run = TinyRun(config)
    run.train(0, 1)
    raw, topology = run.engine.raw, run.topology
    figures = ("sync", "stall", "background", "hash", "load", "bytes", "step")
    found: dict[str, list[float]] = {name: [] for name in figures}
    saver = BackgroundSaver(topology, keep_last=1)
    for repeat in range(repeats):
        report = save_checkpoint(raw, f"{folder}/sync", {"step": repeat}, config=config, topology=topology, keep_last=1)
        found["sync"].append(report.stall_seconds)
        found["bytes"].append(report.num_bytes)
        started = time.monotonic()
        assert not verify(report.path, read_manifest(report.path), num_threads=1)
        found["hash"].append(time.monotonic() - started)
        topology.barrier()
        find_checkpoint(report.path, world=topology.world, verified=lambda cost: found["load"].append(cost.seconds))
        topology.barrier()
        saver.start(raw, f"{folder}/background", {"step": repeat}, config=config)
        done, step = None, 1
        while done is None:
            started = time.monotonic()
            run.train(step, step + 1)
            found["step"].append(time.monotonic() - started)
            done, step = saver.poll(), step + 1
        found["stall"].append(done.stall_seconds)
        found["background"].append(done.elapsed_seconds)
    return found


def main(arguments: list[str]) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden-size", 192), ("num-layers", 4), ("vocab-size", 4096), ("tp", 2), ("pp", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", help="where to save; default: a temporary folder")
    given = parser.parse_args(arguments)
    if min(given.repeats, given.tp, given.pp, given.num_layers, given.hidden_size) < 1:
        parser.error("sizes and --repeats must be at least 1")
    options = {name: getattr(given, name) for name in ("hidden_size", "num_layers", "vocab_size", "tp", "pp")}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        found = run_ranks(measure, given.tp * given.pp, folder, options, given.repeats, timeout=900.0)[0]
    median = {name: statistics.median(values) for name, values in found.items()}
    megabytes = median["bytes"] / 1e6
    print(f"checkpoint of {megabytes:.1f} MB, {given.tp * given.pp} processes, medians of {given.repeats}")
    print(f"synchronous: the step waits {median['sync']:.3f} s ({megabytes / median['sync']:.0f} MB/s to the disk)")
    share = 100 * median["stall"] / median["sync"]
    print(
        f"background:  the step waits {median['stall']:.3f} s, {share:.0f} % of that; published after "
        f"{median['background']:.3f} s, during steps of {median['step']:.3f} s"
    )
    print(
        f"verifying hashes: {1000 * median['hash'] / megabytes:.2f} s a GB in one thread of every process, "
        f"{1000 * median['load'] / megabytes:.2f} s a GB shared as a load does"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
