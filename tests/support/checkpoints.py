"""Small checkpoints made without a training run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megalm.checkpoint import layout
from megalm.checkpoint.durable import write_text
from megalm.checkpoint.identity import model_fields
from megalm.checkpoint.manifest import Manifest
from megalm.checkpoint.split import write_layer_files
from megalm.config.data import DataConfig
from megalm.config.model import ModelConfig
from megalm.config.output import OutputConfig
from megalm.config.parallel import ParallelConfig
from megalm.config.root import Config
from megalm.config.training import TrainingConfig
from megalm.config.yaml_file import config_to_yaml
from megalm.models.gpt.shape import gpt_shape
from megalm.models.gpt.weights import Weight, weight_table

SEQ_LENGTH = 32


def bloom_config(*, num_heads: int = 4, num_layers: int = 2, vocab_size: int = 48) -> Config:
    """A tiny BLOOM."""
    return config_of(
        ModelConfig(
            num_layers=num_layers,
            hidden_size=8 * num_heads,
            num_heads=num_heads,
            position_embedding="alibi",
            embed_layernorm=True,
            vocab_size=vocab_size,
            make_vocab_size_divisible_by=8,
            init_std=0.2,
        )
    )


def gptmeg_config(*, num_heads: int = 4, num_layers: int = 2, vocab_size: int = 48) -> Config:
    """A tiny GPT-2."""
    return config_of(
        ModelConfig(
            num_layers=num_layers,
            hidden_size=8 * num_heads,
            num_heads=num_heads,
            vocab_size=vocab_size,
            make_vocab_size_divisible_by=8,
            init_std=0.2,
        )
    )


def config_of(model: ModelConfig, *, parallel: ParallelConfig | None = None, dtype: str = "fp32") -> Config:
    """A configuration around a model."""
    return Config(
        model=model,
        parallel=parallel or ParallelConfig(),
        training=TrainingConfig(micro_batch_size=2, train_iters=10, lr=1e-2, dtype=dtype),
        data=DataConfig(seq_length=SEQ_LENGTH),
        output=OutputConfig(),
    )


def random_weights(config: Config, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[tuple[Weight, Tensor]]:
    """Weights that no two of which are alike, LayerNorms and biases included."""
    generator = torch.Generator().manual_seed(seed)
    shape = gpt_shape(config.model, seq_length=config.data.seq_length)
    weights = []
    for weight in weight_table(shape):
        tensor = torch.randn(weight.shape, generator=generator) * 0.2
        if "layernorm.weight" in weight.name or weight.name == "ln_f.weight":
            tensor += 1.0
        weights.append((weight, tensor.to(dtype)))
    return weights


def write_checkpoint(
    folder: Path, config: Config, *, tp_size: int = 1, step: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[tuple[Weight, Tensor]]:
    """Write a checkpoint of weights alone; returns the weights, whole."""
    folder.mkdir(parents=True)
    weights = random_weights(config, seed=seed, dtype=dtype)
    records = write_layer_files(folder, weights, tp_size=tp_size)
    records.append(write_text(folder / layout.TRAIN_STATE, f'{{"step": {step}}}'))
    records.append(write_text(folder / layout.CONFIG, config_to_yaml(config)))
    sizes = {"tp": tp_size, "pp": 1, "dp": 1, "zero_stage": 0, "dtype": "fp32"}
    manifest = Manifest(step=step, layout=sizes, model=model_fields(config), versions={}, files=tuple(records))
    write_text(folder / layout.MANIFEST, manifest.to_json())
    return weights
