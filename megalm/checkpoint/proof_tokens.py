"""Real tokens to compare models on."""

from __future__ import annotations

from pathlib import Path

import torch

from megalm.config.data import DataConfig
from megalm.data.indexed import IndexedDataset, index_path, tokens_path
from megalm.errors import CheckpointError
from megalm.tokenizers.protocol import Tokenizer

# Prose with punctuation, digits and code: what a checkpoint without its corpus is compared on.
SAMPLE_TEXT = """\
The quick brown fox jumps over the lazy dog. In 1969, two people walked on the Moon; 650 million watched them do it.
A function that returns its argument, in Python:

def identity(value):
    return value

"Measure twice," the carpenter said, "and cut once." Most mistakes are cheap before the saw, and dear after it.
"""


def real_tokens(
    data: DataConfig | None, tokenizer: Tokenizer | None, *, num_samples: int, length: int, text: str | None = None
) -> torch.Tensor:
    """`num_samples` rows of `length` tokens [b, s]: of `text`, or of the run's corpus, or of a sample text.

    The corpus is read from its end, where the validation split lies. Fewer or shorter rows come where the text is
    shorter.
    Raises: CheckpointError if there is neither a corpus nor a tokenizer.
    """
    prefix = _corpus(data) if text is None and data is not None else None
    if prefix is not None:
        return _from_corpus(prefix, num_samples=num_samples, length=length)
    if tokenizer is None:
        raise CheckpointError(
            "nothing to compare on: the run's corpus is not there, and neither is its tokenizer\n"
            "  give --tokenizer-name-or-path"
        )
    ids = tokenizer.encode(SAMPLE_TEXT if text is None else text)
    return _rows(torch.tensor(ids), num_samples=num_samples, length=length)


def _corpus(data: DataConfig) -> Path | None:
    for word in data.data_path:
        if index_path(word).is_file() and tokens_path(word).is_file():
            return Path(word)
    return None


def _from_corpus(prefix: Path, *, num_samples: int, length: int) -> torch.Tensor:
    dataset = IndexedDataset(prefix)
    pieces: list[torch.Tensor] = []
    found = 0
    for index in range(len(dataset) - 1, -1, -1):
        pieces.append(torch.from_numpy(dataset.get(index).astype("int64")))
        found += len(pieces[-1])
        if found >= num_samples * length:
            break
    return _rows(torch.cat(pieces), num_samples=num_samples, length=length)


def _rows(ids: torch.Tensor, *, num_samples: int, length: int) -> torch.Tensor:
    if ids.numel() == 0:
        raise CheckpointError("nothing to compare on: the text has no tokens")
    length = min(length, ids.numel())
    count = min(num_samples, ids.numel() // length)
    return ids[: count * length].view(count, length)
