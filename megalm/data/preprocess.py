"""Raw text to `.bin/.idx` corpora: blocks of lines go to workers, packed ids come back in order and go to disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megalm.data.bad_lines import BadLines, shown
from megalm.data.documents import BLOCK_BYTES, MAX_LINE_BYTES, Block, blocks
from megalm.data.encoding import Encoded, Recipe, encode_block
from megalm.data.indexed import index_path, tokens_path
from megalm.data.indexed_writer import IndexedWriter, commit
from megalm.data.inputs import Position, Source
from megalm.data.journal import read_journal, write_journal
from megalm.data.lines import BadLine, count_line_feeds
from megalm.data.output_lock import only_writer
from megalm.data.parquet import BadRow
from megalm.data.partition import WHOLE, Partition, byte_of, corpus_digest, source_starts, span
from megalm.data.source_hashes import SourceHashes
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
    """Stored in the sidecar: tokenizer and what decides the ids. Two runs with another `about` are not parts of one
    corpus."""
    flags: dict[str, Any] = field(default_factory=dict)
    """Stored in the sidecar: the command line."""
    partition: Partition = WHOLE

    def corpus_prefix(self, key: str) -> str:
        """Where the corpus of a key goes."""
        level = "document" if self.recipe.split_sentences is None else "sentence"
        return f"{self.output_prefix}_{key}_{level}"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the bytes: an attempt that differs in it cannot go on from another's journal. Files as they were
        when it began: later ones are not what was read, and a journal comes too often to look at all of them."""
        stats = [(str(source.path), source.size_bytes, source.path.stat().st_mtime_ns) for source in self.sources]
        return {
            "sources": stats,
            "about": self.about,
            "keys": self.recipe.keys,
            "partition": asdict(self.partition),
            "max_line_bytes": self.max_line_bytes,
        }

    @property
    def journal(self) -> Path:
        """How far an unfinished run came."""
        return Path(f"{self.output_prefix}.journal.json")


@dataclass
class Progress:
    """How far the work is."""

    total_bytes: int
    """Of the files, as they lie on the disk."""
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
    with only_writer(job.output_prefix):
        return _Work(job, report or (lambda progress: None)).run()


class _Work:
    def __init__(self, job: Job, report: Report) -> None:
        self.job = job
        self.report = report
        self.start, self.stop = span(job.sources, job.partition, max_line_bytes=job.max_line_bytes)
        self.starts = source_starts(job.sources)
        self.first_byte = byte_of(job.sources, self.start)
        self.progress = Progress(byte_of(job.sources, self.stop) - self.first_byte)
        self.position = self.start
        self.bad = BadLines(job.output_prefix)
        self.started = time.monotonic()

    def run(self) -> Progress:
        job, identity = self.job, self.job.identity
        saved = read_journal(job.journal, identity) if job.resume else None
        if saved:
            self.position = Position(**saved["position"])
            self.progress = Progress(**saved["progress"])
            if saved["publishing"]:
                return self._finish(saved["bad_bytes"])
        else:
            # The journal of an earlier attempt describes files that are now overwritten.
            if job.journal.exists():
                job.journal.unlink()
        _check_space(job, self.progress.total_bytes)
        earlier = self.progress.seconds
        hashes = SourceHashes(job.sources, self.start, self.stop)
        writers: dict[str, IndexedWriter] = {}
        try:
            self.bad.open(saved["bad_bytes"] if saved else 0)
            for key in job.recipe.keys:
                state = saved["writers"][key] if saved else None
                writers[key] = IndexedWriter(
                    job.corpus_prefix(key), job.recipe.dtype, overwrite=job.overwrite, resume=state
                )
            journaled = time.monotonic()
            for block, encoded in self._encoded():
                hashes.start()
                self._take(block, encoded, writers)
                self.progress.seconds = earlier + time.monotonic() - self.started
                if time.monotonic() - journaled > job.journal_seconds:
                    self._write_journal({key: writer.flush() for key, writer in writers.items()})
                    journaled = time.monotonic()
                self.report(self.progress)
            sources = hashes.get()
            self.progress.seconds = earlier + time.monotonic() - self.started
            for key, writer in writers.items():
                writer.prepare(sidecar=self._sidecar(key, writer, sources))
            # From here on a kill leaves nothing but names to be given.
            self._write_journal({}, publishing=True)
        except BaseException:
            for writer in writers.values():
                writer.abort(keep=job.journal.exists())
            self.bad.abort(keep=job.journal.exists())
            raise
        finally:
            hashes.stop()
        return self._finish(self.bad.flush())

    def _finish(self, bad_bytes: int) -> Progress:
        """Publish every corpus, list the bad lines, and forget the journal."""
        for key in self.job.recipe.keys:
            try:
                commit(self.job.corpus_prefix(key))
            except OSError as error:
                raise DataError(f"cannot publish {self.job.corpus_prefix(key)}: {error.strerror}") from error
        self.bad.publish(bad_bytes)
        self.job.journal.unlink(missing_ok=True)
        return self.progress

    def _encoded(self) -> Iterator[tuple[Block, Encoded]]:
        job = self.job
        parts = blocks(
            job.sources,
            start=self.position,
            stop=self.stop,
            block_bytes=job.block_bytes,
            max_line_bytes=job.max_line_bytes,
            scratch=Path(job.output_prefix).parent,
        )
        if job.workers == 0:
            return ((block, encode_block(block, job.recipe)) for block in parts)
        return encode_in_order(parts, job.recipe, workers=job.workers)

    def _take(self, block: Block, encoded: Encoded, writers: dict[str, IndexedWriter]) -> None:
        line = self.position.line if block.source == self.position.source else 1
        for bad in encoded.bad:
            self._bad_line(block.source, bad, line - 1)
        for key, packed in encoded.packed.items():
            writers[key].add_packed(packed.tokens, packed.lengths, packed.sentences)
        progress = self.progress
        progress.documents += encoded.num_documents
        progress.empty += encoded.num_empty
        progress.skipped += len(encoded.bad)
        progress.tokens = sum(writer.num_tokens for writer in writers.values())
        progress.done_bytes = self.starts[block.source] + block.consumed_bytes - self.first_byte
        self.position = block.end(line + encoded.num_lines)

    def _bad_line(self, number: int, bad: BadLine | BadRow, lines: int) -> None:
        source = self.job.sources[number]
        place = bad.place(lines + (self._skipped_lines if number == self.start.source else 0))
        if not self.job.skip_bad_lines:
            what = "row" if isinstance(bad, BadRow) else "line"
            raise DataError(
                f"{source.path}, {shown(place)}: {bad.reason}\n"
                f"  correct the {what}, or pass --on-bad-line skip to leave such {what}s out and list them"
            )
        self.bad.add({"file": str(source.path), **place, "reason": bad.reason})

    @cached_property
    def _skipped_lines(self) -> int:
        """Lines before this part of the corpus in its first file; counted only if one must be named."""
        source = self.job.sources[self.start.source]
        plain = self.start.offset and source.format != "parquet"
        return count_line_feeds(source.path, self.start.offset) if plain else 0

    def _write_journal(self, states: dict[str, dict[str, int]], *, publishing: bool = False) -> None:
        content = {
            "position": asdict(self.position),
            "progress": asdict(self.progress),
            "bad_bytes": self.bad.flush(),
            "writers": states,
            "publishing": publishing,
        }
        write_journal(self.job.journal, self.job.identity, content)

    def _sidecar(self, key: str, writer: IndexedWriter, sources: list[dict[str, Any]]) -> dict[str, Any]:
        job = self.job
        parts: dict[str, Any] = {}
        if job.partition != WHOLE:
            digest = corpus_digest(job.sources, {**job.about, "keys": list(job.recipe.keys)})
            parts["partition"] = {**asdict(job.partition), "corpus": digest}
        return {
            "format": 1,
            "key": key,
            "sources": sources,
            **job.about,
            "flags": job.flags,
            **parts,
            "documents": writer.num_documents,
            "sequences": writer.num_sequences,
            "tokens": writer.num_tokens,
            "dtype": writer.dtype.name,
            "skipped_lines": self.progress.skipped,
            "empty_documents": self.progress.empty,
            "seconds": round(self.progress.seconds, 3),
        }


def _check_space(job: Job, source_bytes: int) -> None:
    """Refuse before hours of work what cannot fit: the ids take about as much as a third to the whole of the text."""
    for key in job.recipe.keys:
        for path in (tokens_path(job.corpus_prefix(key)), index_path(job.corpus_prefix(key))):
            if path.exists() and not job.overwrite:
                raise DataError(f"{path} exists already\n  choose another --output-prefix, or pass --overwrite")
    folder = Path(job.output_prefix).absolute().parent
    while not folder.exists():
        folder = folder.parent
    packed = sum(s.size_bytes for s in job.sources if s.compression or s.format == "parquet")
    # Packed text is taken for four times as long as its file.
    share = 1 + 3 * packed / max(1, sum(source.size_bytes for source in job.sources))
    needed = int(source_bytes * share) * job.recipe.dtype.itemsize // 8
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder} has {free / 1e9:.1f} GB free; the corpus needs about {needed / 1e9:.1f} GB\n"
            "  make room, or choose another --output-prefix"
        )
