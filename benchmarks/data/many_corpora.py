#!/usr/bin/env python
"""Seconds to open a blend of 2,000 corpora and to build its order: `python benchmarks/data/many_corpora.py`.

In a process that may have 256 files open. The first time builds and stores 2,000 sample maps, the second reads them.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from megalm.config.data import DataConfig
from megalm.data.blend import largest_deficit, normalised
from megalm.data.build import build_datasets
from megalm.data.indexed_writer import IndexedWriter

DOCUMENTS = 300


def write_corpora(folder: Path, count: int) -> list[str]:
    """Corpora of 450-token documents; their content is that of one in all, which changes nothing here."""
    draw = np.random.default_rng(0)
    with IndexedWriter(folder / "c0", "u2") as writer:
        lengths = np.maximum(1, draw.exponential(450, DOCUMENTS)).astype(np.int64)
        ids = draw.integers(0, 50_000, int(lengths.sum()), dtype=np.uint16)
        writer.add_packed(ids, lengths, np.ones(DOCUMENTS, np.int64))
    for number in range(1, count):
        for suffix in (".bin", ".idx", ".meta.json"):
            shutil.copyfile(folder / f"c0{suffix}", folder / f"c{number}{suffix}")
    return [str(folder / f"c{number}") for number in range(count)]


def main() -> None:
    """Print the seconds of each part."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--corpora", type=int, default=2_000)
    parser.add_argument("--samples", type=int, default=1_000_000)
    options = parser.parse_args()
    if min(options.corpora, options.samples) < 1:
        parser.error("--corpora and --samples must be at least 1")
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    weights = np.random.default_rng(0).lognormal(0, 1, options.corpora).tolist()
    with tempfile.TemporaryDirectory() as folder:
        names = write_corpora(Path(folder), options.corpora)
        words = tuple(word for pair in zip(map(str, weights), names, strict=True) for word in pair)
        data = DataConfig(data_path=words, seq_length=2048, split="1,0,0")
        for what in ("opened, maps built and stored", "opened, maps read"):
            started, used = time.perf_counter(), time.process_time()
            built = build_datasets(data, num_samples={"train": options.samples}, seed=1)
            print(
                f"{options.corpora:,} corpora {what}, order of {options.samples:,} samples: "
                f"{time.perf_counter() - started:.1f} s, {time.process_time() - used:.1f} s of the processor; "
                f"{len(os.listdir('/proc/self/fd'))} files open",
                flush=True,
            )
        started = time.perf_counter()
        largest_deficit(normalised(weights), options.samples)
        print(f"the order alone, which the first time computes: {time.perf_counter() - started:.1f} s")
        assert built.train is not None
        read = np.random.default_rng(1).integers(0, len(built.train), 5_000).tolist()
        started = time.perf_counter()
        for number in read:
            built.train[number]
        print(f"one random sample: {(time.perf_counter() - started) / len(read) * 1e6:.0f} us")
        print("\n".join(built.report))


if __name__ == "__main__":
    main()
