#!/usr/bin/env python
"""Speed of preprocessing against the ways of other tools, in one run on one input.

    python benchmarks/data/tokenization.py --input corpus.jsonl --tokenizer FOLDER

The peer named "imap" works as BigScience's preprocess_data.py does: a pool of processes, `imap` over lines in chunks of
25, transformers' tokenizer on each document, a tensor for each document in the parent, which writes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

TOKENIZER: list[Any] = []


def start_peer(folder: str) -> None:
    """Each process of the peer reads its own tokenizer."""
    from transformers import AutoTokenizer

    TOKENIZER[:] = [AutoTokenizer.from_pretrained(folder)]


def encode_line(line: str) -> list[int]:
    """One document, as the peer does it."""
    tokenizer = TOKENIZER[0]
    ids: list[int] = tokenizer.encode(json.loads(line)["text"])
    if ids:
        ids.append(tokenizer.eos_token_id)
    return ids


def run_imap(source: Path, tokenizer: str, output: Path, workers: int) -> None:
    """The way of BigScience's tool."""
    import numpy as np
    import torch

    with (
        source.open(encoding="utf-8") as lines,
        output.open("wb") as out,
        multiprocessing.Pool(workers, start_peer, (tokenizer,)) as pool,
    ):
        for ids in pool.imap(encode_line, lines, 25):
            out.write(np.array(torch.IntTensor(ids).numpy(), dtype=np.uint16).tobytes(order="C"))


def run_batches(source: Path, tokenizer: str, output: Path, workers: int) -> None:
    """The `tokenizers` library on batches of 256 documents, with its own threads."""
    import numpy as np

    from megalm.tokenizers.huggingface import HuggingFaceTokenizer

    os.environ.update(RAYON_NUM_THREADS=str(workers), TOKENIZERS_PARALLELISM="true")
    found = HuggingFaceTokenizer(tokenizer)
    with source.open(encoding="utf-8") as lines, output.open("wb") as out:
        for batch in batches(lines, 256):
            for ids in found.encode_batch([json.loads(line)["text"] for line in batch]):
                out.write(np.array([*ids, found.eod_id], np.uint16).tobytes())


def batches(lines: Iterator[str], size: int) -> Iterator[list[str]]:
    """Lists of `size` lines."""
    batch = []
    for line in lines:
        batch.append(line)
        if len(batch) == size:
            yield batch
            batch = []
    yield batch


def run_ours(source: Path, tokenizer: str, output: Path, workers: int) -> None:
    """tools/preprocess_data.py, a process of its own."""
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(source)]
    command += ["--tokenizer-name-or-path", tokenizer, "--append-eod", "--workers", str(workers)]
    subprocess.run([*command, "--output-prefix", str(output)], check=True, capture_output=True)
    os.rename(f"{output}_text_document.bin", output)


@contextmanager
def timed(name: str, size: int) -> Iterator[None]:
    """Print wall and processor time of the block, children included."""
    wall, processor = time.perf_counter(), sum(os.times()[:4])
    yield
    wall, processor = time.perf_counter() - wall, sum(os.times()[:4]) - processor
    print(f"{name:34} {size / wall / 1e6:6.2f} MB/s   {wall:6.2f} s, {processor:6.2f} s of processors", flush=True)


def main() -> None:
    """Run every way, with one and two processes, and compare the bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="jsonl file")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face folder")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="processes (1 2)")
    options = parser.parse_args()
    for name, path in (("--input", options.input), ("--tokenizer", Path(options.tokenizer))):
        if not path.exists():
            parser.error(f"{name} {path} does not exist")
    size = options.input.stat().st_size
    ways: dict[str, Callable[[Path, str, Path, int], None]] = {
        "imap, as BigScience": run_imap,
        "tokenizers, encode_batch": run_batches,
        "tools/preprocess_data.py": run_ours,
    }
    with tempfile.TemporaryDirectory() as folder:
        contents = set()
        for workers in options.workers:
            for name, way in ways.items():
                output = Path(folder) / f"{len(list(Path(folder).iterdir()))}.bin"
                with timed(f"{name}, {workers} workers", size):
                    process = multiprocessing.get_context("fork").Process(
                        target=way, args=(options.input, options.tokenizer, output, workers)
                    )
                    process.start()
                    process.join()
                    if process.exitcode != 0:
                        raise SystemExit(f"{name} failed; its trace is above")
                contents.add(output.read_bytes())
        print("all outputs have the same ids" if len(contents) == 1 else "THE OUTPUTS DIFFER")


if __name__ == "__main__":
    main()
