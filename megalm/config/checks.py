"""Rules that a configuration must keep. Each check yields its failures; nothing is repaired."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

from megalm.config.checks_deepspeed import deepspeed_failures
from megalm.config.deepspeed_json import LARGEST_SCALE_POWER
from megalm.config.failures import Failure, origin_of, raise_if_any
from megalm.config.root import Config
from megalm.config.step_ranges import parse_step_ranges

Check = Callable[[Config], Iterator[Failure]]

POSITIVE = (
    "model.num_layers", "model.hidden_size", "model.num_heads", "model.ffn_hidden_size",
    "model.max_position_embeddings", "model.vocab_size", "model.pad_vocab_size_to",
    "model.make_vocab_size_divisible_by", "model.layernorm_epsilon", "model.init_std", "parallel.tp", "parallel.pp",
    "training.micro_batch_size", "training.global_batch_size", "training.train_iters", "training.train_samples",
    "training.exit_interval", "training.exit_duration_minutes", "training.loss_scale", "training.initial_loss_scale",
    "training.min_loss_scale", "training.loss_scale_window", "training.hysteresis", "training.lr",
    "training.loss_spike_window", "training.loss_spike_steps",
    "training.lr_decay_iters", "training.lr_decay_samples", "training.adam_eps", "training.eval_iters",
    "data.seq_length", "output.save_interval", "output.keep_last", "output.keep_every", "output.log_interval",
    "output.tensorboard_queue_size",
)  # fmt: skip
NOT_NEGATIVE = (
    "training.min_lr", "training.lr_warmup_iters", "training.lr_warmup_samples", "training.weight_decay",
    "training.clip_grad", "training.z_loss_coeff", "training.eval_interval", "training.max_skipped_steps",
    "training.loss_spike_threshold", "training.loss_spike_margin", "training.max_roll_backs",
    "training.hang_timeout_minutes", "training.check_replicas_interval", "training.seed", "data.num_workers",
    "data.valid_num_workers", "output.straggler_interval",
)  # fmt: skip
IN_PLACE_OF_ZERO = {
    "training.lr": "--eval-only measures a model without training it",
    "training.eval_iters": "--eval-interval 0 leaves validation out",
    "training.exit_interval": "leave it out for a run that ends with its steps",
    "output.save_interval": "leave it out for a run that saves at its end alone",
    "output.log_interval": "more than the steps of the run for a log without them",
}
"""What to do in place of a 0 that other trainers take."""
FRACTIONS = (
    "model.hidden_dropout", "model.attention_dropout", "training.adam_beta1", "training.adam_beta2",
    "training.lr_warmup_fraction",
)  # fmt: skip
WEIGHTED = ("data.train_weighted_split_paths", "data.valid_weighted_split_paths", "data.test_weighted_split_paths")
NO_CORPUS = Failure("no corpus is given", "", "pass --data-path PREFIX, or --train-weighted-split-paths")


def check(config: Config, *, world_size: int, device_type: str, vocab_size: int | None) -> None:
    """Every rule, with the processes, the device ('cpu', 'cuda') and the tokenizer's vocabulary (if known) in hand.

    Raises: ConfigError with every failure; the same on every rank, since it depends on nothing else.
    """
    from megalm.config.checks_layout import layout_failures

    failures = static_failures(config)
    failures += layout_failures(config, world_size=world_size, device_type=device_type, vocab_size=vocab_size)
    raise_if_any(failures)


def static_failures(config: Config) -> list[Failure]:
    """The failures that can be told without processes, device or tokenizer."""
    checks: tuple[Check, ...] = (
        _ranges, _shape, _positions, _pipeline, _zero, _duration, _skipped, _loss_spikes, _schedule, _ramp_up,
        _precision, _gelu_linear, _update, _corpora, _tokenizer, _checkpoints, _profile, deepspeed_failures,
    )  # fmt: skip
    return [failure for one in checks for failure in one(config)]


def origins(config: Config, *paths: str) -> str:
    """Where several values came from, in one line."""
    return "; ".join(origin_of(path, config.source(path)) for path in paths)


def divisors(number: int, *, among: int = 1) -> str:
    """The divisors of a number that also divide `among` (any, when it is 1), for the last line of an error."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    fitting = [d for d in sorted({*small, *(number // d for d in small)}) if among == 1 or among % d == 0]
    shown = fitting if len(fitting) <= 16 else [*fitting[:8], *fitting[-8:]]
    return f"values that fit: {', '.join(map(str, shown))}"


def set_to(config: Config, path: str) -> str:
    """A path and its value, as the rule of a failure names them."""
    return f"{path} = {config.get(path)}"


def _ranges(config: Config) -> Iterator[Failure]:
    for path in POSITIVE:
        value = config.get(path)
        if value is not None and value <= 0:
            remedy = IN_PLACE_OF_ZERO.get(path, "")
            yield Failure(f"{set_to(config, path)} must be greater than 0", origins(config, path), remedy)
    for path in NOT_NEGATIVE:
        value = config.get(path)
        if value is not None and value < 0:
            yield Failure(f"{set_to(config, path)} must not be negative", origins(config, path))
    if config.training.seed >= 2**32:  # numpy's generators take 32 bits
        yield Failure(f"{set_to(config, 'training.seed')} must be less than 2^32", origins(config, "training.seed"))
    for path in FRACTIONS:
        value = config.get(path)
        if value is not None and not 0 <= value < 1:
            yield Failure(f"{set_to(config, path)} must be at least 0 and less than 1", origins(config, path))


def _shape(config: Config) -> Iterator[Failure]:
    model = config.model
    if min(model.hidden_size, model.num_heads) > 0 and model.hidden_size % model.num_heads:
        yield Failure(
            f"model.num_heads = {model.num_heads} must divide model.hidden_size = {model.hidden_size}",
            origins(config, "model.num_heads", "model.hidden_size"),
            divisors(model.hidden_size),
        )
    rows, vocab_size = model.pad_vocab_size_to, model.vocab_size
    if rows is not None and vocab_size is not None and rows < vocab_size:
        yield Failure(
            f"model.pad_vocab_size_to = {rows} must hold model.vocab_size = {vocab_size} tokens",
            origins(config, "model.pad_vocab_size_to", "model.vocab_size"),
            f"at least {vocab_size}",
        )


def _positions(config: Config) -> Iterator[Failure]:
    rows, seq_length = config.model.max_position_embeddings, config.data.seq_length
    if config.model.position_embedding == "learned" and rows is not None and rows < seq_length:
        yield Failure(
            f"model.max_position_embeddings = {rows} must be at least data.seq_length = {seq_length}",
            origins(config, "model.max_position_embeddings", "data.seq_length"),
            f"at least {seq_length}, or --position-embedding-type alibi, which has no table",
        )


def _pipeline(config: Config) -> Iterator[Failure]:
    parallel, num_layers = config.parallel, config.model.num_layers
    if parallel.pp > num_layers > 0:
        yield Failure(
            f"parallel.pp = {parallel.pp} must not exceed model.num_layers = {num_layers}",
            origins(config, "parallel.pp", "model.num_layers"),
            f"values that fit: 1 to {num_layers}",
        )
    method = parallel.pipeline_partition
    pattern = method.removeprefix("type:")
    if method.lower() not in ("parameters", "uniform") and (pattern == method or not _is_regex(pattern)):
        yield Failure(
            f"parallel.pipeline_partition = {method} is not a way to deal layers to stages",
            origins(config, "parallel.pipeline_partition"),
            "parameters, uniform, or type:REGEX, without quotation marks or colons inside the value",
        )
    if parallel.sequence_parallel and parallel.tp == 1:
        yield Failure(
            "parallel.sequence_parallel needs parallel.tp > 1: it splits the sequence over the tensor ranks",
            origins(config, "parallel.sequence_parallel", "parallel.tp"),
            "leave it out, or pass --tensor-model-parallel-size 2 or more",
        )
    if parallel.sequence_parallel and parallel.tp > 1 and config.data.seq_length % parallel.tp:
        yield Failure(
            f"parallel.tp = {parallel.tp} must divide data.seq_length = {config.data.seq_length}",
            f"parallel.sequence_parallel is on; {origins(config, 'parallel.tp', 'data.seq_length')}",
            divisors(config.data.seq_length),
        )


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return bool(pattern) and not {"'", '"', ":"} & set(pattern)  # DeepSpeed takes what is between two colons


def _zero(config: Config) -> Iterator[Failure]:
    stage, pp = config.parallel.zero_stage, config.parallel.pp
    if stage >= 2 and pp > 1:
        yield Failure(
            f"parallel.zero_stage = {stage} cannot be combined with parallel.pp = {pp} stages",
            origins(config, "parallel.zero_stage", "parallel.pp"),
            "--zero-stage 0 or 1 with pipeline stages, or --pipeline-model-parallel-size 1",
        )


def _duration(config: Config) -> Iterator[Failure]:
    training = config.training
    if training.train_iters is not None and training.train_samples is not None:
        yield Failure(
            f"training.train_iters = {training.train_iters} excludes training.train_samples = {training.train_samples}",
            origins(config, "training.train_iters", "training.train_samples"),
            "keep one of them",
        )
    if training.train_iters is None and training.train_samples is None and not training.eval_only:
        yield Failure("the duration of training is not set", "", "pass --train-iters or --train-samples")
    if training.eval_only and config.output.load is None:
        yield Failure(
            "training.eval_only needs a checkpoint to evaluate",
            origins(config, "training.eval_only"),
            "pass --load FOLDER",
        )


def _skipped(config: Config) -> Iterator[Failure]:
    path = "training.skip_train_iteration_range"
    try:
        parse_step_ranges(config.get(path))
    except ValueError as error:
        yield Failure(f"{path}: {error}", origins(config, path), "1000-1100 2000-2010")


def _loss_spikes(config: Config) -> Iterator[Failure]:
    training, output = config.training, config.output
    if training.loss_spike_threshold <= 0:
        return
    path = "training.loss_spike_threshold"
    if output.save is None or output.save_interval is None:
        yield Failure(
            f"{set_to(config, path)} needs checkpoints to go back to",
            origins(config, path),
            "pass --save FOLDER and --save-interval N",
        )
    elif output.keep_last is not None:
        reach = (output.keep_last - 1) * output.save_interval
        needed = training.loss_spike_steps + training.loss_spike_margin
        if reach < needed:
            yield Failure(
                f"{set_to(config, path)} goes back over training.loss_spike_steps + training.loss_spike_margin = "
                f"{needed} steps, and {set_to(config, 'output.keep_last')} keeps checkpoints of {reach}",
                origins(config, path, "output.keep_last", "output.save_interval"),
                f"--keep-last {math.ceil(needed / output.save_interval) + 1}, or more",
            )


def _schedule(config: Config) -> Iterator[Failure]:
    training = config.training
    other = ("lr_decay_iters", "lr_warmup_iters") if training.by_samples else ("lr_decay_samples", "lr_warmup_samples")
    unit, ours = ("samples", "train_samples") if training.by_samples else ("steps", "train_iters")
    for name in other:
        if config.get(f"training.{name}"):
            counterpart = name.replace("iters", "samples") if training.by_samples else name.replace("samples", "iters")
            yield Failure(
                f"training.{name} = {config.get(f'training.{name}')} does not fit a run that counts {unit}",
                origins(config, f"training.{name}", f"training.{ours}"),
                f"pass --{counterpart.replace('_', '-')} instead",
            )
    warmup_path = f"training.lr_warmup_{'samples' if training.by_samples else 'iters'}"
    warmup = config.get(warmup_path)
    if training.lr_warmup_fraction is not None and warmup:
        yield Failure(
            f"training.lr_warmup_fraction = {training.lr_warmup_fraction} excludes {warmup_path} = {warmup}",
            origins(config, "training.lr_warmup_fraction", warmup_path),
            "keep one of them",
        )
    decay_path = f"training.lr_decay_{'samples' if training.by_samples else 'iters'}"
    decay = config.get(decay_path) or config.get(f"training.{ours}")
    if decay is not None and warmup >= decay > 0:
        yield Failure(
            f"{warmup_path} = {warmup} must be less than the decay of {decay} {unit}",
            origins(config, warmup_path, decay_path, f"training.{ours}"),
            f"less than {decay}",
        )
    if training.min_lr > training.lr:
        yield Failure(
            f"training.min_lr = {training.min_lr} must not exceed training.lr = {training.lr}",
            origins(config, "training.min_lr", "training.lr"),
        )


def _ramp_up(config: Config) -> Iterator[Failure]:
    ramp = config.training.rampup_batch_size
    if ramp is None:
        return
    path, final = "training.rampup_batch_size", config.training.global_batch_size
    start, increment, samples = ramp
    named = f"{path} = {start} {increment} {samples}"
    if config.training.train_samples is None:
        yield Failure(f"{named} needs a run that counts samples", origins(config, path), "pass --train-samples")
    if min(start, increment) <= 0 or samples < 0:
        yield Failure(f"{named} must hold a start and an increment greater than 0", origins(config, path))
    elif final is None:
        yield Failure(f"{named} needs the batch to grow to", origins(config, path), "pass --global-batch-size")
    elif start >= final or (final - start) % increment:
        yield Failure(
            f"{named} does not reach training.global_batch_size = {final} in steps of {increment}",
            origins(config, path, "training.global_batch_size"),
            f"a start below {final} that differs from it by a multiple of the increment",
        )


def _precision(config: Config) -> Iterator[Failure]:
    training = config.training
    if training.loss_scale is not None and training.dtype != "fp16":
        yield Failure(
            f"training.loss_scale = {training.loss_scale} has no meaning in {training.dtype}",
            origins(config, "training.loss_scale", "training.dtype"),
            "remove it; fp16 alone scales the loss",
        )
    scale = training.initial_loss_scale
    is_power = math.isfinite(scale) and scale.is_integer() and int(scale).bit_count() == 1
    if scale > 0 and not (is_power and scale <= 2.0**LARGEST_SCALE_POWER):
        yield Failure(
            f"training.initial_loss_scale = {scale} must be a power of two, from 1 to 2^{LARGEST_SCALE_POWER}",
            origins(config, "training.initial_loss_scale"),
            "4096, 65536, 4294967296",
        )
    least = training.min_loss_scale
    if training.dtype == "fp16" and least > 0 and not least.is_integer():
        yield Failure(
            f"{set_to(config, 'training.min_loss_scale')} must be a whole number: DeepSpeed takes no other",
            origins(config, "training.min_loss_scale"),
            "1, the default, or more",
        )
    if training.dtype == "fp16" and training.loss_scale is None and least > scale > 0:
        yield Failure(
            f"{set_to(config, 'training.min_loss_scale')} must not exceed training.initial_loss_scale = {scale}",
            origins(config, "training.min_loss_scale", "training.initial_loss_scale"),
        )


def gelu_linear_needs(config: Config, name: str) -> tuple[tuple[str, bool, str], ...]:
    """What the kernel `name` needs to have the GELU inside the MLP's products: fields, whether they fit, what would."""
    model, parallel = config.model, config.parallel
    return (
        ("model.activation", model.activation == "gelu_tanh", "gelu_tanh"),
        ("model.glu_activation", model.glu_activation is None, "no gate"),
        ("parallel.tp", parallel.tp == 1, "1"),
        ("parallel.zero_stage", parallel.zero_stage < 3, "less than 3"),
        ("parallel.recompute", parallel.recompute != "activation", "none, selective or full"),
        ("output.linear", config.output.linear in ("auto", "torch"), "torch"),
        ("training.dtype", name != "cublaslt" or config.training.dtype != "fp32", "bf16 or fp16"),
    )


def _gelu_linear(config: Config) -> Iterator[Failure]:
    name = config.output.gelu_linear
    if name in ("auto", "separate"):
        return
    for path, holds, wanted in gelu_linear_needs(config, name):
        if not holds:
            yield Failure(
                f"{set_to(config, 'output.gelu_linear')} needs {path} = {wanted}, not {config.get(path)}",
                origins(config, "output.gelu_linear", path),
                "--gelu-linear-kernel separate works with all",
            )


def _update(config: Config) -> Iterator[Failure]:
    dtype, stage = config.training.dtype, config.parallel.zero_stage
    if config.output.adamw == "triton" and (dtype != "bf16" or stage > 1):
        yield Failure(
            f"output.adamw = triton updates bf16 weights with ZeRO-0 or 1, not {dtype} with ZeRO-{stage}",
            origins(config, "output.adamw", "training.dtype", "parallel.zero_stage"),
            "--bf16 and --zero-stage 0 or 1, or --adamw-kernel torch",
        )


def _corpora(config: Config) -> Iterator[Failure]:
    data = config.data
    groups = [path for path in WEIGHTED if config.get(path)]
    if data.data_path and groups:
        yield Failure(
            "data.data_path excludes weighted groups", origins(config, "data.data_path", *groups), "keep one kind"
        )
    if groups and not data.train_weighted_split_paths and not config.training.eval_only:
        yield Failure(
            "weighted groups for validation or test need groups to train on",
            origins(config, *groups),
            "pass --train-weighted-split-paths",
        )
    if not data.data_path and not groups:
        yield NO_CORPUS
    parts = re.split(r"[,/]", data.split)
    try:
        shares = [float(part) for part in parts]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or not 0 < sum(shares) < math.inf:
        yield Failure(
            f"data.split = {data.split!r} must be one to three proportions, separated by commas",
            origins(config, "data.split"),
            '"969, 30, 1"',
        )


def _tokenizer(config: Config) -> Iterator[Failure]:
    data = config.data
    needs = {
        "PretrainedFromHF": (("data.tokenizer_path", "--tokenizer-name-or-path FOLDER"),),
        "SentencePieceTokenizer": (("data.tokenizer_path", "--tokenizer-model FILE"),),
        "GPT2BPETokenizer": (("data.vocab_file", "--vocab-file FILE"), ("data.merge_file", "--merge-file FILE")),
        "NullTokenizer": (("model.vocab_size", "--vocab-size N"),),
    }
    for path, flag in needs[data.tokenizer_type]:
        if config.get(path) is None:
            yield Failure(
                f"data.tokenizer_type = {data.tokenizer_type} needs {path}",
                origins(config, "data.tokenizer_type"),
                f"pass {flag}",
            )


def _checkpoints(config: Config) -> Iterator[Failure]:
    output = config.output
    for path in ("output.save_interval", "output.keep_last", "output.keep_every"):
        if config.get(path) is not None and output.save is None:
            yield Failure(
                f"{set_to(config, path)} needs a folder to save to", origins(config, path), "pass --save FOLDER"
            )
    for path in ("output.finetune", "output.reset_progress", "output.allow_fresh_start", "output.universal_checkpoint"):
        if config.get(path) and output.load is None:
            yield Failure(f"{path} needs a checkpoint to load", origins(config, path), "pass --load FOLDER")
    if output.wandb_name is not None and output.wandb_project is None:
        yield Failure(
            "output.wandb_name needs a W&B project", origins(config, "output.wandb_name"), "pass --wandb-project NAME"
        )


def _profile(config: Config) -> Iterator[Failure]:
    output = config.output
    if output.profile and not 1 <= output.profile_step_start <= output.profile_step_end:
        yield Failure(
            f"no steps from {set_to(config, 'output.profile_step_start')} "
            f"to {set_to(config, 'output.profile_step_end')}",
            origins(config, "output.profile_step_start", "output.profile_step_end"),
            "the first must be at least 1 and not past the last",
        )
