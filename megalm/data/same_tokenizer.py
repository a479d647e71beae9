"""Whether a corpus was made with the tokenizer of the run that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalm.data.indexed import IndexedDataset, shown
from megalm.data.sidecar import read_sidecar
from megalm.errors import DataError


@dataclass(frozen=True)
class TokenizerFacts:
    """What a run knows of its tokenizer."""

    name: str
    vocab_size: int
    digest: str = ""
    """sha256 of its files."""
    probe: Sequence[int] | None = None
    """The ids that it makes of a fixed text; None if the run takes ids as they are."""


def check_tokenizer(indexed: IndexedDataset, tokenizer: TokenizerFacts) -> str | None:
    """A warning if the corpus may be another tokenizer's, None if it is this one's or nothing tells.

    Equal files make equal ids. Other files may too, as one tokenizer has several formats: then the ids of the same text
    decide, which sidecars hold since they are compared.

    Raises: DataError if it is another tokenizer's.
    """
    capacity = np.iinfo(indexed.dtype).max + 1 if indexed.dtype.kind in "iu" else None
    if capacity is not None and capacity < tokenizer.vocab_size:
        raise DataError(
            f"{indexed.prefix} stores ids as {indexed.dtype}, which holds {capacity:,} of them, and the tokenizer "
            f"has {tokenizer.vocab_size:,}\n"
            "  the corpus was made with another tokenizer: tokenize it again, or name the tokenizer that made it"
        )
    return check_made_with(indexed.prefix, tokenizer)


def check_made_with(prefix: str, tokenizer: TokenizerFacts) -> str | None:
    """`check_tokenizer` by the sidecar alone."""
    made_with, another = _made_with(prefix), another_made(prefix, tokenizer)
    if made_with is None or tokenizer.probe is None or another is False:
        return None
    what = f"{shown(prefix)} was tokenized by a {made_with.get('type')} of {made_with.get('vocab_size')} ids"
    if another is None:
        return f"{what}, whose files are not those of {tokenizer.name}: if it is another tokenizer, so are its tokens"
    raise DataError(
        f"{what}, which makes other ids of the same text than {tokenizer.name}\n"
        f"  tokenizer of the corpus: in {shown(prefix)}.meta.json; the run's: set by --tokenizer-type and "
        "--tokenizer-name-or-path\n"
        "  name the tokenizer that made the corpus, or tokenize the text again; --tokenizer-type NullTokenizer with "
        "--vocab-size takes ids as they are"
    )


def another_made(prefix: str, tokenizer: TokenizerFacts) -> bool | None:
    """Whether a corpus holds the ids of another tokenizer; None where nothing beside it tells."""
    made_with = _made_with(prefix)
    if made_with is None or tokenizer.probe is None:
        return None
    if made_with.get("digest") == tokenizer.digest:
        return False
    probe = made_with.get("probe")
    return None if probe is None else list(tokenizer.probe) != probe


def _made_with(prefix: str) -> dict[str, Any] | None:
    sidecar = read_sidecar(prefix)
    made_with = (sidecar or {}).get("tokenizer")
    if not isinstance(made_with, dict) or made_with.get("type") == "NullTokenizer":
        return None
    return made_with
