#!/usr/bin/env python
"""Time to read one sample of 2,049 tokens, from long and from short documents: `python benchmarks/data/samples.py`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from megalm.data.gpt_dataset import GPTDataset
from megalm.data.indexed import IndexedDataset
from megalm.data.indexed_writer import IndexedWriter

TOKENS = 50_000_000
SAMPLES = 5_000


def corpus(prefix: Path, mean_length: int) -> IndexedDataset:
    """A corpus of random ids whose documents have exponential lengths."""
    draw = np.random.default_rng(0)
    lengths = np.maximum(1, draw.exponential(mean_length, TOKENS // mean_length)).astype(np.int64)
    with IndexedWriter(prefix, "u2") as writer:
        ids = draw.integers(0, 50_000, int(lengths.sum()), dtype=np.uint16)
        writer.add_packed(ids, lengths, np.ones(len(lengths), np.int64))
    return IndexedDataset(prefix)


def main() -> None:
    """Print the median, the 90th percentile and the mean processor time of random samples."""
    with tempfile.TemporaryDirectory() as folder:
        for name, mean_length in (("long documents, 20,000 tokens", 20_000), ("short documents, 450 tokens", 450)):
            indexed = corpus(Path(folder) / str(mean_length), mean_length)
            dataset = GPTDataset(
                indexed,
                (0, indexed.num_sequences),
                seq_length=2048,
                num_samples=20_000,
                seed=1,
                vocab_size=50_000,
            )
            numbers = np.random.default_rng(1).integers(0, len(dataset), SAMPLES).tolist()
            for i in numbers:
                dataset[i]
            times = []
            processor = time.process_time()
            for i in numbers:
                started = time.perf_counter_ns()
                dataset[i]
                times.append(time.perf_counter_ns() - started)
            processor = (time.process_time() - processor) / len(numbers) * 1e6
            median, ninety = np.median(times) / 1e3, np.percentile(times, 90) / 1e3
            print(f"{name}: median {median:.1f} us, 90 % below {ninety:.1f} us, processor time {processor:.1f} us")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
