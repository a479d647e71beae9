"""A checkpoint of any layout as DeepSpeed's universal form, which stock DeepSpeed loads at any other."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint import layout
from megalm.checkpoint.draft import versions
from megalm.checkpoint.durable import FileRecord, make_folder, sync_folder
from megalm.checkpoint.identity import read_config
from megalm.checkpoint.optimizer_files import MASTER, MOMENTS, OptimizerFiles
from megalm.checkpoint.reshape import (
    Progress,
    loss_scaler_state,
    offline_folder,
    parameter_groups,
    read_counters,
    whole_state,
    write_descriptions,
)
from megalm.checkpoint.source import Source, open_checkpoint
from megalm.checkpoint.tensor_files import snapshot, write_tensors
from megalm.checkpoint.universal import (
    CAT_DIM,
    DESCRIPTION_KEY,
    INFO_KEY,
    ORIGIN,
    PARAM,
    VOCABULARY,
    description,
    pipeline_name,
    universal_info,
)
from megalm.models.gpt.weights import Weight, weight_table


def write_universal(
    checkpoint: Path, destination: Path, *, num_threads: int = 4, progress: Progress | None = None
) -> Path:
    """Write `destination/global_stepN` in universal form, and `latest_universal` beside it.

    Layers are converted in parallel, one tensor in memory a thread. A checkpoint without optimizer states gives fp32
    weights alone.
    Raises: CheckpointError if the checkpoint is damaged, or the destination has this step already.
    """
    source = open_checkpoint(checkpoint)
    with offline_folder(destination, source.manifest.step, latest=layout.LATEST_UNIVERSAL) as folder:
        optimizer = source.optimizer()
        records = _write_parameters(source, optimizer, folder, num_threads=num_threads, progress=progress)
        records.append(_write_common(source, optimizer, folder))
        sizes = {"tp": 1, "pp": 1, "dp": 1, "zero_stage": 1, "dtype": source.dtype, "origin": ORIGIN}
        manifest = replace(source.manifest, layout=sizes, versions=versions())
        records.append(
            write_tensors(
                folder / layout.model_file(0),
                {
                    **read_counters(source),
                    "module": None,
                    "optimizer": None,
                    "lr_scheduler": None,
                    "dp_world_size": 1,
                    "mp_world_size": 1,
                    "iteration": source.manifest.step,
                    INFO_KEY: universal_info(source.shape, pipelined=True),
                    DESCRIPTION_KEY: description(manifest, source.train_state),
                },
            )
        )
        sync_folder(folder / layout.UNIVERSAL_FOLDER)
        write_descriptions(source, folder, manifest, records)
    return destination / layout.step_folder(source.manifest.step)


def _write_parameters(
    source: Source, optimizer: OptimizerFiles, folder: Path, *, num_threads: int, progress: Progress | None
) -> list[FileRecord]:
    def convert(weights: list[Weight]) -> list[FileRecord]:
        records = [record for weight in weights for record in _write_parameter(source, optimizer, folder, weight)]
        if progress is not None:
            progress(f"layer {weights[0].layer}", sum(record.bytes for record in records))
        return records

    layers = [list(layer) for _, layer in groupby(weight_table(source.shape), key=lambda weight: weight.layer)]
    with ThreadPoolExecutor(max_workers=num_threads) as pool:
        return [record for written in pool.map(convert, layers) for record in written]


def _write_parameter(source: Source, optimizer: OptimizerFiles, folder: Path, weight: Weight) -> Iterator[FileRecord]:
    name = pipeline_name(weight, source.shape)
    make_folder((folder / layout.universal_file(name, MASTER)).parent)

    def write(key: str, state: Any) -> FileRecord:
        member = layout.universal_file(name, key)
        return replace(write_tensors(folder / member, state), name=member)

    extra: dict[str, Any] = {}
    if weight.partition_dim is not None:
        extra[CAT_DIM] = weight.partition_dim
    if weight.name in ("word_embeddings.weight", "lm_head.weight"):
        extra[VOCABULARY] = True
    state = optimizer.state(weight, 0) if optimizer.exists else None
    for key in (MASTER, *MOMENTS):
        if key == MASTER or (state is not None and key in state.pieces):
            tensor = whole_state(source, optimizer, weight, key)
            yield write(key, {**extra, PARAM: snapshot(tensor, copy=False)})
    if state is not None:
        yield write("step", torch.tensor(state.step, dtype=torch.float32))
    sync_folder((folder / layout.universal_file(name, MASTER)).parent)


def _write_common(source: Source, optimizer: OptimizerFiles, folder: Path) -> FileRecord:
    """What DeepSpeed keeps once: settings of each parameter group, and the loss scale."""
    config = read_config(source.folder)
    groups = parameter_groups(source, optimizer)
    state: dict[str, Any] = {
        "param_groups": [{**group, "params": [number]} for number, group in enumerate(groups)],
        "clip_grad": 0.0 if config is None else config.training.clip_grad,
        "zero_stage": 1,
        "partition_count": [1] * len(groups),
        "group_paddings": [0] * len(groups),
        "overflow": False,
        "ds_version": versions().get("deepspeed", "0.19.8"),
        **loss_scaler_state(optimizer),
    }
    member = f"{layout.UNIVERSAL_FOLDER}/{layout.UNIVERSAL_OPTIMIZER}"
    return replace(write_tensors(folder / member, state), name=member)
