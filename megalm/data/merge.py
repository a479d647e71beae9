"""Several corpora written one after the other as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megalm.data.indexed import IndexedDataset, index_path, tokens_path
from megalm.data.indexed_writer import IndexedWriter
from megalm.data.sidecar import COUNTS, check_hash, read_sidecar
from megalm.errors import DataError

SEQUENCES = 1 << 18
"""Sequences copied at a time."""

TOKENS = 1 << 23
"""Tokens copied at a time, unless a single sequence is longer."""


def merge_datasets(prefixes: Sequence[str | Path], output: str | Path, *, overwrite: bool = False) -> IndexedDataset:
    """Write the documents of all corpora, in this order, as one corpus.

    The bytes are those that tokenizing the inputs one after the other would have given. Corpora with sidecars are
    verified: their hashes, one tokenizer, and, for the parts of a partitioned corpus, that all are there in order.
    Raises: DataError where they are not, and for corpora of different dtypes.
    """
    if not prefixes:
        raise DataError("no corpus to merge\n  give one prefix or more")
    parts = [IndexedDataset(prefix) for prefix in prefixes]
    if any(Path(part.prefix).resolve() == Path(output).resolve() for part in parts):
        raise DataError(f"{output} is both input and output")
    for part in parts[1:]:
        if part.dtype != parts[0].dtype:
            raise DataError(
                f"{part.prefix} holds {part.dtype.name} ids, {parts[0].prefix} holds {parts[0].dtype.name}\n"
                "  tokenize one of them again, with the other's tokenizer and --pad-vocab-size-to"
            )
    sidecars = [read_sidecar(part.prefix) for part in parts]
    _check_tokenizers(parts, sidecars)
    _check_partitions(parts, sidecars)
    for part, sidecar in zip(parts, sidecars, strict=True):
        if sidecar is not None:
            check_hash(tokens_path(part.prefix), sidecar["files"]["bin"])
            check_hash(index_path(part.prefix), sidecar["files"]["idx"])
    writer = IndexedWriter(output, parts[0].dtype, overwrite=overwrite)
    try:
        for part in parts:
            _append(writer, part)
    except BaseException:
        writer.abort()
        raise
    writer.publish(sidecar=_merged_sidecar(parts, sidecars))
    return IndexedDataset(output)


def partition_order(prefixes: Sequence[str]) -> list[str]:
    """The parts of a partitioned corpus in order; other corpora as they are."""
    numbers = {}
    for prefix in prefixes:
        found = _partition(read_sidecar(prefix))
        if found is None:
            return list(prefixes)
        numbers[prefix] = int(found["index"])
    return sorted(prefixes, key=lambda prefix: numbers[prefix])


def _check_tokenizers(parts: Sequence[IndexedDataset], sidecars: Sequence[dict[str, Any] | None]) -> None:
    seen: dict[str, str] = {}
    for part, sidecar in zip(parts, sidecars, strict=True):
        digest = ((sidecar or {}).get("tokenizer") or {}).get("digest")
        if digest is not None:
            seen.setdefault(str(digest), part.prefix)
    if len(seen) > 1:
        one, other = list(seen.values())[:2]
        raise DataError(
            f"{one} and {other} were made with different tokenizers, as their sidecars say\n"
            "  tokenize them again with one tokenizer"
        )


def _partition(sidecar: dict[str, Any] | None) -> dict[str, Any] | None:
    found: dict[str, Any] | None = (sidecar or {}).get("partition") or None
    if found is not None and not ({"index", "count", "corpus"} <= set(found)):
        raise DataError(f"a sidecar describes its partition as {found}\n  tokenize that part again")
    return found


def _check_partitions(parts: Sequence[IndexedDataset], sidecars: Sequence[dict[str, Any] | None]) -> None:
    """All parts of one partitioned corpus, in order; or no part of any."""
    found = [_partition(sidecar) for sidecar in sidecars]
    if all(one is None for one in found):
        return
    first = next(one for one in found if one is not None)
    name = next(part.prefix for part, one in zip(parts, found, strict=True) if one is not None)
    for part, sidecar, one in zip(parts, sidecars, found, strict=True):
        if one is None:
            raise DataError(
                f"{name} is a part of a corpus, {part.prefix} is none\n  merge the parts first, then what else there is"
            )
        if (one["corpus"], one["count"]) != (first["corpus"], first["count"]):
            raise DataError(
                f"{name} and {part.prefix} are parts of different corpora: "
                "files, sizes, tokenizer, flags or the number of parts differ\n  tokenize all parts of the same --input"
            )
        if (sidecar or {}).get("key") != (sidecars[0] or {}).get("key"):
            raise DataError(
                f"{name} and {part.prefix} hold different keys\n  merge the parts of each key by themselves"
            )
    given = [int(one["index"]) for one in found if one is not None]
    missing = sorted(set(range(int(first["count"]))) - set(given))
    if missing:
        raise DataError(
            f"part {', '.join(map(str, missing))} of {first['count']} is missing\n"
            "  without it the corpus would have a gap: tokenize it, or copy it here"
        )
    if given != list(range(int(first["count"]))):
        raise DataError(
            f"the parts come in the order {', '.join(map(str, given))}\n"
            f"  give each once, in the order 0 to {first['count'] - 1}, or give their folder"
        )


def _merged_sidecar(parts: Sequence[IndexedDataset], sidecars: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """What the parts have in common, their sources one after the other, and where each part came from."""
    known = [sidecar for sidecar in sidecars if sidecar is not None]
    content: dict[str, Any] = {
        "merged": [
            {"prefix": part.prefix, "documents": part.num_documents, "tokens": part.num_tokens, **_origin(sidecar)}
            for part, sidecar in zip(parts, sidecars, strict=True)
        ]
    }
    if len(known) < len(parts):
        return content
    first = known[0]
    counted = {"files", "documents", "sequences", "tokens", "sources", "flags", "partition", "merged", *COUNTS}
    content |= {
        name: value
        for name, value in first.items()
        if name not in counted and all(other.get(name) == value for other in known)
    }
    content["sources"] = [source for sidecar in known for source in sidecar.get("sources") or []]
    for name in COUNTS:
        content[name] = round(sum(sidecar.get(name) or 0 for sidecar in known), 3)
    return content


def _origin(sidecar: dict[str, Any] | None) -> dict[str, Any]:
    """The hashes and the command line of a part."""
    if sidecar is None:
        return {}
    hashes = {name: file["sha256"] for name, file in sidecar["files"].items()}
    return {**hashes, **({"flags": sidecar["flags"]} if "flags" in sidecar else {})}


def _append(writer: IndexedWriter, part: IndexedDataset) -> None:
    """Copy whole documents, many at a time."""
    document = 0
    starts = part.pointers // part.dtype.itemsize
    while document < part.num_documents:
        first = int(part.document_index[document])
        begin = int(starts[first]) if first < part.num_sequences else part.num_tokens
        by_tokens = int(np.searchsorted(starts, begin + TOKENS))
        last = max(first + 1, min(by_tokens, first + SEQUENCES))
        stop = max(document + 1, int(np.searchsorted(part.document_index, last, side="right")) - 1)
        bounds = np.asarray(part.document_index[document : stop + 1])
        lengths = np.asarray(part.lengths[bounds[0] : bounds[-1]])
        end = begin + int(lengths.sum(dtype=np.int64))
        writer.add_packed(part.tokens[begin:end], lengths, np.diff(bounds))
        document = stop
