"""GPT samples: fixed-length cuts through the shuffled documents of one corpus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.data.indexed import IndexedDataset
from megalm.data.map_cache import cached_sample_map
from megalm.data.order import BIGSCIENCE, Order
from megalm.data.sample_map import SampleMap, count_epochs
from megalm.errors import DataError


class GPTDataset:
    """Samples of seq_length + 1 tokens from the sequences [begin, end) of a corpus.

    Raises: DataError for an id that is not below `vocab_size`, with the place it was read from.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        split_range: tuple[int, int],
        *,
        seq_length: int,
        num_samples: int,
        seed: int,
        name: str = "train",
        order: Order = BIGSCIENCE,
        cache_path: str | None = None,
        vocab_size: int | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        begin, end = split_range
        if not 0 <= begin < end <= indexed.num_sequences:
            raise DataError(
                f"the {name} split of {indexed.prefix} is sequences {begin} to {end} of {indexed.num_sequences}: none\n"
                "  give it a larger share, or use a larger corpus"
            )
        self.indexed = indexed
        self.name = name
        self.seq_length = seq_length
        self.split_range = split_range
        self.vocab_size = vocab_size
        self.seed = seed
        self.num_tokens = int(indexed.lengths[begin:end].sum(dtype=np.int64))
        self._is_signed = indexed.dtype.kind == "i"
        self._epochs = count_epochs(self.num_tokens, num_samples, seq_length, order)
        self.map: SampleMap = cached_sample_map(
            indexed.prefix,
            name,
            indexed.lengths,
            split_range,
            num_samples=num_samples,
            seq_length=seq_length,
            seed=seed,
            order=order,
            cache_path=cache_path,
            content=indexed.content,
            log=log,
        )

    def __len__(self) -> int:
        return self.map.num_samples

    def __getitem__(self, i: int) -> npt.NDArray[np.int64]:
        if not 0 <= i < self.map.num_samples:
            raise IndexError(f"sample {i} of {self.map.num_samples} in {self.indexed.prefix}")
        out = np.empty(self.seq_length + 1, np.int64)
        indexed = self.indexed
        itemsize = indexed.dtype.itemsize
        filled = 0
        for sequence, offset, length in self.pieces(i):
            start = int(indexed.pointers[sequence]) // itemsize + offset
            out[filled : filled + length] = indexed.tokens[start : start + length]
            filled += length
        if filled != len(out):
            raise DataError(
                f"sample {i} of {indexed.prefix} has {filled} tokens, not {len(out)}: its sample map is damaged"
            )
        if self.vocab_size is not None and int(out.max()) >= self.vocab_size:
            self._refuse(i, out, int(out.argmax()))
        if self._is_signed and int(out.min()) < 0:
            self._refuse(i, out, int(out.argmin()))
        return out

    def pieces(self, i: int) -> list[tuple[int, int, int]]:
        """What sample `i` is made of: (sequence, offset in it, tokens taken), in order."""
        at = int(self.map.shuffle[i])
        (first, first_offset), (last, last_offset) = self.map.samples[at : at + 2].tolist()
        if first == last:
            return [(int(self.map.documents[first]), first_offset, last_offset - first_offset + 1)]
        sequences = self.map.documents[first : last + 1].tolist()
        lengths = self.indexed.lengths
        found = [(sequences[0], first_offset, int(lengths[sequences[0]]) - first_offset)]
        found += [(sequence, 0, int(lengths[sequence])) for sequence in sequences[1:-1]]
        found.append((sequences[-1], 0, last_offset + 1))
        return found

    def order_fields(self) -> list[Any]:
        """What the order of samples depends on; more samples keep it as long as they take no further epoch."""
        epochs = self._epochs
        return [
            self.indexed.content,
            list(self.split_range),
            self.seq_length,
            self.seed,
            epochs.num_epochs,
            epochs.final_apart,
        ]

    def _refuse(self, i: int, sample: npt.NDArray[Any], position: int) -> None:
        passed = 0
        for sequence, offset, length in self.pieces(i):
            if position < passed + length:
                rows = "" if self.vocab_size is None else f" of {self.vocab_size}"
                raise DataError(
                    f"token id {int(sample[position])} in {self.indexed.prefix}, sequence {sequence}, "
                    f"token {offset + position - passed}, lies outside of the vocabulary{rows}\n"
                    "  the corpus was made with another tokenizer: tokenize it again, or raise --pad-vocab-size-to"
                )
            passed += length
