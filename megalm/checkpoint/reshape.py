"""A checkpoint written anew for other tensor-parallel and pipeline sizes, offline.

Loading needs no such thing; this is for handing a checkpoint on, or for sparing many ranks the same work.
"""

from __future__ import annotations

import contextlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
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
    writing_to,
)
from megalm.checkpoint.find import named_by
from megalm.checkpoint.identity import read_config
from megalm.checkpoint.manifest import Manifest
from megalm.checkpoint.optimizer_files import MASTER, MOMENTS, OptimizerFiles, read_engine_state
from megalm.checkpoint.roll_backs import KEY as ROLL_BACKS
from megalm.checkpoint.roll_backs import to_json
from megalm.checkpoint.source import Source, open_checkpoint
from megalm.checkpoint.split import check_layout, shard, write_layer_files
from megalm.checkpoint.taking_back import read_roll_backs
from megalm.checkpoint.tensor_files import DynamicLossScaler, FragmentAddress, LossScaler, write_tensors
from megalm.checkpoint.universal import pipeline_name
from megalm.errors import CheckpointError
from megalm.models.gpt.weights import FIRST_BLOCK_LAYER, Weight, weight_table

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
Progress = Callable[[str, int], None]
"""Called with what was written, and its bytes."""


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
    check_layout(source.shape, tp_size=tp_size, pp_size=pp_size)
    with offline_folder(destination, source.manifest.step) as folder:
        records = _write_layers(source, folder, tp_size=tp_size, num_threads=num_threads, progress=progress)
        optimizer = source.optimizer()
        counters = read_counters(source)
        sizes = {"tp": tp_size, "pp": pp_size, "dp": 1, "zero_stage": 1 if optimizer.exists else 0}
        manifest = replace(
            source.manifest, layout={**sizes, "dtype": source.dtype, "reshaped": True}, versions=versions()
        )
        for stage in range(pp_size):
            for tp_rank in range(tp_size):
                rank = layout.model_rank(pp_rank=stage, tp_rank=tp_rank, tp_size=tp_size)
                state = {**counters, "module": None, "optimizer": None, "dp_world_size": 1}
                records.append(write_tensors(folder / layout.model_file(rank), state))
            if optimizer.exists:
                own = _weights_of_stage(source, stage, pp_size)
                for tp_rank, record in enumerate(_write_partitions(source, optimizer, own, folder, stage, tp_size)):
                    records.append(record)
                    if progress is not None:
                        progress(f"optimizer of stage {stage}, tensor rank {tp_rank}", record.bytes)
        write_descriptions(source, folder, manifest, records)
    return destination / layout.step_folder(source.manifest.step)


@contextlib.contextmanager
def offline_folder(destination: Path, step: int, *, latest: str = layout.LATEST) -> Iterator[Path]:
    """A folder to write a checkpoint to, which is published as `destination/global_stepN` when the block ends well.

    `latest` then names it, unless it names a later step that is there.
    Raises: CheckpointError if the destination is a file, has this step already, or cannot be written.
    """
    final, temporary = destination / layout.step_folder(step), destination / layout.temporary_folder(step)
    with writing_to(destination):
        if destination.is_file():
            raise CheckpointError(f"{destination} is a file\n  give a folder")
        if final.exists():
            raise CheckpointError(f"{final} exists, and nothing is overwritten\n  give another folder")
        remove_folder(temporary)
        make_folder(temporary)
    try:
        with writing_to(destination):
            yield temporary
            publish_folder(temporary, final, replaced=destination / layout.replaced_folder(step))
            if not _names_later_step(destination / latest, step):
                replace_text(destination / latest, final.name)
    except BaseException:
        remove_folder(temporary)
        raise


def _names_later_step(latest: Path, step: int) -> bool:
    try:
        named = named_by(latest)
    except (OSError, ValueError):
        return False
    later = layout.parse_step(named.name)
    return later is not None and later > step and named.is_dir()


def _write_layers(
    source: Source, folder: Path, *, tp_size: int, num_threads: int, progress: Progress | None
) -> list[FileRecord]:
    def convert(index: int) -> list[FileRecord]:
        shards = source.layers.read_layer(index)
        weights = [weight for weight in weight_table(source.shape) if weight.layer == index]
        merged = ((weight, source.layers.merge(weight, shards)) for weight in weights)
        written = write_layer_files(folder, merged, tp_size=tp_size)
        if progress is not None:
            progress(f"layer {index}", sum(record.bytes for record in written))
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


def _write_partitions(
    source: Source, optimizer: OptimizerFiles, weights: list[Weight], folder: Path, stage: int, tp_size: int
) -> Iterator[FileRecord]:
    """The optimizer states of a stage's tensor ranks as ZeRO-1 has them on one data rank: matrices flat, and vectors
    flat. Each state is read whole once, and cut into files that the ranks' partitions are then written from."""
    settings = parameter_groups(source, optimizer)
    groups = [[w for w in weights if (len(w.shape) >= 2) == matrices] for matrices in (True, False)]
    ranks = [layout.model_rank(pp_rank=stage, tp_rank=tp_rank, tp_size=tp_size) for tp_rank in range(tp_size)]
    scratch: dict[tuple[int, int, str], Path] = {}
    flat: dict[tuple[int, int, str], Tensor] = {}
    mappings: list[OrderedDict[str, FragmentAddress]] = []
    steps = []
    for number, group in enumerate(groups):
        counts = [w.numel if w.partition_dim is None else w.numel // tp_size for w in group]
        for rank in ranks:
            for key in (MASTER, *MOMENTS):
                path = scratch[rank, number, key] = folder / f"scratch_{rank}_{number}_{key}"
                flat[rank, number, key] = torch.from_file(str(path), shared=True, size=sum(counts), dtype=torch.float32)
        addresses: OrderedDict[str, FragmentAddress] = OrderedDict()
        offset, step = 0, 0.0
        for weight, count in zip(group, counts, strict=True):
            for key in (MASTER, *MOMENTS):
                whole = whole_state(source, optimizer, weight, key)
                for tp_rank, rank in enumerate(ranks):
                    part = shard(weight, whole, tp_rank=tp_rank, tp_size=tp_size)
                    flat[rank, number, key][offset : offset + count].copy_(part.reshape(-1))
            step = optimizer.state(weight, 0).step
            addresses[pipeline_name(weight, source.shape)] = FragmentAddress(numel=count, start=offset)
            offset += count
        mappings.append(addresses)
        steps.append(step)
    for rank in ranks:
        moments = {
            number: {"step": torch.tensor(step), **{key: flat.pop((rank, number, key)) for key in MOMENTS}}
            for number, step in enumerate(steps)
        }
        state = {
            "base_optimizer_state": {
                "state": moments,
                "param_groups": [{**group, "params": [number]} for number, group in enumerate(settings)],
            },
            "single_partition_of_fp32_groups": [flat.pop((rank, number, MASTER)) for number in range(len(groups))],
            "param_slice_mappings": mappings,
            **loss_scaler_state(optimizer),
        }
        name = layout.optimizer_file(dp_rank=0, mp_rank=rank, bf16=source.dtype == "bf16")
        yield write_tensors(folder / name, {"optimizer_state_dict": state})
        for number in range(len(groups)):
            for key in (MASTER, *MOMENTS):
                unlink(scratch[rank, number, key])


def parameter_groups(source: Source, optimizer: OptimizerFiles) -> list[dict[str, Any]]:
    """What matrices are optimised with, and what vectors: the two groups of megalm's and Megatron's optimizers."""
    found = optimizer.parameter_groups() if optimizer.exists else []
    if len(found) == 2 and all("lr" in group for group in found):
        return found
    config = read_config(source.folder)
    if config is None:
        return [{}, {}]
    training = config.training
    common = {"lr": training.lr, "betas": (training.adam_beta1, training.adam_beta2), "eps": training.adam_eps}
    return [{**common, "weight_decay": training.weight_decay}, {**common, "weight_decay": 0.0}]


def loss_scaler_state(optimizer: OptimizerFiles) -> dict[str, Any]:
    """The scale of an fp16 run's loss as DeepSpeed keeps it; nothing where there is none."""
    found = optimizer.loss_scaler() if optimizer.exists else None
    if found is None:
        return {}
    dynamic = "cur_iter" in found
    scaler = DynamicLossScaler() if dynamic else LossScaler()
    vars(scaler).update(found)
    return {"loss_scaler": scaler, "dynamic_loss_scale": dynamic}


def whole_state(source: Source, optimizer: OptimizerFiles, weight: Weight, key: str) -> Tensor:
    """A state of one weight, whole; fp32 runs without ZeRO keep no second copy of the weight itself, and before the
    first update there are no moments."""
    state = optimizer.state(weight, 0) if optimizer.exists else None
    if state is not None and key in state.pieces:
        return optimizer.whole(weight, key)
    if key == MASTER:
        return source.layers.merge(weight, source.layers.read_layer(weight.layer)).float()
    if state is not None and state.step == 0:
        return torch.zeros(weight.shape)
    raise CheckpointError(f"{source.folder} has no {key} of {weight.name}")


def read_counters(source: Source) -> dict[str, int]:
    """DeepSpeed's own counts of steps and samples."""
    names = (layout.model_file(0), layout.sharded_model_file(dp_rank=0, mp_rank=0))
    found: dict[str, int] = {}
    for name in names:
        state = read_engine_state(source.folder / name, read=source.read)
        found.update({counter: state[counter] for counter in COUNTERS if isinstance(state.get(counter), int)})
    return found


def write_descriptions(source: Source, folder: Path, manifest: Manifest, records: list[FileRecord]) -> None:
    """Write progress and configuration as the source has them, then the manifest of everything.

    Steps ahead that the source's folder says are left out are in the progress: the copy may lie elsewhere.
    Raises: CheckpointError if nobody can read which they are.
    """
    state = dict(source.train_state)
    ahead = [entry for entry in read_roll_backs(source.folder.parent) if entry.first > manifest.step]
    if ahead:
        known = state.get(ROLL_BACKS) or []
        state[ROLL_BACKS] = [*known, *(entry for entry in to_json(ahead) if entry not in known)]
    own = [write_text(folder / layout.TRAIN_STATE, json.dumps(state, indent=1) + "\n")]
    config = source.folder / layout.CONFIG
    if config.is_file():
        own.append(write_text(folder / layout.CONFIG, config.read_text(encoding="utf-8")))
    files = tuple(sorted([*records, *own], key=lambda record: record.name))
    write_text(folder / layout.MANIFEST, replace(manifest, files=files).to_json())
