"""Writing a token corpus: streamed to temporary files, published under its name only when it is whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megalm.data.indexed import Header, index_path, tokens_path
from megalm.errors import DataError

BLOCK = 1 << 20
"""Entries of an index copied at a time, so that memory does not grow with the corpus."""


class IndexedWriter:
    """Writes `PREFIX.bin` and `PREFIX.idx`; use it as a context manager.

    Leaving the block publishes both files, the index last; leaving it with an exception removes what was written.
    Lengths and bounds go to scratch files too, so that memory stays constant.
    Raises: DataError if the corpus exists and `overwrite` is false, if the folder cannot be written, or for an id
    that does not fit.
    """

    def __init__(
        self, prefix: str | Path, dtype: npt.DTypeLike, *, overwrite: bool = False, vocab_size: int | None = None
    ) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        self.num_tokens = 0
        self.num_sequences = 0
        self.num_documents = 0
        self._largest = int(np.iinfo(self.dtype).max)
        self._vocab_size = vocab_size
        existing = [path for path in (tokens_path(prefix), index_path(prefix)) if path.exists()]
        if existing and not overwrite:
            raise DataError(
                f"{existing[0]} exists and is not overwritten\n  choose another prefix, or pass --overwrite"
            )
        self._scratch = {name: Path(f"{prefix}.{name}.tmp") for name in ("bin", "lengths", "bounds", "idx")}
        self._files: dict[str, BinaryIO] = {}
        try:
            Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
            for name in ("bin", "lengths", "bounds"):
                self._files[name] = self._scratch[name].open("wb")
        except OSError as error:
            self.abort()
            raise DataError(
                f"cannot write {self.prefix}.bin: {error.strerror}\n  choose a folder that can be written"
            ) from error
        self._files["bounds"].write(np.zeros(1, "<i8").tobytes())

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.publish()
        else:
            self.abort()

    def add_document(self, ids: Sequence[int] | npt.NDArray[Any]) -> None:
        """Append one document of one sequence; an empty one is left out, as in the other trainers."""
        if len(ids) == 0:
            return
        tokens = np.asarray(ids)
        self.add_packed(tokens, np.array([len(tokens)], np.int64), np.array([1], np.int64))

    def add_sentences(self, sentences: Sequence[Sequence[int] | npt.NDArray[Any]]) -> None:
        """Append one document of several sequences; empty sentences are left out."""
        kept = [np.asarray(sentence) for sentence in sentences if len(sentence)]
        if kept:
            lengths = np.array([len(sentence) for sentence in kept], np.int64)
            self.add_packed(np.concatenate(kept), lengths, np.array([len(kept)], np.int64))

    def add_packed(
        self, tokens: npt.NDArray[Any], lengths: npt.NDArray[np.int64], sentences: npt.NDArray[np.int64]
    ) -> None:
        """Append many documents at once.

        `tokens` are the ids back to back, `lengths` the tokens of each sequence, `sentences` the sequences of each
        document.
        """
        if int(lengths.sum()) != len(tokens) or int(sentences.sum()) != len(lengths):
            raise ValueError(
                f"{len(tokens)} tokens, {len(lengths)} lengths and {len(sentences)} documents do not agree"
            )
        if len(tokens):
            self._check_range(int(tokens.min()), int(tokens.max()))
        if len(lengths) and int(lengths.max()) > np.iinfo(np.int32).max:
            raise DataError(
                f"a document of {int(lengths.max())} tokens; the .idx format holds at most {np.iinfo(np.int32).max}"
            )
        bounds = np.cumsum(sentences, dtype=np.int64)
        bounds += self.num_sequences
        self._write("bin", np.ascontiguousarray(tokens, self.dtype))
        self._write("lengths", np.ascontiguousarray(lengths, "<i4"))
        self._write("bounds", np.ascontiguousarray(bounds, "<i8"))
        self.num_tokens += len(tokens)
        self.num_sequences += len(lengths)
        self.num_documents += len(sentences)

    def publish(self) -> None:
        """Write the index, flush everything to the disk, and give both files their names."""
        try:
            for file in self._files.values():
                _sync(file)
                file.close()
            self._write_index()
            # An old index must never stand beside new tokens, so it goes first and the new one comes last.
            index_path(self.prefix).unlink(missing_ok=True)
            os.replace(self._scratch["bin"], tokens_path(self.prefix))
            os.replace(self._scratch["idx"], index_path(self.prefix))
            sync_folder(Path(self.prefix).parent)
        except OSError as error:
            self.abort()
            raise DataError(f"cannot write {self.prefix}.idx: {error.strerror}") from error
        for name in ("lengths", "bounds"):
            self._scratch[name].unlink(missing_ok=True)

    def abort(self) -> None:
        """Close and remove what was written; nothing is published."""
        for file in self._files.values():
            file.close()
        for path in self._scratch.values():
            path.unlink(missing_ok=True)

    def _check_range(self, smallest: int, largest: int) -> None:
        if smallest < 0 or largest > self._largest:
            wrong = smallest if smallest < 0 else largest
            raise DataError(
                f"token id {wrong} does not fit {self.dtype.name}, which holds 0 to {self._largest}\n"
                "  the tokenizer has more ids than it says, or the dtype was chosen for another vocabulary"
            )
        if self._vocab_size is not None and largest >= self._vocab_size:
            raise DataError(f"token id {largest} lies outside of the tokenizer's vocabulary of {self._vocab_size} ids")

    def _write(self, name: str, data: npt.NDArray[Any]) -> None:
        try:
            self._files[name].write(data.data)
        except OSError as error:
            raise DataError(f"cannot write {self._scratch[name]}: {error.strerror}") from error

    def _write_index(self) -> None:
        with self._scratch["idx"].open("wb") as index:
            index.write(Header(self.dtype, self.num_sequences, self.num_documents + 1).pack())
            _copy(self._scratch["lengths"], index)
            address = 0
            with self._scratch["lengths"].open("rb") as file:
                while raw := file.read(4 * BLOCK):
                    pointers = np.empty(len(raw) // 4 + 1, "<i8")
                    pointers[0] = address
                    np.cumsum(np.frombuffer(raw, "<i4"), out=pointers[1:])
                    pointers[1:] *= self.dtype.itemsize
                    pointers[1:] += address
                    address = int(pointers[-1])
                    index.write(pointers[:-1].data)
            _copy(self._scratch["bounds"], index)
            _sync(index)


def _copy(source: Path, target: BinaryIO) -> None:
    with source.open("rb") as file:
        while raw := file.read(8 * BLOCK):
            target.write(raw)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, so that a rename survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
