"""Raw text to `.bin/.idx` corpora: blocks of lines go to workers, packed ids come back in order and go to disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megalm.data.documents import BLOCK_BYTES, MAX_LINE_BYTES, Block, Position, Source, blocks
from megalm.data.encoding import Encoded, Recipe, encode_block
from megalm.data.indexed import index_path, tokens_path
from megalm.data.indexed_writer import IndexedWriter, commit
from megalm.data.lines import BadLine
from megalm.data.workers import encode_in_order
from megalm.errors import DataError

JOURNAL_SECONDS = 5.0
"""Seconds of work that a kill can cost, unless the job says otherwise."""


@dataclass(frozen=True)
class Job:
    """What to tokenize and where to put it."""

    sources: Sequence[Source]
    output_prefix: str
    recipe: Recipe
    workers: int = 1
    """Processes that tokenize; 0 does it in the calling process."""
    block_bytes: int = BLOCK_BYTES
    max_line_bytes: int = MAX_LINE_BYTES
    overwrite: bool = False
    resume: bool = False
    skip_bad_lines: bool = False
    journal_seconds: float = JOURNAL_SECONDS
    about: dict[str, Any] = field(default_factory=dict)
    """Stored in the sidecar: tokenizer and flags. Two runs with another `about` are not parts of one corpus."""

    def corpus_prefix(self, key: str) -> str:
        """Where the corpus of a key goes."""
        level = "document" if self.recipe.split_sentences is None else "sentence"
        return f"{self.output_prefix}_{key}_{level}"

    @property
    def journal(self) -> Path:
        """How far an unfinished run came."""
        return Path(f"{self.output_prefix}.journal.json")


@dataclass
class Progress:
    """How far the work is."""

    total_bytes: int
    done_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    skipped: int = 0
    empty: int = 0
    seconds: float = 0.0


Report = Callable[[Progress], None]


def preprocess(job: Job, *, report: Report | None = None) -> Progress:
    """Tokenize every document of the sources, in order. The bytes written do not depend on workers, blocks or restarts.

    Raises: DataError for bad input, an output that exists or cannot be written, too little space.
    """
    return _Work(job, report or (lambda progress: None)).run()


class _Work:
    def __init__(self, job: Job, report: Report) -> None:
        self.job = job
        self.report = report
        self.progress = Progress(sum(source.size_bytes for source in job.sources))
        self.bad: list[dict[str, Any]] = []
        self.started = time.monotonic()

    def run(self) -> Progress:
        job = self.job
        saved = self._read_journal() if job.resume else None
        start = Position(**saved["position"]) if saved else Position()
        if saved:
            self.progress = Progress(**saved["progress"])
            self.bad = saved["bad"]
            if saved["publishing"]:
                return self._finish()
        else:
            # The journal of an earlier attempt describes files that are now overwritten.
            if job.journal.exists():
                job.journal.unlink()
        _check_space(job)
        earlier = self.progress.seconds
        hashes = _Hashes(job.sources)
        writers: dict[str, IndexedWriter] = {}
        try:
            for key in job.recipe.keys:
                state = saved["writers"][key] if saved else None
                writers[key] = IndexedWriter(
                    job.corpus_prefix(key), job.recipe.dtype, overwrite=job.overwrite, resume=state
                )
            journaled = time.monotonic()
            for block, encoded in self._encoded(start):
                hashes.start()
                self._take(block, encoded, writers)
                self.progress.seconds = earlier + time.monotonic() - self.started
                if time.monotonic() - journaled > job.journal_seconds:
                    self._write_journal(_after(block), {key: writer.flush() for key, writer in writers.items()})
                    journaled = time.monotonic()
                self.report(self.progress)
            self.progress.seconds = earlier + time.monotonic() - self.started
            for key, writer in writers.items():
                writer.prepare(sidecar=self._sidecar(key, writer, hashes.get()))
            # From here on a kill leaves nothing but names to be given.
            self._write_journal(start, {}, publishing=True)
        except BaseException:
            for writer in writers.values():
                writer.abort(keep=job.journal.exists())
            raise
        return self._finish()

    def _finish(self) -> Progress:
        """Publish every corpus, list the bad lines, and forget the journal."""
        for key in self.job.recipe.keys:
            try:
                commit(self.job.corpus_prefix(key))
            except OSError as error:
                raise DataError(f"cannot publish {self.job.corpus_prefix(key)}: {error.strerror}") from error
        self._write_bad_lines()
        self.job.journal.unlink(missing_ok=True)
        return self.progress

    def _encoded(self, start: Position) -> Iterator[tuple[Block, Encoded]]:
        job = self.job
        parts = blocks(
            job.sources,
            start=start,
            block_bytes=job.block_bytes,
            max_line_bytes=job.max_line_bytes,
            scratch=Path(job.output_prefix).parent,
        )
        if job.workers == 0:
            return ((block, encode_block(block, job.sources[block.source].format, job.recipe)) for block in parts)
        return encode_in_order(parts, job.sources, job.recipe, workers=job.workers)

    def _take(self, block: Block, encoded: Encoded, writers: dict[str, IndexedWriter]) -> None:
        source = self.job.sources[block.source]
        for bad in encoded.bad:
            self._bad_line(source, bad)
        for key, packed in encoded.packed.items():
            writers[key].add_packed(packed.tokens, packed.lengths, packed.sentences)
        progress = self.progress
        progress.documents += encoded.num_documents
        progress.empty += encoded.num_empty
        progress.skipped += len(encoded.bad)
        progress.tokens = sum(writer.num_tokens for writer in writers.values())
        before = sum(source.size_bytes for source in self.job.sources[: block.source])
        # How far a compressed file is read is not known in bytes of the file; assume four bytes out of one.
        share = (block.offset + block.size) // (4 if source.compression else 1)
        progress.done_bytes = before + min(source.size_bytes, share)

    def _bad_line(self, source: Source, bad: BadLine) -> None:
        if not self.job.skip_bad_lines:
            raise DataError(
                f"{source.path}, line {bad.line}, byte {bad.offset}: {bad.reason}\n"
                "  correct the line, or pass --on-bad-line skip to leave such lines out and list them"
            )
        self.bad.append({"file": str(source.path), "line": bad.line, "byte": bad.offset, "reason": bad.reason})

    def _identity(self) -> dict[str, Any]:
        stats = [(str(source.path), source.size_bytes, source.path.stat().st_mtime_ns) for source in self.job.sources]
        content = {"sources": stats, "about": self.job.about, "keys": self.job.recipe.keys}
        identity: dict[str, Any] = json.loads(json.dumps(content))
        return identity

    def _write_journal(
        self, position: Position, states: dict[str, dict[str, int]], *, publishing: bool = False
    ) -> None:
        content = {
            "identity": self._identity(),
            "position": asdict(position),
            "progress": asdict(self.progress),
            "bad": self.bad,
            "writers": states,
            "publishing": publishing,
        }
        scratch = self.job.journal.with_suffix(".tmp")
        with scratch.open("w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, self.job.journal)

    def _read_journal(self) -> dict[str, Any] | None:
        path = self.job.journal
        if not path.exists():
            return None
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            stored = content["identity"]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"cannot resume: {path} is damaged: {error}\n  start again without --resume") from error
        identity = self._identity()
        differing = [name for name in identity if stored.get(name) != identity[name]]
        if differing:
            raise DataError(
                f"cannot resume: {' and '.join(differing)} changed since {path} was written\n"
                "  start again without --resume"
            )
        return content

    def _write_bad_lines(self) -> None:
        path = Path(f"{self.job.output_prefix}.bad_lines.jsonl")
        if not self.bad:
            path.unlink(missing_ok=True)
            return
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in self.bad)

    def _sidecar(self, key: str, writer: IndexedWriter, digests: list[str]) -> dict[str, Any]:
        return {
            "format": 1,
            "key": key,
            "sources": [
                {"path": str(source.path), "bytes": source.size_bytes, "sha256": digest}
                for source, digest in zip(self.job.sources, digests, strict=True)
            ],
            **self.job.about,
            "documents": writer.num_documents,
            "sequences": writer.num_sequences,
            "tokens": writer.num_tokens,
            "dtype": writer.dtype.name,
            "skipped_lines": self.progress.skipped,
            "empty_documents": self.progress.empty,
            "seconds": round(self.progress.seconds, 3),
        }


class _Hashes:
    """sha256 of the sources, computed beside the work; hashing holds no interpreter lock."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._digests: list[str] = []
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._running = False

    def _run(self) -> None:
        try:
            for source in self._sources:
                digest = hashlib.sha256()
                with source.path.open("rb") as file:
                    while piece := file.read(1 << 20):
                        digest.update(piece)
                self._digests.append(digest.hexdigest())
        except OSError as error:
            self._error = error

    def start(self) -> None:
        """Begin, once the workers are forked; later calls do nothing."""
        if not self._running:
            self._running = True
            self._thread.start()

    def get(self) -> list[str]:
        """Wait for the digests."""
        self.start()
        self._thread.join()
        if self._error is not None:
            raise DataError(f"cannot read {self._error.filename} again: {self._error.strerror}")
        return self._digests


def _after(block: Block) -> Position:
    return Position(block.source, block.offset + block.size, block.first_line + block.num_lines)


def _check_space(job: Job) -> None:
    """Refuse before hours of work what cannot fit: the ids take about as much as a third to the whole of the text."""
    for key in job.recipe.keys:
        for path in (tokens_path(job.corpus_prefix(key)), index_path(job.corpus_prefix(key))):
            if path.exists() and not job.overwrite:
                raise DataError(f"{path} exists already\n  choose another --output-prefix, or pass --overwrite")
    folder = Path(job.output_prefix).absolute().parent
    while not folder.exists():
        folder = folder.parent
    text_bytes = sum(source.size_bytes * (4 if source.compression else 1) for source in job.sources)
    needed = text_bytes * job.recipe.dtype.itemsize // 8
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder} has {free / 1e9:.1f} GB free; the corpus needs about {needed / 1e9:.1f} GB\n"
            "  make room, or choose another --output-prefix"
        )
