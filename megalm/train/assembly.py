"""The model and its engine, of the kernels that all ranks agree on."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import nn

from megalm.config.deepspeed_json import deepspeed_json, effective_zero_stage, engine_clips, passed_on
from megalm.config.root import Config
from megalm.errors import ConfigError, MegalmError
from megalm.kernels.backend import RUNS_EVERYWHERE, Choice, choose
from megalm.models.blocks.arrangement import Spread
from megalm.models.gpt.build import build_model, build_pipeline, choose_kernels, pipeline_stages, plan_gpt
from megalm.models.gpt.weights import FIRST_BLOCK_LAYER
from megalm.parallel.random import RngStreams
from megalm.telemetry.console import Console
from megalm.topology.agree import of_first
from megalm.topology.start import device_type
from megalm.topology.topology import Topology
from megalm.train.contests import Contests
from megalm.train.cuda_graph import MicroBatchGraph
from megalm.train.engine import Engine, build_engine
from megalm.train.gradient_sums import GradientSums
from megalm.train.kernel_choice import choose_on_all_ranks
from megalm.train.optimizer import build_optimizer
from megalm.train.prepare import Plan

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What training.dtype names."""


def assemble_module(plan: Plan, topology: Topology, streams: RngStreams, console: Console) -> tuple[nn.Module, str]:
    """The whole model on one stage for ZeRO-2 and 3, otherwise this rank's pipeline stage; its attention's name."""
    config = plan.config
    documents = plan.document_rules
    dtype = TORCH_DTYPES[config.training.dtype]
    contests = Contests(config, topology.device, dtype=dtype)
    kernels, names = choose_on_all_ranks(
        _requested_kernels(config),
        lambda names: choose_kernels(
            config.model,
            device=topology.device,
            dtype=dtype,
            documents=documents,
            gelu_contest=contests.gelu_linear(),
            **names,
        ),
        topology=topology,
        console=console,
    )
    of_first(topology, partial(contests.record, names))
    model_plan = plan_gpt(
        config.model,
        seq_length=config.data.seq_length,
        kernels=kernels,
        spread=Spread(
            tp=topology.tp,
            sequence_parallel=config.parallel.sequence_parallel,
            recompute=config.parallel.recompute,
            streams=streams,
        ),
        documents=documents,
        z_loss=config.training.z_loss_coeff,
    )
    if config.parallel.zero_stage >= 2:
        model = build_model(model_plan, seed=config.training.seed, num_threads=_threads_to_draw(topology.device))
        return model, names["attention"]
    pipeline = build_pipeline(
        model_plan,
        layout=topology.layout,
        partition=config.parallel.pipeline_partition,
        seed=config.training.seed,
        num_threads=_threads_to_draw(topology.device),
    )
    for stage, layers in enumerate(pipeline.stages()):
        blocks = sum(0 <= layer - FIRST_BLOCK_LAYER < config.model.num_layers for layer in layers)
        console.info(
            f"stage {stage}: layers {layers.start} to {layers.stop - 1} of the pipeline, {blocks} of them blocks"
        )
    return pipeline, names["attention"]


def _requested_kernels(config: Config) -> dict[str, str]:
    """Operations of the model, and the implementation that is asked for: a name, or `auto`."""
    operations = ("attention", "layer_norm", "bias_gelu", "gelu_linear", "linear", "head", "dropout_add")
    return {operation: str(config.get(f"output.{operation}")) for operation in operations}


def stages(plan: Plan) -> list[range]:
    """Positions of the layers that each stage will own, without any process but this one; none under ZeRO-2 and 3,
    which have no stages.

    Raises: KernelError if a kernel that is asked for by name cannot run here; ConfigError or DataError if the model
        cannot be dealt to the stages, or no token ends its documents.
    """
    config, documents = plan.config, plan.document_rules
    named = {
        operation: RUNS_EVERYWHERE[operation] if name == "auto" else name
        for operation, name in _requested_kernels(config).items()
    }
    device = torch.device(device_type())
    choose("adamw", config.output.adamw, device)
    kernels, _ = choose_kernels(
        config.model,
        device=device,
        dtype=TORCH_DTYPES[config.training.dtype],
        documents=documents,
        gelu_contest=None,
        **named,
    )
    if config.parallel.zero_stage >= 2:
        return []
    model_plan = plan_gpt(config.model, seq_length=config.data.seq_length, kernels=kernels, documents=documents)
    return pipeline_stages(model_plan, partition=config.parallel.pipeline_partition, num_stages=config.parallel.pp)


def _threads_to_draw(device: torch.device) -> int:
    """Threads that draw initial weights: a GPU's share of the host's cores. On CPUs every core has a process."""
    if device.type != "cuda":
        return 1
    return max(1, min(16, len(os.sched_getaffinity(0)) // torch.cuda.device_count()))


def assemble_engine(
    config: Config,
    module: nn.Module,
    topology: Topology,
    console: Console,
    *,
    graph: Callable[[Any, GradientSums], MicroBatchGraph] | None,
) -> Engine:
    optimizer = build_optimizer(module, config.training, topology=topology, engine_clips=engine_clips(config))
    kernels: dict[str, Any] = {}
    if config.training.dtype == "bf16" and effective_zero_stage(config) == 1:
        kernels = _choose_update_kernels(config, topology, console)
    settings = deepspeed_json(config, dp_size=topology.dp.size)
    try:
        return build_engine(module, optimizer, settings, topology, **kernels, graph=graph)
    except (MegalmError, torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except Exception as error:  # It raises its own, RuntimeError, ValueError and AssertionError.
        keys = passed_on(config)
        if not keys:
            raise
        raise ConfigError(
            f"DeepSpeed cannot set up its engine: {type(error).__name__}: {' '.join(str(error).split())}\n"
            f"  it was given {', '.join(keys)}, set by --deepspeed_config\n"
            "  correct or remove those that this is about"
        ) from error


def _choose_update_kernels(config: Config, topology: Topology, console: Console) -> dict[str, Any]:
    """What adds bf16 gradients to their fp32 sums, and what updates with those, by the operations' names."""

    def choose_them(names: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Choice]]:
        choices = {
            operation: choose(
                operation,
                name,
                topology.device,
                hidden_size=config.model.hidden_size,
                contest=contests.adamw() if operation == "adamw" else None,
            )
            for operation, name in names.items()
        }
        return {operation: choice.implementation for operation, choice in choices.items()}, choices

    requested = {"gradient_sum": "auto", "adamw": config.output.adamw}
    contests = Contests(config, topology.device, dtype=TORCH_DTYPES[config.training.dtype])
    kernels, names = choose_on_all_ranks(requested, choose_them, topology=topology, console=console)
    of_first(topology, partial(contests.record, names))
    return kernels
