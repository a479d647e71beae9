"""Small configurations, and weights with values that leave no term of the model unnoticed."""

from __future__ import annotations

from typing import Any

import torch

from megalm.config.model import ModelConfig
from megalm.models.gpt.model import GPT
from megalm.models.gpt.weights import named_in_model


def bloom(**changes: Any) -> ModelConfig:
    """A BLOOM of two layers."""
    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 48,
        "num_heads": 4,
        "position_embedding": "alibi",
        "embed_layernorm": True,
        "pad_vocab_size_to": 96,
    }
    return ModelConfig(**{**values, **changes})


def gpt2(**changes: Any) -> ModelConfig:
    """A GPT-2 of two layers."""
    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 48,
        "num_heads": 4,
        "max_position_embeddings": 40,
        "pad_vocab_size_to": 96,
    }
    return ModelConfig(**{**values, **changes})


def randomise(module: GPT, *, seed: int = 0) -> None:
    """Every weight away from its initial value: biases from 0, LayerNorm weights from 1, matrices from their scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in named_in_model(module, module.plan.shape):
            is_gain = parameter.dim() == 1 and name.endswith("weight")
            parameter.normal_(1.0 if is_gain else 0.0, 0.15, generator=generator)
