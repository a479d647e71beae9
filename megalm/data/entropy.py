"""How much of a text can be predicted from token frequencies alone: the mark that a model must beat."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.data.source import SampleSource
from megalm.errors import DataError


def unigram_entropy(tokens: Iterable[npt.NDArray[Any]]) -> float:
    """Entropy of the token frequencies: the loss of the best model that ignores all context.

    Units: nats per token.
    """
    counts = np.zeros(1, np.int64)
    for part in tokens:
        found = np.bincount(part.astype(np.int64, copy=False), minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    seen = counts[counts > 0].astype(np.float64)
    if not len(seen):
        raise DataError("the unigram entropy of no tokens is not defined\n  the validation set is empty")
    shares = seen / seen.sum()
    return float(-(shares * np.log(shares)).sum())


def predicted_tokens(dataset: SampleSource, num_samples: int) -> Iterator[npt.NDArray[Any]]:
    """The tokens that a validation over the first `num_samples` samples predicts."""
    for i in range(num_samples):
        yield dataset[i][1:]
