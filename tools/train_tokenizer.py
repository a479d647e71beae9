#!/usr/bin/env python
"""Train a tokenizer on text files: a byte-level BPE folder (default), or a SentencePiece model."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalm.errors import ConfigError, DataError
from megalm.program import program


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    result.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="files, folders or patterns: .jsonl, .json, .txt, each also with .gz or .zst; .parquet",
    )
    result.add_argument("--json-keys", nargs="+", default=["text"], help="keys that hold text (text)")
    result.add_argument("--output", required=True, help="folder to write; for SentencePiece the .model file")
    result.add_argument("--vocab-size", type=int, required=True, help="ids, the end-of-text mark included")
    result.add_argument(
        "--model-type",
        choices=("byte-bpe", "bpe", "unigram"),
        default="byte-bpe",
        help="byte-bpe: Hugging Face folder (default); bpe, unigram: SentencePiece",
    )
    result.add_argument("--end-of-text", default="<|endoftext|>", help="the token that ends a document (<|endoftext|>)")
    result.add_argument("--min-frequency", type=int, default=2, help="byte-bpe: rarest pair that is merged (2)")
    result.add_argument("--max-documents", type=int, help="train on the first ones only")
    result.add_argument("--on-bad-line", choices=("error", "skip"), default="error", help="stop or skip (error)")
    result.add_argument("--overwrite", action="store_true", help="replace a tokenizer of that name")
    return result


def run(options: argparse.Namespace) -> None:
    """Train and write."""
    import itertools

    from megalm.data.inputs import find_sources
    from megalm.data.peek import iterate_texts
    from megalm.tokenizers.train import train_byte_level_bpe, train_sentencepiece

    prefix = options.output.removesuffix(".model")
    byte_level = options.model_type == "byte-bpe"
    written = Path(options.output) / "tokenizer.json" if byte_level else Path(f"{prefix}.model")
    if written.exists() and not options.overwrite:
        raise DataError(f"{written} exists already\n  choose another --output, or pass --overwrite")
    texts = iterate_texts(find_sources(options.input), options.json_keys, skip_bad_lines=options.on_bad_line == "skip")
    if options.max_documents is not None:
        if options.max_documents < 1:
            raise ConfigError(f"--max-documents {options.max_documents} must be at least 1")
        texts = itertools.islice(texts, options.max_documents)
    started = time.perf_counter()
    if byte_level:
        size = train_byte_level_bpe(
            texts,
            options.output,
            vocab_size=options.vocab_size,
            end_of_text=options.end_of_text,
            min_frequency=options.min_frequency,
        )
    else:
        size = train_sentencepiece(
            texts, prefix, vocab_size=options.vocab_size, model_type=options.model_type, end_of_text=options.end_of_text
        )
    print(f"wrote {written}: {size} ids, {time.perf_counter() - started:.1f} s", file=sys.stderr)
    if size < options.vocab_size:
        print(
            f"the text gives no more than {size} of {options.vocab_size} ids at this --min-frequency", file=sys.stderr
        )


@program
def main(arguments: list[str]) -> int:
    """Run the tool and return its exit code."""
    options = parser().parse_args(arguments)
    run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
