#!/usr/bin/env python
"""Write a Hugging Face Bloom or GPT-2 folder as a checkpoint that pretrain_gpt.py continues from, at any layout."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalm.program import program


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    result.add_argument("--model", type=Path, required=True, help="Hugging Face folder: config.json and weights")
    result.add_argument("--save", type=Path, required=True, help="folder to write; it must be empty or not exist")
    result.add_argument("--tensor-model-parallel-size", type=int, default=1, help="shards of each layer (default: 1)")
    result.add_argument("--pipeline-model-parallel-size", type=int, default=1, help="stages to note (default: 1)")
    result.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: the folder's")
    return result


@program
def main(arguments: list[str]) -> int:
    """Run the tool and return its exit code."""
    options = parser().parse_args(arguments)
    started = time.perf_counter()
    from megalm.checkpoint.byte_line import ByteLine
    from megalm.checkpoint.importing import import_folder

    line = ByteLine(sys.stderr, "importing")
    result = import_folder(
        options.model,
        options.save,
        tp_size=options.tensor_model_parallel_size,
        pp_size=options.pipeline_model_parallel_size,
        dtype=options.dtype,
        progress=lambda name, count, total: line(count, total, name),
    )
    line.close()
    print(
        f"{options.model} -> {result.path}: {result.family}, {result.num_parameters:,} parameters, "
        f"{time.perf_counter() - started:.1f} s\n"
        f"continue with: pretrain_gpt.py --config {result.preset} --load {options.save} --finetune ..."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
