#!/usr/bin/env python
"""Seconds to build the sample maps of 10 M documents, 5 B tokens and 3 M samples."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from megalm.data.map_cache import cached_sample_map
from megalm.data.order import ORDERS
from megalm.data.sample_map import build_sample_map

DOCUMENTS = 10_000_000
SAMPLES = 3_000_000


def main() -> None:
    """Print the best of three for each order, and the time with writing and checking the cache."""
    draw = np.random.default_rng(0)
    lengths = np.maximum(1, draw.exponential(500, DOCUMENTS)).astype(np.int32)
    print(f"{DOCUMENTS:,} documents, {int(lengths.sum(dtype=np.int64)):,} tokens, {SAMPLES:,} samples")
    for seq_length in (1024, 2048):
        for name, order in ORDERS.items():
            wall, processor = [], []
            for _ in range(3):
                started, used = time.perf_counter(), time.process_time()
                found = build_sample_map(
                    lengths, (0, DOCUMENTS), num_samples=SAMPLES, seq_length=seq_length, seed=1, order=order
                )
                wall.append(time.perf_counter() - started)
                processor.append(time.process_time() - used)
            epochs = len(found.documents) // DOCUMENTS
            print(
                f"samples of {seq_length}, {epochs} epochs, order {name}: "
                f"{min(wall):.2f} s, {min(processor):.2f} s of the processor",
                flush=True,
            )
    with tempfile.TemporaryDirectory() as folder:
        for what in ("building, writing and reading the cache", "reading the cache"):
            started = time.perf_counter()
            cached_sample_map(
                f"{folder}/corpus",
                "train",
                lengths,
                (0, DOCUMENTS),
                num_samples=SAMPLES,
                seq_length=2048,
                seed=1,
                order=ORDERS["bigscience"],
            )
            print(f"samples of 2048, {what}: {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
