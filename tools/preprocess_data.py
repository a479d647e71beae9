#!/usr/bin/env python
"""Tokenize text files into a corpus that the trainer reads: PREFIX_KEY_document.bin, .idx and .meta.json."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalm.errors import DataError, MegalmError

TOKENIZER_TYPES = {
    "pretrainedfromhf": "PretrainedFromHF",
    "huggingfacetokenizer": "PretrainedFromHF",
    "gpt2bpetokenizer": "GPT2BPETokenizer",
    "sentencepiecetokenizer": "SentencePieceTokenizer",
    "nulltokenizer": "NullTokenizer",
}


def parser() -> argparse.ArgumentParser:
    """The command line; names follow BigScience's and Megatron's tools."""
    result = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    group = result.add_argument_group("input")
    group.add_argument("--input", nargs="+", required=True, help="files, folders or patterns: .jsonl, .json, .txt; .gz")
    group.add_argument("--json-keys", nargs="+", default=["text"], help="keys to tokenize, a corpus each (text)")
    group.add_argument(
        "--on-bad-line", choices=("error", "skip"), default="error", help="stop, or count and list (error)"
    )
    group.add_argument("--max-line-bytes", type=int, default=1 << 30, help="longest line that is a document (2^30)")
    group = result.add_argument_group("tokenizer")
    group.add_argument(
        "--tokenizer-type", default="PretrainedFromHF", help="PretrainedFromHF (default), GPT2BPETokenizer, ..."
    )
    group.add_argument("--tokenizer-name-or-path", "--tokenizer-model", help="folder, tokenizer.json or .model file")
    group.add_argument("--vocab-file", help="GPT2BPETokenizer: vocab.json")
    group.add_argument("--merge-file", help="GPT2BPETokenizer: merges.txt")
    group.add_argument("--vocab-size", type=int, help="NullTokenizer: number of ids")
    group.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    group.add_argument("--encoder", choices=("auto", "exact"), default="auto", help="exact never uses tiktoken (auto)")
    group = result.add_argument_group("output")
    group.add_argument("--output-prefix", required=True, help="path before _KEY_document")
    group.add_argument("--overwrite", action="store_true", help="replace a corpus of that name")
    group.add_argument("--resume", action="store_true", help="go on where a killed run stopped")
    group.add_argument("--dataset-impl", choices=("mmap",), default="mmap", help="the one format there is")
    group = result.add_argument_group("work")
    group.add_argument("--workers", type=int, default=1, help="processes that tokenize (1)")
    group.add_argument("--block-bytes", "--chunk-size", type=int, default=1 << 20, help="text of one task (2^20)")
    group.add_argument("--log-interval", type=int, help="documents between progress lines; every 5 s when not given")
    return result


def run(options: argparse.Namespace) -> None:
    """Read the tokenizer, choose its encoder, tokenize."""
    from megalm.data.encoding import Recipe
    from megalm.data.indexed import best_dtype
    from megalm.data.inputs import find_sources
    from megalm.data.peek import first_texts
    from megalm.data.preprocess import Job, preprocess
    from megalm.data.progress_line import ProgressLine, describe
    from megalm.tokenizers.build import open_tokenizer
    from megalm.tokenizers.fast import choose_encoder

    if options.workers < 0 or options.block_bytes < 1:
        raise DataError(f"--workers {options.workers} and --block-bytes {options.block_bytes} must not be negative")
    kind = TOKENIZER_TYPES.get(options.tokenizer_type.lower(), options.tokenizer_type)
    tokenizer = open_tokenizer(
        kind,
        path=options.tokenizer_name_or_path,
        vocab_file=options.vocab_file,
        merge_file=options.merge_file,
        vocab_size=options.vocab_size,
    )
    if options.append_eod and tokenizer.eod_id is None:
        raise DataError(f"--append-eod: {tokenizer.name} names no end-of-document token\n  set eos_token in its files")
    sources = find_sources(options.input)
    keys = tuple(options.json_keys)
    encoder = choose_encoder(tokenizer, first_texts(sources, keys), requested=options.encoder)
    say(f"{tokenizer.name}, {tokenizer.vocab_size} ids; encoder {encoder.engine}: {encoder.reason}")
    job = Job(
        sources,
        options.output_prefix,
        Recipe(
            encode=encoder.encode,
            vocab_size=tokenizer.vocab_size,
            dtype=best_dtype(tokenizer.vocab_size),
            keys=keys,
            eod_id=tokenizer.eod_id if options.append_eod else None,
            splittable=encoder.splittable,
        ),
        workers=options.workers,
        block_bytes=options.block_bytes,
        max_line_bytes=options.max_line_bytes,
        overwrite=options.overwrite,
        resume=options.resume,
        skip_bad_lines=options.on_bad_line == "skip",
        about={
            "tokenizer": {"type": kind, "digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size},
            "append_eod": options.append_eod,
        },
    )
    line = ProgressLine(sys.stderr, every_documents=options.log_interval)
    try:
        done = preprocess(job, report=line)
    finally:
        line.close()
    say(describe(done))
    for key in keys:
        say(f"wrote {job.corpus_prefix(key)}.bin: {done.documents:,} documents, {done.tokens:,} tokens")
    if done.skipped:
        say(f"{done.skipped} lines were skipped; {options.output_prefix}.bad_lines.jsonl lists them")


def say(text: str) -> None:
    """One line of the log."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """Run the tool and return its exit code."""
    options = parser().parse_args(arguments)
    try:
        run(options)
    except MegalmError as error:
        say(f"{type(error).__name__}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted; --resume goes on from the last journal")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
