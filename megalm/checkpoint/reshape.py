"""A checkpoint written anew for other tensor-parallel and pipeline sizes, offline.

Loading needs no such thing; this is for handing a checkpoint on, or for sparing many ranks the same work.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint import layout
from megalm.checkpoint.draft import versions
from megalm.checkpoint.durable import (
    FileRecord,
    make_folder,
    publish_folder,
    remove_folder,
    replace_text,
    unlink,
    write_text,
)
from megalm.checkpoint.manifest import Manifest
from megalm.checkpoint.optimizer_files import MASTER, MOMENTS, OptimizerFiles, read_engine_state
from megalm.checkpoint.source import Source, open_checkpoint
from megalm.checkpoint.split import shard, write_layer_files
from megalm.checkpoint.tensor_files import FragmentAddress, write_tensors
from megalm.errors import CheckpointError
from megalm.models.gpt.weights import EMBEDDING_LAYER, FIRST_BLOCK_LAYER, Weight, weight_table

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
Progress = Callable[[str], None]


def reshape_checkpoint(
    checkpoint: Path,
    destination: Path,
    *,
    tp_size: int,
    pp_size: int,
    num_threads: int = 4,
    progress: Progress | None = None,
) -> Path:
    """Write `destination/global_stepN` with the weights and optimizer states of `checkpoint`, for tp_size x pp_size.

    Layers are converted in parallel, one in memory a thread; optimizer partitions are built in files. Random-number
    states belong to the old ranks and are left out.
    Raises: CheckpointError if the sizes do not fit the model, or the destination has this step already.
    """
    source = open_checkpoint(checkpoint)
    step = source.manifest.step
    final = destination / layout.step_folder(step)
    if final.exists():
        raise CheckpointError(f"{final} exists, and nothing is overwritten\n  give another folder")
    if not 1 <= pp_size <= source.shape.num_layers:
        raise CheckpointError(f"{pp_size} pipeline stages do not fit {source.shape.num_layers} layers\n  give fewer")
    for weight in weight_table(source.shape):
        shard(weight, torch.empty(weight.shape, device="meta"), tp_rank=0, tp_size=tp_size)
    temporary = destination / layout.temporary_folder(step)
    remove_folder(temporary)
    make_folder(temporary)
    try:
        records = _write_layers(source, temporary, tp_size=tp_size, num_threads=num_threads, progress=progress)
        optimizer = source.optimizer()
        counters = _counters(source)
        for stage in range(pp_size):
            for tp_rank in range(tp_size):
                rank = layout.model_rank(pp_rank=stage, tp_rank=tp_rank, tp_size=tp_size)
                state = {**counters, "module": None, "optimizer": None, "dp_world_size": 1}
                records.append(write_tensors(temporary / layout.model_file(rank), state))
                if optimizer.exists:
                    own = _weights_of_stage(source, stage, pp_size)
                    records.append(_write_partition(source, optimizer, own, temporary, rank, tp_rank, tp_size))
                    if progress is not None:
                        progress(f"optimizer of stage {stage}, tensor rank {tp_rank}")
        _write_descriptions(source, temporary, records, tp_size=tp_size, pp_size=pp_size, optimizer=optimizer.exists)
        publish_folder(temporary, final, replaced=destination / layout.replaced_folder(step))
        replace_text(destination / layout.LATEST, final.name)
    except BaseException:
        remove_folder(temporary)
        raise
    return final


def _write_layers(
    source: Source, folder: Path, *, tp_size: int, num_threads: int, progress: Progress | None
) -> list[FileRecord]:
    def convert(index: int) -> list[FileRecord]:
        shards = source.layers.read_layer(index)
        weights = [weight for weight in weight_table(source.shape) if weight.layer == index]
        merged = ((weight, source.layers.merge(weight, shards)) for weight in weights)
        written = write_layer_files(folder, merged, tp_size=tp_size)
        if progress is not None:
            progress(f"layer {index}")
        return written

    layers = sorted({weight.layer for weight in weight_table(source.shape)})
    with ThreadPoolExecutor(max_workers=num_threads) as pool:
        return [record for written in pool.map(convert, layers) for record in written]


def _weights_of_stage(source: Source, stage: int, pp_size: int) -> list[Weight]:
    """Blocks dealt evenly; what lies before and after them with the first and the last."""

    def stage_of(weight: Weight) -> int:
        block = min(max(weight.layer - FIRST_BLOCK_LAYER, 0), source.shape.num_layers - 1)
        return block * pp_size // source.shape.num_layers

    return [weight for weight in weight_table(source.shape) if stage_of(weight) == stage]


def _write_partition(
    source: Source,
    optimizer: OptimizerFiles,
    weights: list[Weight],
    folder: Path,
    rank: int,
    tp_rank: int,
    tp_size: int,
) -> FileRecord:
    """One rank's optimizer state as ZeRO-1 has it on one data rank: a single group, flat."""
    counts = [w.numel if w.partition_dim is None else w.numel // tp_size for w in weights]
    scratch = {key: folder / f"scratch_{rank}_{key}" for key in (MASTER, *MOMENTS)}
    flat = {
        key: torch.from_file(str(path), shared=True, size=sum(counts), dtype=torch.float32)
        for key, path in scratch.items()
    }
    addresses: OrderedDict[str, FragmentAddress] = OrderedDict()
    offset, step = 0, 0.0
    for weight, count in zip(weights, counts, strict=True):
        for key, target in flat.items():
            whole = _whole(source, optimizer, weight, key)
            part = shard(weight, whole, tp_rank=tp_rank, tp_size=tp_size)
            target[offset : offset + count].copy_(part.reshape(-1))
        step = optimizer.state(weight, 0).step
        prefix = "tied_modules.embed" if weight.layer == EMBEDDING_LAYER else str(weight.layer)
        addresses[f"{prefix}.{weight.key}"] = FragmentAddress(numel=count, start=offset)
        offset += count
    moments: dict[str, Any] = {"step": torch.tensor(step), **{key: flat[key] for key in MOMENTS}}
    state = {
        "optimizer_state_dict": {
            "base_optimizer_state": {"state": {0: moments}, "param_groups": [{"params": [0]}]},
            "single_partition_of_fp32_groups": [flat[MASTER]],
            "param_slice_mappings": [addresses],
        }
    }
    bf16 = source.manifest.layout.get("dtype") == "bf16"
    record = write_tensors(folder / layout.optimizer_file(dp_rank=0, mp_rank=rank, bf16=bf16), state)
    for path in scratch.values():
        unlink(path)
    return record


def _whole(source: Source, optimizer: OptimizerFiles, weight: Weight, key: str) -> Tensor:
    """A state of one weight, whole; fp32 runs without ZeRO keep no second copy of the weight itself."""
    if key in optimizer.state(weight, 0).pieces:
        return optimizer.whole(weight, key)
    if key == MASTER:
        return source.layers.merge(weight, source.layers.read_layer(weight.layer)).float()
    raise CheckpointError(f"{source.folder} has no {key} of {weight.name}")


def _counters(source: Source) -> dict[str, int]:
    names = (layout.model_file(0), layout.sharded_model_file(dp_rank=0, mp_rank=0))
    found: dict[str, int] = {}
    for name in names:
        state = read_engine_state(source.folder / name, read=source.read)
        found.update({counter: state[counter] for counter in COUNTERS if isinstance(state.get(counter), int)})
    return found


def _write_descriptions(
    source: Source, folder: Path, records: list[FileRecord], *, tp_size: int, pp_size: int, optimizer: bool
) -> None:
    records.append(write_text(folder / layout.TRAIN_STATE, json.dumps(source.train_state, indent=1) + "\n"))
    config = source.folder / layout.CONFIG
    if config.is_file():
        records.append(write_text(folder / layout.CONFIG, config.read_text(encoding="utf-8")))
    sizes = {"tp": tp_size, "pp": pp_size, "dp": 1, "zero_stage": 1 if optimizer else 0}
    manifest: Manifest = replace(
        source.manifest,
        layout={**sizes, "dtype": source.manifest.layout.get("dtype"), "reshaped": True},
        versions=versions(),
        files=tuple(sorted(records, key=lambda record: record.name)),
    )
    write_text(folder / layout.MANIFEST, manifest.to_json())
