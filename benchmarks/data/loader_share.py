#!/usr/bin/env python
"""What of the default CPU run's steps goes into waiting for data: `python benchmarks/data/loader_share.py`.

The default run is configs/debug/tiny.yaml on one process, as pretrain_gpt.py trains it, with 0, 1 and 2 threads that
read ahead; the corpus is documents of 450 tokens on average, where a sample is made of many pieces.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from megalm.data.indexed_writer import IndexedWriter
from megalm.telemetry.metric_log import read_metric_log

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
VOCAB_SIZE = 4096


def corpus(folder: Path) -> str:
    """20,000 documents of random ids."""
    draw = np.random.default_rng(0)
    lengths = np.maximum(1, draw.exponential(450, 20_000)).astype(np.int64)
    with IndexedWriter(folder / "corpus", "u2") as writer:
        ids = draw.integers(0, VOCAB_SIZE, int(lengths.sum()), dtype=np.uint16)
        writer.add_packed(ids, lengths, np.ones(len(lengths), np.int64))
    return str(folder / "corpus")


def train(prefix: str, folder: Path, *, num_workers: int) -> tuple[float, float]:
    """Seconds in steps and seconds of them waiting for data, without the first step, which warms up."""
    metrics = folder / f"metrics{num_workers}.jsonl"
    command = [
        *(sys.executable, str(ROOT / "pretrain_gpt.py"), "--config", str(ROOT / "configs/debug/tiny.yaml")),
        *("--data-path", prefix, "--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB_SIZE)),
        *("--train-iters", str(STEPS), "--eval-interval", "0", "--num-workers", str(num_workers)),
        *("--metrics-path", str(metrics)),
    ]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stdout + done.stderr)
    steps = [record for record in read_metric_log(metrics) if record["kind"] == "train"][1:]
    return sum(step["step_seconds"] for step in steps), sum(step["data_seconds"] for step in steps)


def main() -> None:
    """Print the share for each number of threads."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = corpus(Path(folder))
        for num_workers in (0, 1, 2):
            seconds, waited = train(prefix, Path(folder), num_workers=num_workers)
            print(
                f"{num_workers} threads: {seconds:.2f} s in {STEPS - 1} steps, {waited * 1e3:.1f} ms waiting for data: "
                f"{waited / seconds:.3%}",
                flush=True,
            )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
