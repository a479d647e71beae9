"""Text for people: `--help`, the report of `--dry-run`, and the choices that a run should log once."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping

from megalm.config.deepspeed_json import deepspeed_json, effective_zero_stage
from megalm.config.flags import Flag, flag_table
from megalm.config.root import DEFAULT, SECTIONS, Config, OptionInfo, option_table

WIDTH = 110
INDENT = 34
METAVARS = {"int": "N", "float": "X", "bool": "true|false", "str": "TEXT", "strings": "TEXT ...", "ints3": "N N N"}
USAGE = """\
pretrain_gpt.py [FLAGS] [SECTION.FIELD=VALUE ...]

Pre-trains a GPT-family language model. Presets (--config) override defaults, flags override presets, and
SECTION.FIELD=VALUE overrides flags; every field below can be set that way. Flag names are exact, integers
may hold underscores, and what cannot be obeyed is refused."""


def help_text() -> str:
    """The text of --help: commands, then every field with its flags, then what is accepted or refused besides."""
    table = flag_table()
    lines = [USAGE, "", "commands"]
    lines += [_entry(_usage(flag, ""), flag.note) for flag in table.values() if flag.action == "command"]
    for section, cls in SECTIONS.items():
        lines += ["", textwrap.fill(f"{section}: {(cls.__doc__ or '').splitlines()[0]}", WIDTH)]
        for path, info in option_table().items():
            if path.startswith(f"{section}."):
                flags = [flag for flag in table.values() if flag.target == path]
                lines.append(_field_entry(info, flags))
    for action, title in (
        ("noop", "accepted, and true without them"),
        ("refuse", "refused, as are families of flags, with what to do instead"),
    ):
        names = ", ".join(flag.name for flag in table.values() if flag.action == action)
        lines += ["", f"{title} (docs/flags.md)"]
        lines.append(textwrap.fill(names, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))
    return "\n".join(lines) + "\n"


def _field_entry(info: OptionInfo, flags: list[Flag]) -> str:
    names = ", ".join(_usage(flag, _metavar(info, flag)) for flag in flags) or f"{info.path}={_metavar(info, None)}"
    if info.required:
        default = "required"
    elif info.default is None or info.default == ():
        default = ""
    else:
        default = f"default {info.default}"
    about = "; ".join(part for part in (info.path, default) if part)
    return _entry(names, f"{info.doc} [{about}]")


def _metavar(info: OptionInfo, flag: Flag | None) -> str:
    if flag is not None and flag.words:
        return "|".join(flag.words)
    return "|".join(map(str, info.choices)) if info.choices else METAVARS[info.kind]


def _usage(flag: Flag, metavar: str) -> str:
    if flag.arity == "0":
        return flag.name if flag.constant in (True, None) else f"{flag.name} (sets {flag.constant})"
    metavar = metavar or ("FILE ..." if flag.arity == "+" else "FILE")
    return f"{flag.name} [{metavar}]" if flag.arity == "?" else f"{flag.name} {metavar}"


def _entry(names: str, doc: str) -> str:
    indent = " " * INDENT
    wrapped = textwrap.wrap(doc, WIDTH - INDENT)
    if len(names) + 4 > INDENT:
        return "\n".join([f"  {names}", *(indent + line for line in wrapped)])
    first, *rest = wrapped
    return "\n".join([f"  {names}".ljust(INDENT) + first, *(indent + line for line in rest)])


def num_processes(count: int) -> str:
    """A number of processes, in words."""
    return "1 process" if count == 1 else f"{count} processes"


def notes(config: Config) -> list[str]:
    """What was resolved rather than asked for; a run logs each line once."""
    found = []
    if effective_zero_stage(config) != config.parallel.zero_stage:
        found.append(
            f"parallel.zero_stage = 0 in {config.training.dtype} runs as stage 1, the one with fp32 masters that every "
            "layout can load"
        )
    if config.model.position_embedding == "alibi" and config.model.max_position_embeddings is not None:
        found.append("model.max_position_embeddings has no effect: ALiBi has no table of positions")
    if config.model.position_embedding == "alibi" and config.data.reset_position_ids:
        found.append("data.reset_position_ids has no effect: ALiBi knows distances alone")
    for path in ("data.vocab_file", "data.merge_file"):
        if config.get(path) is not None and config.data.tokenizer_type != "GPT2BPETokenizer":
            found.append(f"{path} has no effect: {config.data.tokenizer_type} does not read it")
    dropouts = ("model.hidden_dropout", "model.attention_dropout")
    of_a_launch_line = config.source("model.num_layers").startswith("--")  # and of no preset
    if of_a_launch_line and all(config.source(path) == DEFAULT for path in dropouts):
        found.append("model.hidden_dropout and model.attention_dropout are 0.0, where Megatron's default is 0.1")
    if config.training.global_batch_size is None:
        found.append("training.global_batch_size is micro_batch_size * dp: one micro-batch a step")
    return found


def dry_run_report(config: Config, *, world_size: int, more: Mapping[str, str] | None = None) -> str:
    """The plan of a checked run: layout, batch, length, what was set and by whom, and the DeepSpeed JSON.

    `more` holds further facts, such as what only the model or the schedule can count.
    """
    parallel, training = config.parallel, config.training
    dp_size = world_size // (parallel.tp * parallel.pp)
    global_batch_size = config.global_batch_size(dp_size=dp_size)
    accumulation = global_batch_size // (training.micro_batch_size * dp_size)
    facts = {
        "layout": f"{num_processes(world_size)} = tp {parallel.tp} x pp {parallel.pp} x dp {dp_size}, "
        f"ZeRO-{effective_zero_stage(config)}, recompute {parallel.recompute}",
        "batch": f"{global_batch_size} samples = {training.micro_batch_size} x {accumulation} micro-batches "
        f"x dp {dp_size}, {global_batch_size * config.data.seq_length} tokens",
        "length": f"{training.train_samples} samples" if training.by_samples else f"{training.train_iters} steps",
        "dtype": training.dtype,
        **(more or {}),
    }
    width = max(map(len, facts)) + 2
    lines = ["dry run: every check passed", *(f"  {name.ljust(width)}{text}" for name, text in facts.items())]
    lines += ["notes", *(f"  {note}" for note in notes(config))] if notes(config) else []
    lines.append("set")
    lines += [f"  {path} = {config.get(path)}  ({source})" for path, source in config.sources.items()]
    lines += ["DeepSpeed JSON", textwrap.indent(json.dumps(deepspeed_json(config, dp_size=dp_size), indent=2), "  ")]
    return "\n".join(lines) + "\n"
