"""From a sample number to the documents and offsets that it is cut from.

All documents of a split, once per epoch and shuffled, form one stream of tokens. Sample k of the stream is its tokens
k*s to k*s + s, one more than s, so that neighbours share a token and every token is predicted once. A last shuffle
deals the samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.data.order import Order
from megalm.data.shuffle import shuffle
from megalm.errors import DataError

SMALL = np.iinfo(np.int32).max
RUN = 1 << 16
LARGEST_SHUFFLE_U32 = np.iinfo(np.uint32).max - 1


@dataclass(frozen=True)
class SampleMap:
    """Three arrays, equal element for element to those of the trainer that the order is named after."""

    documents: npt.NDArray[np.int32]
    """Sequence number of each document of the stream, all epochs."""
    samples: npt.NDArray[Any]
    """[n + 1, 2]: where sample k of the stream starts, as an index into `documents` and an offset in tokens."""
    shuffle: npt.NDArray[Any]
    """[n]: which sample of the stream is dealt k-th."""

    @property
    def num_samples(self) -> int:
        """Samples of all epochs; at least those that were asked for."""
        return len(self.shuffle)


@dataclass(frozen=True)
class Epochs:
    """How often the documents are needed, and how the last time is shuffled."""

    tokens_per_epoch: int
    num_epochs: int
    final_apart: bool
    samples_before_final: int
    num_samples: int


def count_epochs(tokens_per_epoch: int, num_samples: int, seq_length: int, order: Order) -> Epochs:
    """The epochs that `num_samples` samples of `seq_length` + 1 tokens take."""
    if tokens_per_epoch < 1:
        raise DataError("the split holds no token\n  give it a larger share, or a larger corpus")
    # Samples of e epochs are (e * tokens - 1) // s, the smallest e that gives enough:
    num_epochs = max(1, -(-(num_samples * seq_length + 1) // tokens_per_epoch))
    total = (num_epochs * tokens_per_epoch - 1) // seq_length
    before_final = ((num_epochs - 1) * tokens_per_epoch - 1) // seq_length if num_epochs > 1 else 0
    in_epoch = (tokens_per_epoch - 1) // seq_length
    final_apart = num_epochs > 1 and num_samples - before_final < int(order.final_epoch_share * in_epoch)
    return Epochs(tokens_per_epoch, num_epochs, final_apart, before_final, total)


def build_sample_map(
    lengths: npt.NDArray[np.int32],
    split_range: tuple[int, int],
    *,
    num_samples: int,
    seq_length: int,
    seed: int,
    order: Order,
) -> SampleMap:
    """The sample map over the sequences [begin, end) of a corpus whose sequences have these lengths in tokens."""
    begin, end = split_range
    epochs = count_epochs(int(lengths[begin:end].sum(dtype=np.int64)), num_samples, seq_length, order)
    # One generator for both shuffles, in this order: that is what makes the maps equal to the other trainers'.
    random = np.random.RandomState(seed)
    documents = _shuffled_documents(begin, end, epochs, random)
    samples = _cut(lengths, documents, epochs.num_samples, seq_length)
    return SampleMap(documents, samples, _shuffled_samples(epochs, random))


def _shuffled_documents(begin: int, end: int, epochs: Epochs, random: np.random.RandomState) -> npt.NDArray[np.int32]:
    if end > SMALL:
        raise DataError(
            f"{end} sequences in one corpus; the orders number at most {SMALL}\n  split the corpus in several"
        )
    once = np.arange(begin, end, dtype=np.int32)
    apart = 1 if epochs.final_apart else 0
    documents = np.tile(once, epochs.num_epochs)
    together = len(once) * (epochs.num_epochs - apart)
    shuffle(random, documents[:together])
    if apart:
        shuffle(random, documents[together:])
    return documents


def _cut(
    lengths: npt.NDArray[np.int32], documents: npt.NDArray[np.int32], num_samples: int, seq_length: int
) -> npt.NDArray[Any]:
    """Sample k starts in the document that holds token k*s of the stream: the first whose end lies beyond it.

    A document that ends at token e lies before all samples from ceil(e / s) on. Counting the documents by that number
    and adding the counts up gives the index of every sample, in runs of documents that stay in the processor's cache.
    """
    samples = np.zeros((num_samples + 1, 2), np.int32 if len(documents) <= SMALL else np.int64)
    end = 0
    filled = 1
    for at in range(0, len(documents), RUN):
        ends = np.take(lengths, documents[at : at + RUN]).cumsum(dtype=np.int64)
        ends += end
        first = -(-ends // seq_length)
        # Samples whose position lies below the last end of this run: all of them start in this run or before.
        stop = min(int(first[-1]), num_samples + 1)
        if stop > filled:
            counts = np.bincount(np.clip(first - filled, 0, stop - filled), minlength=stop - filled + 1)
            index = counts[: stop - filled].cumsum()
            samples[filled:stop, 0] = index + at
            # Where the document in which a sample starts begins itself, in tokens of the stream.
            begins = np.where(index > 0, ends[index - 1], end)
            samples[filled:stop, 1] = np.arange(filled, stop, dtype=np.int64) * seq_length - begins
            filled = stop
        end = int(ends[-1])
    return samples


def _shuffled_samples(epochs: Epochs, random: np.random.RandomState) -> npt.NDArray[Any]:
    dtype = np.int64 if epochs.num_samples >= LARGEST_SHUFFLE_U32 else np.uint32
    numbers = np.arange(epochs.num_samples, dtype=dtype)
    together = epochs.samples_before_final if epochs.final_apart else epochs.num_samples
    shuffle(random, numbers[:together])
    if together < epochs.num_samples:
        shuffle(random, numbers[together:])
    return numbers
