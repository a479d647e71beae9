"""Runs of a tiny model over real engines, without data files or a command line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from megalm.config.deepspeed_json import deepspeed_json, engine_clips
from megalm.config.model import ModelConfig
from megalm.config.parallel import ParallelConfig
from megalm.config.root import Config
from megalm.data.batches import Batch
from megalm.models.blocks.arrangement import Spread
from megalm.models.gpt.build import build_model, build_pipeline, plan_gpt
from megalm.parallel.random import RngStreams
from megalm.topology.start import Launch, start
from megalm.topology.topology import Topology
from megalm.train.engine import Engine, build_engine
from megalm.train.optimizer import build_optimizer
from tests.support.checkpoints import SEQ_LENGTH, config_of

GLOBAL_BATCH = 4


def tiny_config(*, tp: int = 1, pp: int = 1, zero_stage: int = 0, dtype: str = "fp32", **model: Any) -> Config:
    """Two blocks, four heads, dropout on unless said otherwise."""
    fields: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_heads": 4,
        "vocab_size": 46,
        "make_vocab_size_divisible_by": 8,
        "position_embedding": "alibi",
        "embed_layernorm": True,
        "init_std": 0.2,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        **model,
    }
    config = config_of(ModelConfig(**fields), parallel=ParallelConfig(tp=tp, pp=pp, zero_stage=zero_stage), dtype=dtype)
    return replace(config, training=replace(config.training, micro_batch_size=1, global_batch_size=GLOBAL_BATCH))


class TinyRun:
    """An engine over a tiny model, on this rank. Every construction starts afresh in the same process group."""

    def __init__(
        self, config: Config, *, topology: Topology | None = None, graph: Any = None, adamw: Any = None
    ) -> None:
        parallel = config.parallel
        self.config = config
        self.topology = topology or start(Launch.from_environment(), tp=parallel.tp, pp=parallel.pp)
        top = self.topology
        self.streams = RngStreams(config.training.seed, tp=top.tp, pp=top.pp, dp=top.dp)
        plan = plan_gpt(config.model, seq_length=SEQ_LENGTH, spread=Spread(tp=top.tp, streams=self.streams))
        if parallel.zero_stage >= 2:
            module: Any = build_model(plan, seed=1)
        else:
            module = build_pipeline(plan, layout=top.layout, partition=parallel.pipeline_partition, seed=1)
        optimizer = build_optimizer(module, config.training, topology=top, engine_clips=engine_clips(config))
        settings = deepspeed_json(config, dp_size=top.dp.size)
        self.engine: Engine = build_engine(module, optimizer, settings, top, graph=graph, adamw=adamw)

    def train(self, first: int, last: int) -> list[str]:
        """Losses of steps `first` to `last` - 1, in hexadecimal. The data of a step depends on its number alone."""
        losses = []
        for step in range(first, last):
            result = self.engine.train_step(
                self._batches(step), global_batch_size=GLOBAL_BATCH, learning_rate=1e-2 / (1 + step)
            )
            losses.append(result.loss.hex())
        return losses

    def _batches(self, step: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 46, (GLOBAL_BATCH, SEQ_LENGTH + 1), generator=generator)
        mask = torch.ones(1, SEQ_LENGTH)
        for row in range(self.topology.dp.rank, GLOBAL_BATCH, self.topology.dp.size):
            yield Batch(tokens[row : row + 1, :-1], tokens[row : row + 1, 1:], mask)

    def digest(self) -> str:
        """sha256 of this rank's parameters, optimizer state and random-number state."""
        from megalm.checkpoint.tensor_files import tensors_of

        digest = hashlib.sha256()
        optimizer = self.engine.raw.optimizer
        # Under ZeRO-3 a parameter is whole or not as it happens; its share, ds_tensor, is what there always is.
        parameters = {name: getattr(p, "ds_tensor", p) for name, p in self.engine.module.named_parameters()}
        states = {
            "parameters": parameters,
            "optimizer": optimizer.state_dict(),
            "rng": self.streams.state_dict(),
        }
        for name, tensor in tensors_of(states):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
