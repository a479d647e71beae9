"""The page docs/flags.md: every flag, and every field of the DeepSpeed JSON, with what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence

from megalm.config.deepspeed_json import FIELDS, PASSED_ON, REFUSED
from megalm.config.flag_families import FAMILIES
from megalm.config.flags import Flag, flag_table
from megalm.config.root import OptionInfo, option_table

INTRODUCTION = """\
# Flags

Written by `python tools/write_flags_doc.py`; a test keeps it current. Order of precedence: defaults, presets
(`--config`), flags, `SECTION.FIELD=VALUE` arguments. Names are exact, and a flag given twice counts once, the last.
Two flags that set one field differently are refused, and so is everything in the last tables.
"""
DIFFERENT_DEFAULTS = (
    ("`model.hidden_dropout`, `model.attention_dropout`", "0.0", "0.1: pass --hidden-dropout 0.1 to have it"),
    (
        "`data.tokenizer_type`",
        "PretrainedFromHF, but GPT2BPETokenizer for --vocab-file with --merge-file",
        "GPT2BPETokenizer",
    ),
    ("learning rate", "update k of a warm-up of w uses k / w of the peak", "(k - 1) / w; the same after the warm-up"),
    (
        "`output.linear` by --fp8-format",
        "each tensor's own scale, Megatron's --fp8-recipe tensorwise",
        "scales of earlier steps, --fp8-recipe delayed",
    ),
    ("`parallel.backend`", "nccl on GPUs, gloo on CPUs", "nccl"),
    ("`output.log_interval`", "10 steps", "100 steps"),
    ("`model.make_vocab_size_divisible_by`", "the padded vocabulary is its multiple", "its multiple times tp"),
)


def flags_markdown() -> str:
    """The page as Markdown."""
    flags = list(flag_table().values())
    parts = [
        INTRODUCTION,
        "## Commands\n",
        _table(("flag", "meaning"), [(f"`{flag.name}`", flag.note) for flag in flags if flag.action == "command"]),
        "## Obeyed\n",
        _table(("flag", "field", "default", "meaning"), [_obeyed(flag) for flag in flags if flag.action == "set"]),
        "## Fields without a flag\n",
        _fields_without_flag(flags),
        "## Accepted: true without them\n",
        _table(
            ("flag", "values", "why nothing is left to do"), [_noop(flag) for flag in flags if flag.action == "noop"]
        ),
        "## Refused\n",
        _table(
            ("flag", "why", "instead"),
            [(f"`{flag.name}`", flag.note, flag.remedy) for flag in flags if flag.action == "refuse"],
        ),
        "## Refused together\n",
        "`*` stands for any text. `--no-` and `--disable-` before what follows `--` change nothing about the answer.\n",
        _table(
            ("flags", "why", "instead"),
            [(" ".join(f"`{name}`" for name in one.names), one.note, one.remedy) for one in FAMILIES],
        ),
        "## Defaults that differ from Megatron's\n",
        _table(("field", "here", "there"), DIFFERENT_DEFAULTS),
        "## The DeepSpeed JSON\n",
        "A value that contradicts a flag or a preset is refused, and both are named. `auto` takes the field's value.\n",
        _table(("key", "field"), [(f"`{key}`", f"`{path}`") for key, path in _json_fields()]),
        f"Passed on as they are: {', '.join(f'`{key}`' for key in PASSED_ON)}.\n",
        "A block whose `enabled` is false is accepted, and so is `data_types` for fp32 sums outside fp16.\n",
        _table(("refused key", "why"), [(f"`{key}`", why) for key, why in REFUSED.items()]),
    ]
    return "\n".join(parts)


def _json_fields() -> list[tuple[str, str]]:
    return [*FIELDS.items(), ("fp16.enabled", "training.dtype"), ("bf16.enabled", "training.dtype")]


def _obeyed(flag: Flag) -> tuple[str, str, str, str]:
    info = option_table()[flag.target]
    field = f"`{flag.target}`" + (f" = `{flag.constant}`" if flag.arity == "0" else "")
    return f"`{flag.name}`", field, _default(info), " ".join(part for part in (info.doc, flag.note) if part)


def _default(info: OptionInfo) -> str:
    if info.required:
        return "required"
    return "" if info.default in (None, ()) else f"`{info.default}`"


def _noop(flag: Flag) -> tuple[str, str, str]:
    values = " or ".join(f"`{word}`" for word in flag.allowed)
    note = flag.note + (f" Other values are refused: {flag.remedy}." if flag.allowed else "")
    if flag.equals:
        note += f" Other values are refused: {flag.remedy}."
    if flag.unless:
        note += f" Refused where `{flag.unless.path}` is `{flag.unless.value}`: {flag.unless.note}."
    return f"`{flag.name}`", values, note


def _fields_without_flag(flags: list[Flag]) -> str:
    targets = {flag.target for flag in flags}
    rows = [(f"`{path}`", info.doc) for path, info in option_table().items() if path not in targets]
    return _table(("field", "meaning"), rows) if rows else "None: every field has a flag.\n"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"
