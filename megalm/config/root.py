"""The whole configuration of a run, and where each of its values came from."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any

from megalm.config.data import DataConfig
from megalm.config.model import ModelConfig
from megalm.config.output import OutputConfig
from megalm.config.parallel import ParallelConfig
from megalm.config.training import TrainingConfig

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "parallel": ParallelConfig,
    "training": TrainingConfig,
    "data": DataConfig,
    "output": OutputConfig,
}
DEFAULT = "default"


@dataclass(frozen=True)
class Config:
    """What one run was asked to do. Nothing in it changes while the run goes on.

    `deepspeed` holds the keys of the DeepSpeed JSON that megalm has no field for and passes on as they are.
    `sources` maps dotted paths to the flag, file line or argument that set them; two configurations are equal when
    their values are, wherever those came from.
    """

    model: ModelConfig
    parallel: ParallelConfig
    training: TrainingConfig
    data: DataConfig
    output: OutputConfig
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    dry_run: bool = field(default=False, compare=False)
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def get(self, path: str) -> Any:
        """The value at a dotted path such as `training.lr`."""
        section, name = path.split(".")
        return getattr(getattr(self, section), name)

    def source(self, path: str) -> str:
        """Where the value at a dotted path came from: a flag, `FILE:LINE`, an argument, or `default`."""
        return self.sources.get(path, DEFAULT)

    def values(self) -> dict[str, Any]:
        """Every dotted path with its value, in the order of the fields."""
        return {path: self.get(path) for path in option_table()}

    def global_batch_size(self, *, dp_size: int) -> int:
        """Samples of one step when the ramp-up, if any, is over."""
        return self.training.global_batch_size or self.training.micro_batch_size * dp_size

    def with_vocab_size(self, vocab_size: int) -> Config:
        """The same configuration with the vocabulary that the tokenizer turned out to have."""
        sources = {**self.sources, "model.vocab_size": "the tokenizer"}
        return replace(self, model=replace(self.model, vocab_size=vocab_size), sources=sources)


@dataclass(frozen=True)
class OptionInfo:
    """What a dotted path accepts. `kind` is int, float, bool, str, strings or ints3."""

    path: str
    kind: str
    optional: bool
    required: bool
    default: Any
    doc: str
    choices: tuple[Any, ...]
    spellings: Mapping[str, Any]
    instead: Mapping[str, str]


@lru_cache(maxsize=1)
def option_table() -> Mapping[str, OptionInfo]:
    """Every field of every section by its dotted path, in the order of declaration."""
    table = {}
    for section, cls in SECTIONS.items():
        hints = typing.get_type_hints(cls)
        for declared in fields(cls):
            info = _describe(f"{section}.{declared.name}", declared, hints[declared.name])
            table[info.path] = info
    return table


def _describe(path: str, declared: Field[Any], hint: Any) -> OptionInfo:
    optional = isinstance(hint, UnionType) and NoneType in typing.get_args(hint)
    if optional:
        (hint,) = (part for part in typing.get_args(hint) if part is not NoneType)
    kinds = {
        tuple[str, ...]: "strings",
        tuple[int, int, int]: "ints3",
        int: "int",
        float: "float",
        bool: "bool",
        str: "str",
    }
    required = declared.default is MISSING
    return OptionInfo(
        path=path,
        kind=kinds[hint],
        optional=optional,
        required=required,
        default=None if required else declared.default,
        doc=declared.metadata["doc"],
        choices=declared.metadata["choices"],
        spellings=declared.metadata["spellings"],
        instead=declared.metadata["instead"],
    )
