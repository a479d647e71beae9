"""A checkpoint as a Hugging Face folder: streamed, hashed, proved, then published."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint import layout
from megalm.checkpoint.durable import (
    FileRecord,
    make_folder,
    publish_folder,
    remove_folder,
    rename,
    write_text,
    writing_to,
)
from megalm.checkpoint.file_ranges import BlockReader, offsets_in_file
from megalm.checkpoint.huggingface import Renamed, family_of, model_config, renamed, unchanged
from megalm.checkpoint.manifest import hash_file
from megalm.checkpoint.merge import LayerFiles
from megalm.checkpoint.safetensors_file import Bytes, Entry, write_safetensors
from megalm.checkpoint.source import open_checkpoint
from megalm.checkpoint.special_ids import ids_of_tokenizer, kept_by, special_ids
from megalm.checkpoint.tensor_files import is_finite
from megalm.errors import CheckpointError
from megalm.models.gpt.shape import GPTShape
from megalm.models.gpt.weights import Weight, weight_table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DTYPE_WORDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Progress = Callable[[str, int, int], None]
"""Called with a weight's name, its bytes, and the bytes in all."""


@dataclass
class Export:
    """A Hugging Face folder that is being made, or was."""

    folder: Path
    family: str
    shape: GPTShape
    step: int
    dtype: torch.dtype
    source: Path
    """The checkpoint."""
    num_bytes: int = 0
    files: list[FileRecord] = field(default_factory=list)
    drift: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Planned:
    weight: Weight
    renamed: Renamed
    entry: Entry


def export_checkpoint(
    checkpoint: Path,
    destination: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    save_tokenizer: Callable[[Path], int | None] | None = None,
    seq_length: int | None = None,
    prove: Callable[[Export], None] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Export:
    """Write a checkpoint's weights as a folder that transformers loads. Holds one layer in memory.

    `dtype` is fp32, bf16 or fp16; the checkpoint's own when not given. `save_tokenizer` writes the tokenizer's files
    into the folder and returns its end-of-document id. `prove` is called with the finished folder before it takes its
    name; if it raises, nothing is published. With `overwrite` an earlier export gives way to the new one.

    Raises: CheckpointError if the model cannot be expressed, the destination is there or cannot be written, or the
    checkpoint is damaged.
    """
    target = destination.resolve()  # "." has no name, and a link stays where it is
    # Names that nobody gives a folder of their own: what has them is of an export that was cut off.
    temporary = target.with_name(target.name + ".unfinished-export.tmp")
    replaced = target.with_name(target.name + ".replaced-export.tmp")
    with writing_to(destination):
        _check_destination(target, checkpoint, overwrite=overwrite)
        for folder in (temporary, replaced):
            if _is_around(folder, checkpoint):
                raise CheckpointError(f"{checkpoint} lies in {folder}, a name for what the export removes\n  rename it")
    source = open_checkpoint(checkpoint)
    shape, layers = source.shape, source.layers
    family = family_of(shape)
    chosen = DTYPES[dtype] if dtype is not None else _stored_dtype(layers)
    planned = _plan(shape, family=family, dtype=chosen)

    with writing_to(destination):
        remove_folder(temporary)
        make_folder(temporary)
    step = source.manifest.step
    export = Export(folder=temporary, family=family, shape=shape, step=step, dtype=chosen, source=layers.folder)
    try:
        with writing_to(destination):
            eod_id = save_tokenizer(temporary) if save_tokenizer is not None else None
            words = _DTYPE_WORDS[chosen]
            config = model_config(shape, family=family, dtype=words, eod_id=eod_id, seq_length=seq_length)
            with _one_torch_thread():
                _write_weights(export, layers, planned, max_shard_bytes=max_shard_bytes, progress=progress)
            _write_texts(export, config, eod_id=eod_id)
        export.drift = layers.drift
        if prove is not None:
            prove(export)
        with writing_to(destination):
            publish_folder(temporary, target, replaced=replaced)
    except BaseException:
        if not target.exists() and replaced.exists():  # interrupted between the two renames
            rename(replaced, target)
        remove_folder(temporary)
        raise
    export.folder = destination
    return export


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB.

    Raises: ValueError.
    """
    cleaned = text.strip().upper()
    for unit, factor in _UNITS.items():
        if cleaned.endswith(unit):
            return int(float(cleaned.removesuffix(unit)) * factor)
    return int(cleaned)


def _check_destination(destination: Path, checkpoint: Path, *, overwrite: bool) -> None:
    if destination.exists() and not overwrite:
        raise CheckpointError(
            f"{destination} exists, and nothing is overwritten\n  give another folder, or --overwrite"
        )
    if destination.exists() and not _is_export(destination, checkpoint):
        raise CheckpointError(
            f"--overwrite removes an earlier export, and {destination} is none, or holds other files besides\n"
            "  give another folder"
        )
    if destination.parent.exists() and not destination.parent.is_dir():
        raise CheckpointError(f"{destination.parent}, which would hold the export, is not a folder")


def _is_export(folder: Path, checkpoint: Path) -> bool:
    """Whether nothing but what an export wrote there, or nothing at all, would be lost with it."""
    if not folder.is_dir() or _is_around(folder, checkpoint):
        return False
    present = {path.name for path in folder.iterdir()}
    if not present:
        return True
    try:
        manifest = json.loads((folder / layout.MANIFEST).read_text(encoding="utf-8"))
        listed = {entry["name"] for entry in manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return "config.json" in listed and present <= {*listed, layout.MANIFEST}


def _is_around(folder: Path, checkpoint: Path) -> bool:
    """Whether a checkpoint is this folder, or lies somewhere in it."""
    return folder.resolve() in (checkpoint.resolve(), *checkpoint.resolve().parents)


def _stored_dtype(layers: LayerFiles) -> torch.dtype:
    weight = weight_table(layers.shape)[0]
    first = layers.part(weight, layers.read_layer(weight.layer)[0], 0).dtype
    if first not in _DTYPE_WORDS:
        raise CheckpointError(f"{layers.folder} holds weights of {first}\n  choose one with --dtype")
    return first


def _plan(shape: GPTShape, *, family: str, dtype: torch.dtype) -> list[_Planned]:
    planned = []
    for weight in weight_table(shape):
        form = renamed(weight, shape, family=family)
        planned.append(_Planned(weight, form, Entry(form.name, form.shape, dtype)))
    return planned


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Keep torch to the calling thread: its others wait by spinning, on the processor that hashes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_weights(
    export: Export, layers: LayerFiles, planned: list[_Planned], *, max_shard_bytes: int, progress: Progress | None
) -> None:
    shards = _shards(planned, max_shard_bytes)
    total = sum(plan.entry.num_bytes for plan in planned)
    source = _Source(layers, max((plan.entry.num_bytes for plan in planned), default=0))
    weight_map = {}

    def pieces(shard: list[_Planned]) -> Iterator[Iterator[Bytes]]:
        for plan in shard:
            yield source.pieces(plan)
            export.num_bytes += plan.entry.num_bytes
            if progress is not None:
                progress(plan.entry.name, plan.entry.num_bytes, total)

    for number, shard in enumerate(shards, start=1):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        export.files.append(write_safetensors(export.folder / name, [plan.entry for plan in shard], pieces(shard)))
        weight_map.update({plan.entry.name: name for plan in shard})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        export.files.append(write_text(export.folder / "model.safetensors.index.json", text))


class _Source:
    """The weights of a checkpoint in the bytes of an export; one layer's files are open at a time.

    Bytes that only move are read in blocks. Others are made in one of two buffers, each as large as the largest weight,
    while the one before is being written.
    """

    def __init__(self, layers: LayerFiles, buffer_bytes: int) -> None:
        self._layers = layers
        self._shards: tuple[int, list[dict[str, Any]]] = (-1, [])
        self._offsets: list[dict[int, int]] = []
        self._reader = BlockReader()
        self._buffer_bytes = buffer_bytes
        self._free: Queue[Tensor | None] = Queue()
        for _ in range(2):
            self._free.put(None)

    def pieces(self, plan: _Planned) -> Iterator[Bytes]:
        """One weight under its new name, in its new form."""
        weight = plan.weight
        if self._shards[0] != weight.layer:
            self._shards = (weight.layer, self._layers.read_layer(weight.layer))
            self._offsets = [self._offsets_of(weight, rank, state) for rank, state in enumerate(self._shards[1])]
        shards = self._shards[1]
        moved = plan.renamed.to_hf is unchanged
        parts = [self._layers.part(weight, state, rank) for rank, state in enumerate(shards)]
        if weight.partition_dim is None and len(parts) > 1:
            parts = [self._layers.merge(weight, shards)]
        cut = len(parts) > 1
        if moved and parts[0].dtype == plan.entry.dtype and (not cut or weight.partition_dim == 0):
            for rank, part in enumerate(parts):
                yield from self._moved(weight, rank, part)
            return
        target, release = self._buffer(plan.entry)
        if moved and cut and weight.partition_dim is not None:
            for part, place in zip(parts, target.chunk(len(parts), weight.partition_dim), strict=True):
                place.copy_(part)
        else:
            whole = torch.cat(parts, dim=weight.partition_dim or 0) if cut else parts[0]
            target.copy_(plan.renamed.to_hf(whole))
        if not is_finite(target):
            raise CheckpointError(
                f"{weight.name} has values that are not finite in {_DTYPE_WORDS[plan.entry.dtype]}\n"
                "  nothing was published; another --dtype holds larger numbers, or the run has diverged"
            )
        yield Bytes(target, release)

    def _offsets_of(self, weight: Weight, rank: int, state: dict[str, Any]) -> dict[int, int]:
        """Where the tensors of a layer lie in its file, by address; nothing where each weight has a file of its own."""
        if type(self._layers) is not LayerFiles:
            return {}
        tensors = [value for value in state.values() if isinstance(value, Tensor)]
        return offsets_in_file(self._layers.file_of(weight, rank), tensors)

    def _moved(self, weight: Weight, rank: int, part: Tensor) -> Iterator[Bytes]:
        """A part's bytes as they are, out of its file if it is known where they lie."""
        offset = self._offsets[rank].get(part.data_ptr()) if part.is_contiguous() else None
        if offset is None:
            yield Bytes(part.contiguous())
            return
        for data, block in self._reader.read(self._layers.file_of(weight, rank), offset, part.nbytes):
            yield Bytes(data.view(part.dtype), block.give_back)

    def _buffer(self, entry: Entry) -> tuple[Tensor, Callable[[], None]]:
        """Room for one weight, once an earlier one has left it."""
        buffer = self._free.get()
        if buffer is None:
            buffer = torch.empty(self._buffer_bytes, dtype=torch.uint8)
        owned = buffer
        return buffer[: entry.num_bytes].view(entry.dtype).view(entry.shape), lambda: self._free.put(owned)


def _shards(planned: list[_Planned], max_shard_bytes: int) -> list[list[_Planned]]:
    """Consecutive weights of at most `max_shard_bytes` each; a larger weight has a file of its own."""
    shards: list[list[_Planned]] = [[]]
    filled = 0
    for plan in planned:
        if shards[-1] and filled + plan.entry.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(plan)
        filled += plan.entry.num_bytes
    return shards


def _write_texts(export: Export, config: dict[str, Any], *, eod_id: int | None) -> None:
    """Write what is no weight. Ids that are not known are null: transformers would take its own defaults for them."""
    kept = kept_by(export.source)
    ids = special_ids(ids_of_tokenizer(export.folder, family=export.family), kept, eod_id=eod_id)
    settings = {key: kept.get(key, value) for key, value in config.items() if value is not None}
    texts = {
        "config.json": _json({**settings, **ids}),
        "generation_config.json": _json({"_from_model_config": True, **ids}),
        "README.md": _card(export),
    }
    for name, text in texts.items():
        export.files.append(write_text(export.folder / name, text))
    written = {file.name for file in export.files}
    for path in sorted(export.folder.iterdir()):
        if path.name not in written:  # the tokenizer's
            export.files.append(FileRecord(path.name, path.stat().st_size, hash_file(path)))
    manifest = {
        "step": export.step,
        "files": [{"name": f.name, "bytes": f.bytes, "sha256": f.sha256} for f in export.files],
    }
    write_text(export.folder / layout.MANIFEST, _json(manifest))


def _card(export: Export) -> str:
    shape = export.shape
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# A {export.family} model trained with megalm\n\n"
        f"{shape.num_layers} layers, hidden size {shape.hidden_size}, {shape.block.num_heads} heads, "
        f"{sum(weight.numel for weight in weight_table(shape)):,} parameters, after {export.step} steps.\n\n"
        "Fill in: training data, intended use, limits, licence.\n"
    )


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
