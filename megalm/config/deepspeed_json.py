"""The DeepSpeed JSON: built from the Config for the engine, and read from the file that launch scripts pass."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from megalm.config.failures import Failure, nearest, origin_of
from megalm.config.root import Config, option_table
from megalm.config.settings import Settings
from megalm.config.values import from_yaml

# Keys that are fields of megalm: JSON path -> dotted path.
FIELDS = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_clipping": "training.clip_grad",
    "zero_optimization.stage": "parallel.zero_stage",
    "fp16.loss_scale": "training.loss_scale",
    "fp16.initial_scale_power": "training.initial_loss_scale",
    "fp16.loss_scale_window": "training.loss_scale_window",
    "fp16.hysteresis": "training.hysteresis",
    "fp16.min_loss_scale": "training.min_loss_scale",
}
LARGEST_SCALE_POWER = 127
"""Of two: the largest that fp32 holds."""
NEVER = 1_000_000_000
"""Steps between two lines of DeepSpeed's own, which megalm's take the place of."""
# Keys that DeepSpeed receives as they are. A block name admits everything inside it that is not a field.
BLOCKS = ("zero_optimization", "bf16", "fp16", "aio", "comms_logger", "flops_profiler", "timers")
PASSED_ON = (
    "gradient_accumulation_steps", "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state",
    "disable_allgather", "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", *BLOCKS,
)  # fmt: skip
REFUSED = {
    "optimizer": "the optimizer is set by --lr, --adam-beta1, --weight-decay and their like",
    "scheduler": "the schedule is set by --lr-decay-style, --lr-warmup-samples and their like",
    "activation_checkpointing": "recomputation is set by --checkpoint-activations or --recompute-granularity",
    "data_types": "gradients are always accumulated in fp32, except in fp16 runs, where DeepSpeed allows fp16 alone",
    "tensorboard": "records are set by --tensorboard-dir",
    "wandb": "records are set by --wandb-project",
    "csv_monitor": "records are set by --metrics-path",
    "amp": "the dtype is set by --bf16 or --fp16",
    "tensor_parallel": "the layout is set by --tensor-model-parallel-size",
    "curriculum_learning": "seq_length is the same in every step",
    "pipeline": "stages are set by --pipeline-model-parallel-size and --pp-partition-method",
    "checkpoint": "checkpoints are megalm's own writing",
    "data_efficiency": "the order of samples is megalm's",
}


def deepspeed_json(config: Config, *, dp_size: int) -> dict[str, Any]:
    """What `deepspeed.initialize` receives as its configuration.

    train_batch_size is the final global batch; a ramp-up changes the engine's batch while it runs. 16 bits
    with ZeRO-0 are written as stage 1, whose optimizer keeps fp32 masters beside the weights (and in bf16 gradients of
    fp32), flat, in the one form of checkpoint that every layout and stage can load.
    """
    training = config.training
    micro_batch_size = training.micro_batch_size
    global_batch_size = config.global_batch_size(dp_size=dp_size)
    stage = effective_zero_stage(config)
    built: dict[str, Any] = {
        "train_batch_size": global_batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": global_batch_size // (micro_batch_size * dp_size),
        "gradient_clipping": training.clip_grad if engine_clips(config) else 0.0,
        # Never, unless its timers are asked for: then as often as DeepSpeed does by itself.
        "steps_per_print": 10 if config.deepspeed.get("wall_clock_breakdown") else NEVER,
        "wall_clock_breakdown": False,
        # DeepSpeed's own measurement of speed stops the host at every micro-batch until the GPU has caught up.
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
        # Under sequence parallelism tensor ranks send different activations, which partitioning takes for equal ones.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }
    if stage == 3:
        built["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    if training.dtype == "bf16":
        # A gradient is added to its fp32 sum, and freed, as soon as it is computed.
        built["bf16"] = {"enabled": True, "immediate_grad_update": True}
        built["data_types"] = {"grad_accum_dtype": "fp32"}
        if stage == 1:
            # What was added up in fp32 travels in fp32; DeepSpeed would round it to bf16.
            built["communication_data_type"] = "fp32"
    if training.dtype == "fp16":
        built["fp16"] = {
            "enabled": True,
            "loss_scale": training.loss_scale or 0,
            "initial_scale_power": int(math.log2(training.initial_loss_scale)),
            "loss_scale_window": training.loss_scale_window,
            "hysteresis": training.hysteresis,
            "min_loss_scale": training.min_loss_scale,
        }
    return _merged(built, config.deepspeed)


def effective_zero_stage(config: Config) -> int:
    """The ZeRO stage that the engine runs: the one asked for, but at least 1 in 16 bits (see `deepspeed_json`)."""
    return config.parallel.zero_stage if config.training.dtype == "fp32" else max(config.parallel.zero_stage, 1)


def engine_clips(config: Config) -> bool:
    """Whether DeepSpeed clips gradients: in fp16 and with shards of ZeRO. Elsewhere `train.optimizer.AdamW` does."""
    stage, dtype = effective_zero_stage(config), config.training.dtype
    return not (dtype == "fp32" and stage == 0 or dtype == "bf16" and stage == 1)


def load_deepspeed_file(path: str, settings: Settings) -> None:
    """Apply a DeepSpeed JSON file after flags and presets; where it contradicts one of them, record both."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file, object_pairs_hook=_without_repetition)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        settings.failures.append(
            Failure(f"cannot read the DeepSpeed JSON {path}: {reason}", "named by --deepspeed_config")
        )
        return
    read_deepspeed(content, path, settings)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A block of the JSON. Raises: ValueError for a key that stands in it twice, as DeepSpeed does."""
    block = dict(pairs)
    if len(block) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} stands twice in one block")
    return block


def read_deepspeed(content: Any, source: str, settings: Settings) -> None:
    """Sort the keys of a DeepSpeed configuration into fields, keys passed on, and refusals."""
    if not isinstance(content, Mapping):
        settings.failures.append(
            Failure(f"the DeepSpeed configuration must be a mapping, got {content!r}", f"in {source}")
        )
        return
    flat = [name for name in (*BLOCKS, "bfloat16") if name in content and not isinstance(content[name], Mapping)]
    for name in flat:
        if content[name] != "auto":
            settings.failures.append(
                Failure(f"{name} = {content[name]!r} must be a block of keys", f"in {source}", f'"{name}": {{...}}')
            )
    content = {name: value for name, value in content.items() if name not in flat}
    _read_dtype(content, source, settings)
    for path, value in _leaves(content):
        top = path.partition(".")[0]
        if value == "auto" or path in ("bf16.enabled", "fp16.enabled", "bfloat16.enabled"):
            continue
        if path in FIELDS:
            if not (top == "fp16" and content["fp16"].get("enabled") is False):
                _agree(path, value, source, settings)
        elif top in PASSED_ON:
            _store(settings.deepspeed, path, value)
        elif top in REFUSED and _asks_for_nothing(top, content[top], settings):
            continue
        elif top in REFUSED:
            settings.failures.append(
                Failure(
                    f"{top} in a DeepSpeed configuration: {REFUSED[top]}", f"set in {source}", f"remove {top} from it"
                )
            )
        else:
            near = nearest(top, [*(key.partition(".")[0] for key in FIELDS), *PASSED_ON])
            remedy = f"nearest: {', '.join(near)}" if near else "remove it"
            settings.failures.append(
                Failure(f"{path} is not a DeepSpeed key that megalm knows", f"in {source}", remedy)
            )


def _asks_for_nothing(name: str, block: Any, settings: Settings) -> bool:
    """Whether a block that is refused is switched off, or says what is done without it."""
    if name == "data_types":
        return bool(block == {"grad_accum_dtype": "fp32"}) and settings.value("training.dtype") != "fp16"
    return isinstance(block, Mapping) and block.get("enabled") is False


def _read_dtype(content: Mapping[str, Any], source: str, settings: Settings) -> None:
    """The dtype from the `enabled` switches of bf16 and fp16."""
    enabled = []
    for block, dtype in (("fp16", "fp16"), ("bf16", "bf16"), ("bfloat16", "bf16")):
        inner = content.get(block)
        switch = inner.get("enabled") if isinstance(inner, Mapping) else None
        if switch is True:
            enabled.append(dtype)
            _set_or_compare("training.dtype", dtype, f"{source}: {block}.enabled", settings)
        elif switch is False and settings.value("training.dtype") == dtype:
            settings.failures.append(
                Failure(
                    f"training.dtype = {dtype} contradicts {block}.enabled = false",
                    f"{origin_of('training.dtype', settings.source('training.dtype'))}; the other in {source}",
                    "remove one of the two",
                )
            )
        elif switch not in (None, True, False, "auto"):
            settings.failures.append(
                Failure(f"{block}.enabled = {switch!r} is neither true nor false", f"in {source}", "no quotation marks")
            )
    if len(set(enabled)) > 1:
        settings.failures.append(Failure("fp16 and bf16 are both enabled", f"in {source}", "enable one of them"))


def _field_value(key: str, value: Any) -> Any:
    """What a key of the DeepSpeed configuration is in megalm's terms. Raises: ValueError."""
    if key == "fp16.loss_scale":
        value = value or None
    if key == "fp16.initial_scale_power" and isinstance(value, int):
        if not 0 <= value <= LARGEST_SCALE_POWER:
            raise ValueError(f"expected a power of two from 0 to {LARGEST_SCALE_POWER}")
        value = 2.0**value
    return from_yaml(option_table()[FIELDS[key]], value)


def _agree(key: str, value: Any, source: str, settings: Settings) -> None:
    """Set the field of a key of the DeepSpeed configuration, unless something else set it differently."""
    path, source = FIELDS[key], f"{source}: {key}"
    try:
        _set_or_compare(path, _field_value(key, value), source, settings)
    except ValueError as error:
        doc = option_table()[path].doc
        settings.failures.append(Failure(f"{key} = {value!r}: {error}", f"set in {source}", doc))


def _set_or_compare(path: str, value: Any, source: str, settings: Settings) -> None:
    if path not in settings.values:
        settings.set(path, value, source)
    elif settings.values[path] != value:
        dynamic = path == "training.loss_scale" and value is None
        settings.failures.append(
            Failure(
                f"{path} = {settings.values[path]} contradicts {'0, which is dynamic' if dynamic else value}",
                f"{origin_of(path, settings.source(path))}; the other in {source}",
                "remove --loss-scale: under DeepSpeed it is the JSON that counts"
                if dynamic
                else "remove one of the two, or make them equal",
            )
        )


def _leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths and values of a nested mapping; an empty block is a leaf."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def passed_on(config: Config) -> list[str]:
    """Dotted paths of the DeepSpeed keys that megalm has no field for."""
    return [path for path, _ in _leaves(config.deepspeed)]


def _store(target: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    for parent in parents:
        target = target.setdefault(parent, {})
    target[leaf] = value


def _merged(built: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """`extra` over `built`, block by block."""
    merged = dict(built)
    for key, value in extra.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), dict):
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = value
    return merged
