#!/usr/bin/env python
"""Tokenize text files into a corpus that the trainer reads: PREFIX_KEY_document.bin, .idx and .meta.json."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalm.data.preprocess_flags import add_foreign_flags, notices, stored_vocab_size, tokenizer_type
from megalm.errors import ConfigError, DataError
from megalm.program import EXIT_INTERRUPTED, program

MOST_WORKERS = 1024

if TYPE_CHECKING:
    from megalm.data.partition import Partition
    from megalm.data.preprocess import Job
    from megalm.data.sentences import SentenceSplitter
    from megalm.tokenizers.protocol import Tokenizer


def parser() -> argparse.ArgumentParser:
    """The command line; names follow BigScience's and Megatron's tools."""
    result = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    group = result.add_argument_group("input")
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="files, folders or patterns: .jsonl, .json, .txt, each also with .gz or .zst; .parquet",
    )
    group.add_argument(
        "--json-keys",
        "--json-key",
        "--content-keys",
        dest="json_keys",
        nargs="+",
        default=["text"],
        help="keys or columns to tokenize, a corpus each (text)",
    )
    group.add_argument(
        "--on-bad-line", choices=("error", "skip"), default="error", help="stop, or count and list (error)"
    )
    group.add_argument("--max-line-bytes", type=int, default=1 << 30, help="longest line that is a document (2^30)")
    group.add_argument("--split-sentences", action="store_true", help="a sequence for each sentence of a document")
    group.add_argument(
        "--sentence-splitter",
        choices=("punkt", "rules"),
        default="punkt",
        help="nltk's punkt, which must be installed, or rules that need nothing (punkt)",
    )
    group.add_argument("--keep-newlines", action="store_true", help="keep the white space after a sentence with it")
    group.add_argument(
        "--lang",
        default="english",
        help="language of the sentences; the rules know abbreviations of english alone (english)",
    )
    add_tokenizer_flags(result)
    group = result.add_argument_group("output")
    group.add_argument("--output-prefix", required=True, help="path before _KEY_document")
    group.add_argument("--overwrite", action="store_true", help="replace a corpus of that name")
    group.add_argument(
        "--resume", action="store_true", help="go on where a killed run stopped; nothing to do if it is whole"
    )
    group.add_argument("--dataset-impl", default="mmap", help="the one format there is: mmap")
    group = result.add_argument_group("work")
    group.add_argument("--workers", type=int, default=1, help="processes that tokenize (1)")
    group.add_argument("--partitions", type=int, default=1, help="parts that the input is cut into, for machines (1)")
    group.add_argument(
        "--partition", type=int, help="part to tokenize here, from 0, into PREFIX_PARTITION; all when not given"
    )
    group.add_argument("--block-bytes", type=int, default=1 << 20, help="text of one task (2^20)")
    group.add_argument("--log-interval", type=int, help="documents between progress lines; every 5 s when not given")
    add_foreign_flags(result)
    return result


def add_tokenizer_flags(result: argparse.ArgumentParser) -> None:
    """Which tokenizer, and how its ids are stored."""
    group = result.add_argument_group("tokenizer")
    group.add_argument(
        "--tokenizer-type",
        help="PretrainedFromHF, GPT2BPETokenizer (default with --vocab-file and --merge-file), ...",
    )
    group.add_argument("--tokenizer-name-or-path", "--tokenizer-model", help="folder, tokenizer.json or .model file")
    group.add_argument("--vocab-file", "--vocab", help="GPT2BPETokenizer: vocab.json")
    group.add_argument("--merge-file", help="GPT2BPETokenizer: merges.txt")
    group.add_argument("--vocab-size", type=int, help="NullTokenizer: number of ids")
    group.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    group.add_argument("--encoder", choices=("auto", "exact"), default="auto", help="exact never uses tiktoken (auto)")
    group.add_argument(
        "--make-vocab-size-divisible-by", type=int, help="choose the width of ids for the vocabulary padded to this"
    )
    group.add_argument("--pad-vocab-size-to", type=int, help="choose the width of ids for a vocabulary of this size")
    group.add_argument("--padded-vocab-size", type=int, help="the same, Megatron's name")


def run(options: argparse.Namespace) -> None:
    """Read the tokenizer, choose its encoder, tokenize."""
    from megalm.data.encoding import Recipe
    from megalm.data.indexed import best_dtype
    from megalm.data.inputs import find_sources
    from megalm.data.peek import first_texts
    from megalm.data.preprocess import Job
    from megalm.tokenizers.fast import choose_encoder
    from megalm.tokenizers.probe import probe_ids

    for notice in notices(options):
        say(notice)
    partition = part_of(options)
    check_keys(options.json_keys)
    tokenizer, kind = read_tokenizer(options)
    splitter = sentence_splitter(options)
    sources = find_sources(options.input)
    keys = tuple(options.json_keys)
    encoder = choose_encoder(tokenizer, first_texts(sources, keys), requested=options.encoder)
    say(f"{tokenizer.name}, {tokenizer.vocab_size} ids; encoder {encoder.engine}: {encoder.reason}")
    about: dict[str, Any] = {
        "tokenizer": {
            "type": kind,
            "digest": tokenizer.digest,
            "vocab_size": tokenizer.vocab_size,
            "probe": probe_ids(tokenizer),
        },
        "append_eod": options.append_eod,
    }
    if splitter is not None:
        about["sentences"] = splitter.about
    recipe = Recipe(
        encode=encoder.encode,
        vocab_size=tokenizer.vocab_size,
        dtype=best_dtype(stored_vocab_size(options, tokenizer.vocab_size)),
        keys=keys,
        eod_id=tokenizer.eod_id if options.append_eod else None,
        split_sentences=None if splitter is None else splitter.split,
        splittable=encoder.splittable,
    )
    prefix = options.output_prefix if partition.count == 1 else f"{options.output_prefix}_{partition.index}"
    tokenize(
        Job(
            sources,
            prefix,
            recipe,
            workers=options.workers,
            block_bytes=options.block_bytes,
            max_line_bytes=options.max_line_bytes,
            overwrite=options.overwrite,
            resume=options.resume,
            skip_bad_lines=options.on_bad_line == "skip",
            about=about,
            flags={name: value for name, value in vars(options).items() if value is not None},
            partition=partition,
        ),
        options.log_interval,
    )


def tokenize(job: Job, log_interval: int | None) -> None:
    """Do the work, unless it is done, and say what was written."""
    from megalm.data.complete import is_complete
    from megalm.data.indexed import IndexedDataset
    from megalm.data.preprocess import preprocess
    from megalm.data.progress_line import ProgressLine, describe

    if job.resume and is_complete(job):
        for key in job.recipe.keys:
            say(f"{job.corpus_prefix(key)}.bin is already complete, of the same sources and settings")
        return
    line = ProgressLine(sys.stderr, every_documents=log_interval)
    try:
        done = preprocess(job, report=line)
    finally:
        line.close()
    say(describe(done))
    for key in job.recipe.keys:
        corpus = IndexedDataset(job.corpus_prefix(key))
        say(f"wrote {job.corpus_prefix(key)}.bin: {corpus.num_documents:,} documents, {corpus.num_tokens:,} tokens")
        if not corpus.num_documents:
            say(f"{job.corpus_prefix(key)}.bin is empty: a run refuses it")
    if done.empty:
        say(f"{done.empty} empty documents were left out")
    if done.skipped:
        say(f"{done.skipped} lines were skipped; {job.output_prefix}.bad_lines.jsonl lists them")


def part_of(options: argparse.Namespace) -> Partition:
    """The part of the input to tokenize here, after checking the numbers that shape the work."""
    from megalm.data.partition import WHOLE, Partition

    if options.workers < 0 or options.block_bytes < 1 or options.max_line_bytes < 1:
        raise DataError(
            f"--workers {options.workers}, --block-bytes {options.block_bytes} and --max-line-bytes "
            f"{options.max_line_bytes} must not be negative, and the sizes not 0"
        )
    if options.workers > MOST_WORKERS:
        raise ConfigError(
            f"--workers {options.workers} must be at most {MOST_WORKERS:,}\n  one for each core is enough"
        )
    if options.log_interval is not None and options.log_interval < 1:
        raise ConfigError(f"--log-interval {options.log_interval} must be at least 1")
    if options.partition is None:
        Partition(0, options.partitions)
        return WHOLE
    return Partition(options.partition, options.partitions)


def check_keys(keys: list[str]) -> None:
    """Refuse keys whose corpora would be one file, or in another folder than their prefix."""
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"--json-keys names {key!r} twice\n  each key has a corpus: give it once")
        if not key or "/" in key or "\0" in key:
            raise ConfigError(f"--json-keys {key!r} cannot be part of a file's name: rename it in the input")


def read_tokenizer(options: argparse.Namespace) -> tuple[Tokenizer, str]:
    """The tokenizer and its type."""
    from megalm.tokenizers.build import open_tokenizer

    two_files = options.vocab_file and options.merge_file and not options.tokenizer_name_or_path
    kind = tokenizer_type(options.tokenizer_type or ("GPT2BPETokenizer" if two_files else "PretrainedFromHF"))
    tokenizer = open_tokenizer(
        kind,
        path=options.tokenizer_name_or_path,
        vocab_file=options.vocab_file,
        merge_file=options.merge_file,
        vocab_size=options.vocab_size,
    )
    if options.append_eod and tokenizer.eod_id is None:
        raise DataError(f"--append-eod: {tokenizer.name} names no end-of-document token\n  set eos_token in its files")
    if kind != "NullTokenizer" and options.vocab_size not in (None, tokenizer.vocab_size):
        raise ConfigError(
            f"--vocab-size {options.vocab_size}: {tokenizer.name} has {tokenizer.vocab_size} ids\n"
            "  leave the flag out; --pad-vocab-size-to chooses the width of stored ids"
        )
    return tokenizer, kind


def sentence_splitter(options: argparse.Namespace) -> SentenceSplitter | None:
    """The splitter that the flags ask for."""
    from megalm.data.sentences import open_splitter

    if options.split_sentences:
        return open_splitter(options.sentence_splitter, language=options.lang, keep_newlines=options.keep_newlines)
    if options.keep_newlines:
        raise ConfigError("--keep-newlines is about the white space between sentences\n  pass --split-sentences too")
    return None


def say(text: str) -> None:
    """One line of the log."""
    print(text, file=sys.stderr, flush=True)


@program
def main(arguments: list[str]) -> int:
    """Run the tool and return its exit code."""
    options = parser().parse_args(arguments)
    try:
        run(options)
    except KeyboardInterrupt:
        say("interrupted; --resume goes on from the last journal")
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
