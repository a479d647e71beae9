"""Whether the output of a job is there already, made of the same text in the same way."""

from __future__ import annotations

import json
from typing import Any

from megalm.data.indexed import index_path, tokens_path
from megalm.data.output_lock import only_writer
from megalm.data.partition import WHOLE, corpus_digest, span
from megalm.data.preprocess import Job
from megalm.data.sidecar import check_hash, read_sidecar
from megalm.data.source_hashes import SourceHashes
from megalm.errors import DataError

DECIDING_FLAGS = ("json_keys", "max_line_bytes")
"""Of those in the sidecar, the ones that decide which lines are documents."""


def is_complete(job: Job) -> bool:
    """Whether there is nothing left to do: every corpus is there as it was written, of these sources and settings.

    Reads sources and corpora whole, since their hashes are what the sidecars hold. False where there is an unfinished
    run, a corpus is missing or has no sidecar, or --overwrite asks for a new one.
    Raises: DataError if what is there was made of other sources or in another way, or has changed since.
    """
    with only_writer(job.output_prefix):
        if job.overwrite or job.journal.exists():
            return False
        prefixes = [job.corpus_prefix(key) for key in job.recipe.keys]
        if not all(tokens_path(prefix).exists() and index_path(prefix).exists() for prefix in prefixes):
            return False
        sidecars = [read_sidecar(prefix) for prefix in prefixes]
        if any(sidecar is None for sidecar in sidecars):
            return False
        found: list[dict[str, Any]] = [sidecar for sidecar in sidecars if sidecar is not None]
        for prefix, sidecar in zip(prefixes, found, strict=True):
            _refuse_if(_other_settings(job, sidecar), prefix)
        own = _own_sources(job, found[0])
        for prefix, sidecar in zip(prefixes, found, strict=True):
            _refuse_if([] if _without_paths(sidecar.get("sources")) == own else ["sources"], prefix)
            check_hash(index_path(prefix), sidecar["files"]["idx"])
            check_hash(tokens_path(prefix), sidecar["files"]["bin"])
    return True


def _other_settings(job: Job, sidecar: dict[str, Any]) -> list[str]:
    """What a corpus was made with otherwise."""
    about: dict[str, Any] = json.loads(json.dumps(job.about))
    flags, stored = json.loads(json.dumps(job.flags)), sidecar.get("flags")
    if not isinstance(stored, dict):
        stored = {}
    differing = [name for name in dict.fromkeys([*about, "sentences"]) if sidecar.get(name) != about.get(name)]
    differing += [name for name in DECIDING_FLAGS if name in stored and stored[name] != flags.get(name)]
    if sidecar.get("dtype") != job.recipe.dtype.name:
        differing.append("width of ids")
    if sidecar.get("skipped_lines") and not job.skip_bad_lines:
        differing.append("on_bad_line")
    corpus = (sidecar.get("partition") or {}).get("corpus")
    digest = corpus_digest(job.sources, {**job.about, "keys": list(job.recipe.keys)})
    if corpus != (None if job.partition == WHOLE else digest):
        differing.append("partition")
    return differing


def _own_sources(job: Job, sidecar: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The job's sources as a sidecar describes them, wherever they lie; None where their sizes are other ones."""
    hashes = SourceHashes(job.sources, *span(job.sources, job.partition, max_line_bytes=job.max_line_bytes))
    try:
        if hashes.sizes != [entry.get("bytes") for entry in _without_paths(sidecar.get("sources"))]:
            return None
        return _without_paths(hashes.get())
    finally:
        hashes.stop()


def _without_paths(sources: Any) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in entry.items() if name != "path"}
        for entry in sources or []
        if isinstance(entry, dict)
    ]


def _refuse_if(differing: list[str], prefix: str) -> None:
    if differing:
        raise DataError(
            f"cannot resume: {prefix} is whole, and was made with other {' and '.join(differing)}\n"
            "  choose another --output-prefix, or pass --overwrite"
        )
