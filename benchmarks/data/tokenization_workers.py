#!/usr/bin/env python
"""How tokenization grows with workers, and at how many the parent would become the bottleneck.

    python benchmarks/data/tokenization_workers.py --input corpus.jsonl --tokenizer FOLDER

Each number of workers runs several times by turns; the best wall time counts, since other work on the machine only
adds. `--quiet` waits before each run until the machine is idle. Processor time of the parent is split into its start,
taken from a run on the first lines of the input, and what it spends on each megabyte. `--limit` measures the parent
alone: its workers answer at once with the ids of a typical block.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

RUN = """
import json, resource, sys, time
started = time.perf_counter()
sys.path.insert(0, sys.argv[1])
import preprocess_data
code = preprocess_data.main(sys.argv[2:])
wall = time.perf_counter() - started
own, workers = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"wall": wall, "parent": own.ru_utime + own.ru_stime, "workers": workers.ru_utime + workers.ru_stime,
                  "parent_mb": own.ru_maxrss / 1e3, "worker_mb": workers.ru_maxrss / 1e3}))
sys.exit(code)
"""


@dataclass(frozen=True)
class Run:
    """Seconds and, for the largest, megabytes of one run."""

    wall: float
    parent: float
    workers: float
    parent_mb: float
    worker_mb: float


def run(source: Path, tokenizer: str, output: Path, workers: int) -> Run:
    """tools/preprocess_data.py in a process of its own."""
    arguments = ["--input", str(source), "--tokenizer-name-or-path", tokenizer, "--append-eod", "--overwrite"]
    arguments += ["--workers", str(workers), "--output-prefix", str(output)]
    command = [sys.executable, "-c", RUN, str(ROOT / "tools"), *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def wait_until_idle(seconds: float) -> None:
    """Return when the processors have been idle for nine tenths of three seconds, or after `seconds`."""
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        before = idle_and_total()
        time.sleep(3)
        after = idle_and_total()
        if after[0] - before[0] > 0.9 * (after[1] - before[1]):
            return


def idle_and_total() -> tuple[int, int]:
    """Ticks of all processors since the machine started."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def limit(source: Path, output: Path, workers: int) -> None:
    """Print what the parent does when its workers take no time."""
    sys.path.insert(0, str(ROOT))
    import numpy as np

    import megalm.data.workers
    from megalm.data.encoding import Encoded, Packed, Recipe
    from megalm.data.inputs import find_sources
    from megalm.data.preprocess import Job, preprocess

    tokens = (np.arange(266_000) % 32_000).astype("u2")
    lengths, sentences = np.full(70, 3_800, np.int32), np.ones(70, np.int32)

    def answer(block: object, recipe: object) -> Encoded:
        return Encoded({"text": Packed(tokens.copy(), lengths, sentences)}, num_documents=70)

    megalm.data.workers.encode_block = answer  # type: ignore[assignment]
    sources = find_sources([str(source)])
    megabytes = sum(found.size_bytes for found in sources) / 1e6
    recipe = Recipe(encode=lambda text: [], vocab_size=32_000, dtype=np.dtype("u2"))
    wall, processor = time.perf_counter(), time.process_time()
    preprocess(Job(sources, str(output), recipe, workers=workers, overwrite=True))
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    rate = f"{megabytes / wall:.0f} MB/s, {1e3 * processor / megabytes:.2f} ms of the parent's processor for a MB"
    print(f"{workers} workers that take no time: {rate}")


def main() -> None:
    """Run, and print a line for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="jsonl file")
    parser.add_argument("--tokenizer", help="Hugging Face folder")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="processes (1 2)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each (5)")
    parser.add_argument("--quiet", type=float, default=0.0, help="seconds to wait for an idle machine before each run")
    parser.add_argument("--limit", action="store_true", help="measure the parent alone; --input may be a folder")
    options = parser.parse_args()
    if not options.input.exists():
        parser.error(f"--input {options.input} does not exist")
    if options.tokenizer is None and not options.limit:
        parser.error("--tokenizer is needed without --limit")
    if options.limit:
        with tempfile.TemporaryDirectory() as folder:
            for workers in options.workers:
                limit(options.input, Path(folder) / "out", workers)
        return
    megabytes = options.input.stat().st_size / 1e6
    best: dict[int, list[Run]] = {workers: [] for workers in options.workers}
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start.jsonl"
        with options.input.open("rb") as file:
            start.write_bytes(b"".join(islice(file, 8)))
        begin = min(run(start, options.tokenizer, Path(folder) / "out", 1).parent for _ in range(3))
        for _ in range(options.repeats):
            for workers, runs in best.items():
                wait_until_idle(options.quiet)
                runs.append(run(options.input, options.tokenizer, Path(folder) / "out", workers))
                print(f"{workers} workers: {runs[-1].wall:.2f} s", file=sys.stderr, flush=True)
    report(best, begin, megabytes)


def report(best: dict[int, list[Run]], begin: float, megabytes: float) -> None:
    """A paragraph for each number of workers."""
    first = None
    for workers, runs in best.items():
        wall = min(found.wall for found in runs)
        first = first or wall
        parent = 1e3 * (min(found.parent for found in runs) - begin) / megabytes
        each = 1e3 * min(found.workers for found in runs) / megabytes
        print(f"{workers} workers: {megabytes / wall:.1f} MB/s, {first / wall:.2f} times the first")
        print(f"  processor time for a MB: parent {parent:.2f} ms, workers {each:.1f} ms")
        print(f"  one core of the parent feeds {each / parent:.0f} workers")
        print(
            f"  at most {max(r.parent_mb for r in runs):.0f} MB parent, {max(r.worker_mb for r in runs):.0f} MB worker"
        )
    print(f"start {begin:.2f} s of the parent's processor; {megabytes:.0f} MB; {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
