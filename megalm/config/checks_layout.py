"""Rules between the configuration and the processes, device and tokenizer that a run meets."""

from __future__ import annotations

from collections.abc import Iterator

from megalm.config.checks import divisors, origins
from megalm.config.failures import Failure
from megalm.config.root import Config
from megalm.config.show import num_processes


def layout_failures(config: Config, *, world_size: int, device_type: str, vocab_size: int | None) -> list[Failure]:
    """Every rule that takes more than the configuration to tell."""
    if min(config.parallel.tp, config.parallel.pp, config.model.num_heads, config.training.micro_batch_size) < 1:
        return []  # Already a failure of its range; division by it would say nothing new.
    return [
        *_tensor_axis(config, vocab_size),
        *_vocabulary(config, vocab_size),
        *_world(config, world_size),
        *_device(config, device_type, world_size),
    ]


def _tensor_axis(config: Config, vocab_size: int | None) -> Iterator[Failure]:
    model, tp = config.model, config.parallel.tp
    divided = [("model.num_heads", model.num_heads), ("model.ffn_hidden_size", model.ffn_size)]
    rows = padded_vocab_size(config, vocab_size)
    if rows is not None:
        path = "model.vocab_size" if model.pad_vocab_size_to is None else "model.pad_vocab_size_to"
        divided.append((path, rows))
    for path, size in divided:
        if size % tp == 0:
            continue
        name = {"model.vocab_size": "the padded vocabulary", "model.ffn_hidden_size": "the MLP's width"}.get(path, path)
        remedy = divisors(size, among=model.num_heads)
        if path == "model.vocab_size":
            remedy += f"; or --make-vocab-size-divisible-by {model.make_vocab_size_divisible_by * tp}"
        yield Failure(f"parallel.tp = {tp} must divide {name} = {size}", origins(config, "parallel.tp", path), remedy)


def padded_vocab_size(config: Config, vocab_size: int | None) -> int | None:
    """Rows of the word embedding, or None while the vocabulary is unknown."""
    model = config.model
    if model.pad_vocab_size_to is not None:
        return model.pad_vocab_size_to
    known = model.vocab_size if model.vocab_size is not None else vocab_size
    multiple = model.make_vocab_size_divisible_by
    return None if known is None or multiple < 1 else -(-known // multiple) * multiple


def _vocabulary(config: Config, vocab_size: int | None) -> Iterator[Failure]:
    """The word embedding must hold every id that the tokenizer can give."""
    if vocab_size is None:
        return
    path = "model.vocab_size" if config.model.pad_vocab_size_to is None else "model.pad_vocab_size_to"
    rows = config.get(path)
    if rows is not None and rows < vocab_size:
        yield Failure(
            f"{path} = {rows} must hold the tokenizer's {vocab_size} tokens",
            f"{origins(config, path)}; tokenizer {config.data.tokenizer_path or config.data.tokenizer_type}",
            f"at least {vocab_size}, or leave it out",
        )


def _world(config: Config, world_size: int) -> Iterator[Failure]:
    tp, pp = config.parallel.tp, config.parallel.pp
    if world_size % (tp * pp):
        pairs = [
            f"{t}x{p}"
            for t in range(1, world_size + 1)
            for p in range(1, world_size // t + 1)
            if world_size % (t * p) == 0
        ]
        yield Failure(
            f"parallel.tp * parallel.pp = {tp} * {pp} must divide the {num_processes(world_size)}",
            origins(config, "parallel.tp", "parallel.pp"),
            f"start a multiple of {tp * pp} processes, or tp x pp of: {', '.join(pairs[:16])}",
        )
        return
    yield from _batch(config, dp_size=world_size // (tp * pp))


def _batch(config: Config, *, dp_size: int) -> Iterator[Failure]:
    training = config.training
    share = training.micro_batch_size * dp_size
    sizes = {"training.global_batch_size": config.global_batch_size(dp_size=dp_size)}
    if training.rampup_batch_size is not None:
        sizes["the start of training.rampup_batch_size"] = training.rampup_batch_size[0]
        sizes["the increment of training.rampup_batch_size"] = training.rampup_batch_size[1]
    for name, size in sizes.items():
        if size % share:
            lower = size // share * share
            yield Failure(
                f"{name} = {size} must be a multiple of micro_batch_size * dp = {share // dp_size} * {dp_size}",
                origins(config, name.rpartition(" ")[2], "training.micro_batch_size"),
                f"nearest: {f'{lower} or ' if lower else ''}{lower + share}",
            )
    asked = config.deepspeed.get("gradient_accumulation_steps")
    derived = sizes["training.global_batch_size"] // share
    if asked is not None and asked != derived:
        yield Failure(
            f"gradient_accumulation_steps = {asked} is not global_batch_size / (micro_batch_size * dp) = {derived}",
            f"the first is in the DeepSpeed JSON; {origins(config, 'training.global_batch_size')}",
            "remove it from the JSON",
        )


def _device(config: Config, device_type: str, world_size: int) -> Iterator[Failure]:
    if config.training.dtype == "fp16" and device_type == "cpu":
        yield Failure(
            "training.dtype = fp16 needs a GPU: DeepSpeed does not train fp16 on CPUs",
            origins(config, "training.dtype"),
            "--bf16, or neither flag for fp32",
        )
    if config.parallel.backend == "nccl" and device_type == "cpu":
        yield Failure(
            "parallel.backend = nccl needs GPUs",
            origins(config, "parallel.backend"),
            "--distributed-backend gloo, or leave it out",
        )
    if config.parallel.backend == "gloo" and device_type == "cuda" and world_size > 1:
        yield Failure(
            "parallel.backend = gloo is for CPUs: it sends what lies on a GPU by its address, which no host can read",
            origins(config, "parallel.backend"),
            "leave it out; DS_ACCELERATOR=cpu trains on CPUs",
        )
