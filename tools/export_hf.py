#!/usr/bin/env python
"""Write a checkpoint, of any layout, as a Hugging Face folder: Bloom, or GPT-2 for a model with learned positions."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalm.errors import CheckpointError, ConfigError, DataError
from megalm.program import program

if TYPE_CHECKING:
    from megalm.checkpoint.export import Export
    from megalm.config.root import Config
    from megalm.tokenizers.protocol import Tokenizer


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    result.add_argument("--load", type=Path, required=True, help="folder that a run saved to, or one checkpoint in it")
    result.add_argument("--step", type=int, help="step of the checkpoint; default: the one that `latest` names")
    result.add_argument("--save", type=Path, required=True, help="folder to write; it must not exist")
    result.add_argument("--overwrite", action="store_true", help="replace the folder that --save names")
    result.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: the checkpoint's")
    result.add_argument("--max-shard-size", default="5GB", help="largest weight file, such as 500MB (default: 5GB)")
    result.add_argument("--tokenizer-name-or-path", help="tokenizer to put beside the model; default: the run's")
    result.add_argument("--no-tokenizer", action="store_true", help="write no tokenizer files")
    result.add_argument(
        "--verify",
        action="store_true",
        help="first compare logits, to 1e-5 in fp64, and a greedy continuation with transformers'",
    )
    result.add_argument(
        "--verify-by-layer",
        action="store_true",
        help="compare one layer at a time, as --verify does by itself where two copies do not fit in memory",
    )
    result.add_argument("--verify-text", help="text to compare on; default: the end of the run's corpus")
    return result


def run(options: argparse.Namespace) -> None:
    """Find, check, export, prove, publish."""
    from megalm.checkpoint.byte_line import ByteLine
    from megalm.checkpoint.export import export_checkpoint
    from megalm.checkpoint.find import find_checkpoint
    from megalm.checkpoint.identity import read_config

    if options.no_tokenizer and options.tokenizer_name_or_path is not None:
        raise ConfigError("--no-tokenizer excludes --tokenizer-name-or-path\n  keep one of them")
    if options.verify_text is not None and not (options.verify or options.verify_by_layer):
        raise ConfigError("--verify-text is what --verify and --verify-by-layer compare on\n  pass one of them too")
    started = time.perf_counter()
    max_shard_bytes = shard_bytes(options.max_shard_size)
    verifying, writing = ByteLine(sys.stderr, "verifying"), ByteLine(sys.stderr, "writing")
    checkpoint = find_checkpoint(options.load, step=options.step, warn=warn, progress=verifying)
    verifying.close()
    config = read_config(checkpoint)
    tokenizer = tokenizer_to_write(options, checkpoint, config)

    def save_tokenizer(folder: Path) -> int | None:
        assert tokenizer is not None
        tokenizer.save_pretrained(folder)
        return tokenizer.eod_id

    def prove_written(export: Export) -> None:
        writing.close()
        prove(options, export, checkpoint, config, tokenizer)

    export = export_checkpoint(
        checkpoint,
        options.save,
        dtype=options.dtype,
        max_shard_bytes=max_shard_bytes,
        save_tokenizer=save_tokenizer if tokenizer is not None else None,
        seq_length=config.data.seq_length if config is not None else None,
        prove=prove_written if options.verify or options.verify_by_layer else None,
        overwrite=options.overwrite,
        progress=lambda name, count, total: writing(count, total, name),
    )
    for name, size in export.drift.items():
        warn(f"copies of {name} differed by up to {size:.2e} from their mean, which was exported")
    writing.close()
    elapsed = time.perf_counter() - started
    num_files = sum(1 for file in export.files if file.name.endswith(".safetensors"))
    print(
        f"{checkpoint} -> {export.folder}: {export.family}, {export.num_bytes / 1e6:.1f} MB of weights in "
        f"{num_files} file{'' if num_files == 1 else 's'}, {elapsed:.1f} s"
    )


def shard_bytes(size: str) -> int:
    """What --max-shard-size says. Raises: CheckpointError if it is no size, or has no room for a weight."""
    from megalm.checkpoint.export import parse_size

    try:
        max_shard_bytes = parse_size(size)
        if max_shard_bytes < 1:
            raise ValueError("no room for a weight")
    except (ValueError, OverflowError) as error:
        raise CheckpointError(f"--max-shard-size {size}: give a size such as 5GB") from error
    return max_shard_bytes


def tokenizer_to_write(options: argparse.Namespace, checkpoint: Path, config: Config | None) -> Tokenizer | None:
    """The tokenizer that goes beside the model, if one is wanted and known. Raises: DataError if it cannot be read."""
    from megalm.checkpoint.run_tokenizer import tokenizer_of_run
    from megalm.checkpoint.source import open_checkpoint

    given = options.tokenizer_name_or_path
    if options.no_tokenizer:
        return None
    try:
        tokenizer = tokenizer_of_run(open_checkpoint(checkpoint), config, given=given, warn=warn)
    except DataError as error:
        if given is not None:
            raise
        raise DataError(f"{error}\n  or give --tokenizer-name-or-path, or --no-tokenizer") from error
    if tokenizer is None:
        warn(f"no tokenizer is written: {checkpoint} names none; --tokenizer-name-or-path FOLDER adds one")
    return tokenizer


def prove(
    options: argparse.Namespace, export: Export, checkpoint: Path, config: Config | None, tokenizer: Tokenizer | None
) -> None:
    """Compare what was written with the checkpoint, on real tokens. Raises: CheckpointError if they differ."""
    from megalm.checkpoint.proof import prove_export
    from megalm.checkpoint.proof_by_layer import fits_in_memory, prove_by_layer
    from megalm.checkpoint.proof_tokens import real_tokens
    from megalm.models.gpt.weights import weight_table

    length = min(config.data.seq_length if config is not None else 128, export.shape.num_positions or 256, 256)
    tokens = real_tokens(
        config.data if config is not None else None,
        tokenizer,
        num_samples=4,
        length=length,
        text=options.verify_text,
    )
    num_parameters = sum(weight.numel for weight in weight_table(export.shape))
    if options.verify_by_layer or not fits_in_memory(num_parameters):
        print(f"verified: {prove_by_layer(export.folder, checkpoint, tokens=tokens[:1], dtype=export.dtype)}")
        return
    vocab_size = tokenizer.vocab_size if tokenizer is not None else export.shape.vocab_rows
    proof = prove_export(export.folder, checkpoint, tokens=tokens, vocab_size=vocab_size, dtype=export.dtype)
    print(f"verified: {proof}")
    if tokenizer is not None:
        prompt, continued = proof.theirs[: proof.num_prompt], proof.theirs[proof.num_prompt :]
        print(f"  {tokenizer.decode(prompt)[-60:]!r} continues {tokenizer.decode(continued)!r}")


def warn(message: str) -> None:
    """Print a warning."""
    print(f"warning: {message}", file=sys.stderr)


@program
def main(arguments: list[str]) -> int:
    """Run the tool and return its exit code."""
    options = parser().parse_args(arguments)
    run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
