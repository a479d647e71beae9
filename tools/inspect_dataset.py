#!/usr/bin/env python
"""Show what a corpus holds: counts, document lengths as a picture, documents and samples as text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalm.data.indexed import IndexedDataset
from megalm.data.meter import Meter
from megalm.data.statistics import document_lengths, histogram, statistics
from megalm.errors import ConfigError, DataError
from megalm.program import program

if TYPE_CHECKING:
    from megalm.tokenizers.protocol import Tokenizer


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    result.add_argument("prefix", help="corpus prefix: the .bin path without its suffix")
    result.add_argument("--document", type=int, action="append", default=[], help="show this document (repeatable)")
    result.add_argument("--samples", type=int, default=0, help="show this many random documents (0)")
    result.add_argument("--seed", type=int, default=0, help="seed of their choice (0)")
    result.add_argument("--max-tokens", type=int, default=200, help="tokens shown of each document (200)")
    result.add_argument("--read-tokens", action="store_true", help="read all tokens, for the largest id")
    result.add_argument("--tokenizer-type", default="PretrainedFromHF", help="type of the tokenizer (PretrainedFromHF)")
    result.add_argument("--tokenizer-name-or-path", help="tokenizer to decode with; ids are shown when not given")
    result.add_argument("--vocab-file", help="GPT2BPETokenizer: vocab.json")
    result.add_argument("--merge-file", help="GPT2BPETokenizer: merges.txt")
    return result


def run(options: argparse.Namespace) -> None:
    """Print the report."""
    for name in ("samples", "seed", "max_tokens"):
        if getattr(options, name) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)} must not be negative")
    indexed = IndexedDataset(options.prefix)
    meter = Meter(options.prefix, indexed.tokens.nbytes)
    found = statistics(indexed, read_tokens=options.read_tokens, read=meter)
    meter.close()
    print(f"{options.prefix}: {found.documents:,} documents, {found.sequences:,} sequences, {found.tokens:,} tokens")
    print(
        f"ids are {indexed.dtype.name}" + ("" if found.largest_id is None else f", the largest is {found.largest_id}")
    )
    print(
        f"document length in tokens: shortest {found.shortest:,}, median {found.median:,.0f}, "
        f"mean {found.mean:,.1f}, longest {found.longest:,}"
    )
    print("\n".join(histogram(document_lengths(indexed))))
    tokenizer = tokenizer_of(options, indexed)
    for number in chosen(options, indexed.num_documents):
        show(indexed, number, tokenizer, max_tokens=options.max_tokens)


def chosen(options: argparse.Namespace, num_documents: int) -> list[int]:
    """Documents to show: those named, then random ones."""
    import numpy as np

    for number in options.document:
        if not 0 <= number < num_documents:
            raise DataError(f"document {number} does not exist; the corpus has 0 to {num_documents - 1}")
    count = min(options.samples, num_documents)
    drawn = np.random.default_rng(options.seed).choice(num_documents, count, replace=False) if count else []
    return [*options.document, *sorted(int(number) for number in drawn)]


def show(indexed: IndexedDataset, number: int, tokenizer: Tokenizer | None, *, max_tokens: int) -> None:
    """Print one document."""
    ids = indexed.document(number)
    first, last = (int(bound) for bound in indexed.document_index[number : number + 2])
    sequences = "" if last - first == 1 else f" in {last - first} sequences"
    print(f"\n--- document {number}: {len(ids):,} tokens{sequences}")
    shown = ids[:max_tokens].tolist()
    print(" ".join(map(str, shown)) if tokenizer is None else tokenizer.decode(shown))
    if len(ids) > len(shown):
        print(f"... {len(ids) - len(shown):,} more tokens")


def tokenizer_of(options: argparse.Namespace, indexed: IndexedDataset) -> Tokenizer | None:
    """The tokenizer to decode with, if one is named.

    Raises: DataError if it is known that another one made the corpus: the text would be another one too.
    """
    if options.tokenizer_name_or_path is None and options.vocab_file is None:
        return None
    from megalm.data.same_tokenizer import TokenizerFacts, check_tokenizer
    from megalm.tokenizers.build import open_tokenizer
    from megalm.tokenizers.probe import probe_ids

    tokenizer = open_tokenizer(
        options.tokenizer_type,
        path=options.tokenizer_name_or_path,
        vocab_file=options.vocab_file,
        merge_file=options.merge_file,
    )
    facts = TokenizerFacts(tokenizer.name, tokenizer.vocab_size, tokenizer.digest, probe_ids(tokenizer))
    warning = check_tokenizer(indexed, facts)
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)
    return tokenizer


@program
def main(arguments: list[str]) -> int:
    """Run the tool and return its exit code."""
    options = parser().parse_args(arguments)
    run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
