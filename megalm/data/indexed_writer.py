"""Writing a token corpus: streamed to temporary files, published under its name only when it is whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megalm.data.indexed import Header, index_path, sidecar_path, tokens_path
from megalm.errors import DataError

BLOCK = 1 << 20
"""Entries of an index copied at a time, so that memory does not grow with the corpus."""

STREAMS = ("bin", "lengths", "bounds")


class IndexedWriter:
    """Writes `PREFIX.bin`, `PREFIX.idx` and `PREFIX.meta.json`; use it as a context manager.

    Leaving the block publishes the files, the index last; leaving it with an exception removes what was written.
    Lengths and bounds go to scratch files too, so that memory stays constant.
    `resume` is what `flush` returned in a process that died: writing goes on from there.
    Raises: DataError if the corpus exists and `overwrite` is false, if the folder cannot be written, or for an id
    that does not fit.
    """

    def __init__(
        self,
        prefix: str | Path,
        dtype: npt.DTypeLike,
        *,
        overwrite: bool = False,
        vocab_size: int | None = None,
        resume: Mapping[str, int] | None = None,
    ) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        self.num_tokens = self.num_sequences = self.num_documents = 0
        self._largest = int(np.iinfo(self.dtype).max)
        self._vocab_size = vocab_size
        self._digest = hashlib.sha256()
        self._scratch = scratch_paths(self.prefix)
        self._files: dict[str, BinaryIO] = {}
        existing = [path for path in (tokens_path(prefix), index_path(prefix)) if path.exists()]
        if existing and not overwrite:
            raise DataError(f"{existing[0]} exists already\n  choose another prefix, or pass --overwrite")
        try:
            Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
            if resume is not None:
                self._reopen(resume)
                return
            for name in STREAMS:
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
        self.add_sentences([ids])

    def add_sentences(self, sentences: Sequence[Sequence[int] | npt.NDArray[Any]]) -> None:
        """Append one document of several sequences; empty sentences are left out."""
        kept = [np.asarray(sentence) for sentence in sentences if len(sentence)]
        if not kept:
            return
        for sentence in kept:
            self._check_range(int(sentence.min()), int(sentence.max()))
        lengths = np.array([len(sentence) for sentence in kept], np.int64)
        self.add_packed(np.concatenate(kept).astype(self.dtype), lengths, np.array([len(kept)], np.int64))

    def add_packed(
        self, tokens: npt.NDArray[Any], lengths: npt.NDArray[np.integer], sentences: npt.NDArray[np.integer]
    ) -> None:
        """Append many documents at once.

        `tokens` are the ids back to back in the dtype of the corpus, `lengths` the tokens of each sequence, `sentences`
        the sequences of each document.
        """
        if int(lengths.sum(dtype=np.int64)) != len(tokens) or int(sentences.sum(dtype=np.int64)) != len(lengths):
            raise ValueError(f"{len(tokens)} tokens, {len(lengths)} lengths, {len(sentences)} documents do not agree")
        if tokens.dtype != self.dtype:
            raise ValueError(f"packed tokens are {tokens.dtype}, the corpus is {self.dtype}")
        if self._vocab_size is not None and len(tokens):
            self._check_range(int(tokens.min()), int(tokens.max()))
        longest = int(lengths.max()) if len(lengths) else 0
        if longest > np.iinfo(np.int32).max:
            raise DataError(f"a document of {longest} tokens; the .idx format holds at most {np.iinfo(np.int32).max}")
        bounds = np.cumsum(sentences, dtype=np.int64)
        bounds += self.num_sequences
        self._write("bin", np.ascontiguousarray(tokens))
        self._digest.update(np.ascontiguousarray(tokens).data)
        self._write("lengths", np.ascontiguousarray(lengths, "<i4"))
        self._write("bounds", np.ascontiguousarray(bounds, "<i8"))
        self.num_tokens += len(tokens)
        self.num_sequences += len(lengths)
        self.num_documents += len(sentences)

    def flush(self) -> dict[str, int]:
        """Bring everything to the disk; the result lets another process go on from here."""
        try:
            for file in self._files.values():
                _sync(file)
        except OSError as error:
            raise DataError(f"cannot write {self.prefix}.bin: {error.strerror}") from error
        return {"tokens": self.num_tokens, "sequences": self.num_sequences, "documents": self.num_documents}

    def publish(self, *, sidecar: Mapping[str, Any] | None = None) -> None:
        """Write the index and the sidecar, flush everything to the disk, and give the files their names."""
        try:
            self.prepare(sidecar=sidecar)
            commit(self.prefix)
        except OSError as error:
            self.abort()
            raise DataError(f"cannot write {self.prefix}.idx: {error.strerror}") from error
        except DataError:
            self.abort()
            raise

    def prepare(self, *, sidecar: Mapping[str, Any] | None = None) -> None:
        """All of `publish` but the names: after this, `commit` can be done at any time, by any process."""
        try:
            for file in self._files.values():
                _sync(file)
                file.close()
            self._write_sidecar(self._write_index(), sidecar or {})
        except OSError as error:
            raise DataError(f"cannot write {self.prefix}.idx: {error.strerror}") from error

    def abort(self, *, keep: bool = False) -> None:
        """Close, and remove what was written unless it is to be resumed; nothing is published."""
        for file in self._files.values():
            # A full disk fails here again; what could not be flushed is not needed.
            try:
                file.close()
            except OSError:
                continue
        if not keep:
            for path in self._scratch.values():
                if path.exists():
                    path.unlink()

    def _reopen(self, state: Mapping[str, int]) -> None:
        """Cut the scratch files back to a flushed state and go on from there."""
        self.num_tokens, self.num_sequences = state["tokens"], state["sequences"]
        self.num_documents = state["documents"]
        sizes = {
            "bin": self.num_tokens * self.dtype.itemsize,
            "lengths": 4 * self.num_sequences,
            "bounds": 8 * (self.num_documents + 1),
        }
        for name, size in sizes.items():
            path = self._scratch[name]
            if not path.is_file() or path.stat().st_size < size:
                raise DataError(f"cannot resume: {path} does not hold the {size} bytes written before\n  start again")
            self._files[name] = path.open("r+b")
            self._files[name].truncate(size)
            self._files[name].seek(size)
        with self._scratch["bin"].open("rb") as file:
            while raw := file.read(8 * BLOCK):
                self._digest.update(raw)

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

    def _write_index(self) -> str:
        digest = hashlib.sha256()
        with self._scratch["idx"].open("wb") as index:

            def put(raw: bytes | memoryview) -> None:
                index.write(raw)
                digest.update(raw)

            put(Header(self.dtype, self.num_sequences, self.num_documents + 1).pack())
            for part in _parts(self._scratch["lengths"]):
                put(part)
            address = 0
            for part in _parts(self._scratch["lengths"]):
                pointers = np.empty(len(part) // 4 + 1, "<i8")
                pointers[0] = 0
                np.cumsum(np.frombuffer(part, "<i4"), out=pointers[1:])
                pointers *= self.dtype.itemsize
                pointers += address
                address = int(pointers[-1])
                put(pointers[:-1].data)
            for part in _parts(self._scratch["bounds"]):
                put(part)
            _sync(index)
        return digest.hexdigest()

    def _write_sidecar(self, idx_digest: str, content: Mapping[str, Any]) -> None:
        idx_bytes = self._scratch["idx"].stat().st_size
        files = {
            "bin": {"bytes": self.num_tokens * self.dtype.itemsize, "sha256": self._digest.hexdigest()},
            "idx": {"bytes": idx_bytes, "sha256": idx_digest},
        }
        counts = {"documents": self.num_documents, "sequences": self.num_sequences, "tokens": self.num_tokens}
        with self._scratch["meta"].open("wb") as file:
            text = json.dumps({"format": 1, "files": files, **counts, **content}, indent=1, ensure_ascii=False)
            file.write(text.encode() + b"\n")
            _sync(file)


def scratch_paths(prefix: str) -> dict[str, Path]:
    """The files that a corpus is written to before it has its names."""
    return {name: Path(f"{prefix}.{name}.tmp") for name in (*STREAMS, "idx", "meta")}


def commit(prefix: str) -> None:
    """Give the files of a prepared corpus their names. Cut off in the middle, it can be done again."""
    scratch = scratch_paths(prefix)
    if scratch["idx"].exists():
        # An old index must never stand beside new tokens, so it goes first and the new one comes last.
        index_path(prefix).unlink(missing_ok=True)
        if scratch["bin"].exists():
            os.replace(scratch["bin"], tokens_path(prefix))
        if scratch["meta"].exists():
            os.replace(scratch["meta"], sidecar_path(prefix))
        os.replace(scratch["idx"], index_path(prefix))
    sync_folder(Path(prefix).parent)
    for name in ("lengths", "bounds"):
        scratch[name].unlink(missing_ok=True)


def _parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while raw := file.read(8 * BLOCK):
            yield raw


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
