"""Rules for the DeepSpeed keys that are passed on: what this engine would ignore or get wrong is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megalm.config.deepspeed_json import effective_zero_stage
from megalm.config.failures import Failure, origin_of
from megalm.config.root import Config

IN_FILE = "in the DeepSpeed configuration"
OFFLOADED = {"offload_optimizer": 2, "cpu_offload": 2, "offload_param": 3, "cpu_offload_param": 3}
"""Keys that keep state in the host's memory, and the least ZeRO stage whose engine does so."""
WITHOUT_MASTERS = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
COUNTS = ("steps_per_print", "gradient_accumulation_steps")


def deepspeed_failures(config: Config) -> Iterator[Failure]:
    """What cannot be obeyed of `config.deepspeed`."""
    for key in COUNTS:
        value = config.deepspeed.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            yield Failure(f"{key} = {value!r} must be a whole number greater than 0", IN_FILE, "or remove it")
    zero = config.deepspeed.get("zero_optimization", {})
    yield from _zero_blocks(config, zero)
    yield from _instruments(config)
    for key, without in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
        if config.deepspeed.get(key, without) == without:
            continue
        if config.parallel.zero_stage == 3:
            yield Failure(f"{key} cannot be combined with ZeRO-3", IN_FILE, "remove it, or --zero-stage 0 or 1")
        elif config.parallel.zero_stage == 2 and zero.get("reduce_scatter", True):
            yield Failure(
                f"{key} cannot be combined with ZeRO-2, which reduce-scatters",
                IN_FILE,
                "remove it, or --zero-stage 0 or 1, or zero_optimization.reduce_scatter = false",
            )
        elif _sums_in_fp32(config):
            yield Failure(f"{key} guards sums in 16 bits, and bf16 gradients are summed in fp32", IN_FILE, "remove it")
    for key in WITHOUT_MASTERS:
        if config.deepspeed.get("bf16", {}).get(key):
            yield from _of_later_stage(config, f"bf16.{key}", 2)


def _sums_in_fp32(config: Config) -> bool:
    """Whether replicas average the fp32 sums of gradients by `train/gradient_sums.py`."""
    in_fp32 = config.deepspeed.get("communication_data_type", "fp32") == "fp32"
    return config.training.dtype == "bf16" and effective_zero_stage(config) == 1 and in_fp32


def _zero_blocks(config: Config, zero: Mapping[str, Any]) -> Iterator[Failure]:
    for key, least in OFFLOADED.items():
        offload = zero.get(key)
        asked = offload.get("device", "none") != "none" if isinstance(offload, Mapping) else bool(offload)
        if asked:
            yield from _of_later_stage(config, f"zero_optimization.{key}", least)
    if zero.get("round_robin_gradients"):
        # DeepSpeed 0.19 orders the shards by it and describes them without: at another layout weights change places.
        yield Failure(
            "zero_optimization.round_robin_gradients makes checkpoints that load wrong at another layout",
            IN_FILE,
            "remove it",
        )


def _instruments(config: Config) -> Iterator[Failure]:
    if config.deepspeed.get("comms_logger", {}).get("enabled"):
        yield Failure(
            "comms_logger would miss the messages of tensor parallelism, which are not DeepSpeed's",
            IN_FILE,
            "remove it; --profile shows every message",
        )
    if config.deepspeed.get("flops_profiler", {}).get("enabled") and effective_zero_stage(config) < 2:
        # The pipeline's engine starts it and never prints.
        yield Failure(
            f"flops_profiler prints nothing under ZeRO-{effective_zero_stage(config)}",
            IN_FILE,
            "remove it; every step's line has its TFLOP/s, and --profile the time of every kernel",
        )


def _of_later_stage(config: Config, key: str, least: int) -> Iterator[Failure]:
    stage = config.parallel.zero_stage
    if stage < least:
        yield Failure(
            f"{key} needs parallel.zero_stage = {least} or more, not {stage}",
            origin_of("parallel.zero_stage", config.source("parallel.zero_stage")),
            f"--zero-stage {least}, or remove {key.rpartition('.')[2]} from the DeepSpeed configuration",
        )
