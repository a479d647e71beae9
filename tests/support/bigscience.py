"""Checkpoints as BigScience's trainer wrote them, pickled with modules that exist only while they are written."""

from __future__ import annotations

import argparse
import contextlib
import enum
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint import layout
from megalm.checkpoint.split import shard
from megalm.config.root import Config
from megalm.models.gpt.weights import Weight
from tests.support.checkpoints import SEQ_LENGTH, random_weights

STEP = 7


class PositionEmbeddingType(enum.Enum):
    """As in `megatron.enums`."""

    rotary = 1
    absolute = 2
    alibi = 3


@dataclass
class fragment_address:  # noqa: N801  (its name is in the files)
    """As in DeepSpeed."""

    numel: int
    start: int


@contextlib.contextmanager
def foreign_modules() -> Iterator[None]:
    """Let the classes above be those of `megatron` and of an old DeepSpeed while something is pickled."""
    homes = {"megatron": None, "megatron.enums": PositionEmbeddingType, "deepspeed_of_old": fragment_address}
    original = {cls: cls.__module__ for cls in homes.values() if cls is not None}
    for name, cls in homes.items():
        module = ModuleType(name)
        if cls is not None:
            setattr(module, cls.__name__, cls)
            cls.__module__ = name
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in homes:
            del sys.modules[name]
        for cls, module_name in original.items():
            cls.__module__ = module_name


def old_order(weight: Weight, part: Tensor, *, version: float, head_size: int) -> Tensor:
    """Rows of a fused query-key-value shard as checkpoint version 0 or 1.0 has them."""
    if ".query_key_value." not in weight.name or version >= 2.0:
        return part
    heads = part.size(0) // (3 * head_size)
    rows = part.view(heads, 3, head_size, *part.shape[1:])
    axes = (1, 0, 2) if version == 0 else (0, 2, 1)
    return rows.permute(*axes, *range(3, rows.dim())).reshape(part.shape).clone()


def write_bigscience(
    folder: Path,
    config: Config,
    *,
    tp_size: int = 2,
    dp_size: int = 2,
    version: float = 3.0,
    zipped: bool = True,
    drift: float = 0.0,
) -> dict[str, dict[str, Tensor]]:
    """Write one stage's checkpoint; returns weights and moments, whole, in today's order, by name and key. Copies of
    what tensor ranks hold alike are `drift` from each other, and from what is returned on both sides."""
    folder.mkdir(parents=True)
    head_size = config.model.head_size
    sources = {key: random_weights(config, seed=seed) for seed, key in enumerate(("fp32", "exp_avg", "exp_avg_sq"))}
    truth: dict[str, dict[str, Tensor]] = {}
    for key, weights in sources.items():
        for weight, tensor in weights:
            truth.setdefault(weight.name, {})[key] = tensor.abs() if key == "exp_avg_sq" else tensor

    def part(weight: Weight, key: str, rank: int) -> Tensor:
        whole = truth[weight.name][key]
        own = shard(weight, whole, tp_rank=rank, tp_size=tp_size).clone()
        if weight.partition_dim is None:
            own += drift * (rank - (tp_size - 1) / 2)
        return old_order(weight, own, version=version, head_size=head_size)

    table = [weight for weight, _ in sources["fp32"]]
    with foreign_modules():
        for rank in range(tp_size):
            for index in sorted({weight.layer for weight in table}):
                state = OrderedDict((w.key, part(w, "fp32", rank).bfloat16()) for w in table if w.layer == index)
                save(state, folder / layout.layer_file(index, rank), zipped)
            save(engine_state(config, tp_size, version), folder / layout.model_file(rank), zipped)
            for dp_rank in range(dp_size):
                flat = {key: torch.cat([part(w, key, rank).flatten() for w in table]) for key in sources}
                names = [(local_name(w), part(w, "fp32", rank).numel()) for w in table]
                name = layout.optimizer_file(dp_rank=dp_rank, mp_rank=rank, bf16=True)
                save(partition(flat, names, dp_rank, dp_size), folder / name, zipped)
    (folder.parent / layout.LATEST).write_text(folder.name)
    return truth


def save(state: Any, path: Path, zipped: bool) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=zipped)


def local_name(weight: Weight) -> str:
    return f"tied_modules.embed.{weight.key}" if weight.layer == 1 else f"{weight.layer}.{weight.key}"


def engine_state(config: Config, tp_size: int, version: float) -> dict[str, Any]:
    model = config.model
    alibi = model.position_embedding == "alibi"
    arguments = argparse.Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        ffn_hidden_size=model.ffn_size,
        padded_vocab_size=model.padded_vocab_size,
        max_position_embeddings=SEQ_LENGTH,
        seq_length=SEQ_LENGTH,
        position_embedding_type=PositionEmbeddingType.alibi if alibi else PositionEmbeddingType.absolute,
        embed_layernorm=model.embed_layernorm,
        layernorm_epsilon=1e-5,
        bias_gelu_fusion=True,
        glu_activation=None,
        init_method_std=model.init_std,
        bf16=True,
        params_dtype=torch.bfloat16,
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=1,
        consumed_train_samples=28,
    )
    return {
        "module": None,
        "optimizer": None,
        "args": arguments,
        "checkpoint_version": version,
        "iteration": STEP,
        "global_steps": STEP,
        "skipped_steps": 0,
        "global_samples": 28,
    }


def partition(flat: dict[str, Tensor], names: list[tuple[str, int]], rank: int, world: int) -> dict[str, Any]:
    """One rank's half of BF16_Optimizer's single group."""
    total = flat["fp32"].numel()
    size = -(-total // world)
    begin, end = rank * size, min(total, (rank + 1) * size)
    mapping: OrderedDict[str, fragment_address] = OrderedDict()
    offset = 0
    for name, count in names:
        low, high = max(begin, offset), min(end, offset + count)
        if low < high:
            mapping[name] = fragment_address(numel=high - low, start=low - begin)
        offset += count
    own = {key: tensor[begin:end].clone() for key, tensor in flat.items()}
    moments = {"step": STEP, "exp_avg": own["exp_avg"], "exp_avg_sq": own["exp_avg_sq"]}
    return {
        "optimizer_state_dict": {
            "clip_grad": 1.0,
            "base_optimizer_state": {"state": {0: moments}, "param_groups": [{"params": [0]}]},
            "single_partition_of_fp32_groups": [own["fp32"]],
            "param_slice_mappings": [mapping],
            "ds_version": "0.7.1",
        }
    }
