"""Configuration files: sections of fields, a `base:` to start from, and the line of every value for error messages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import yaml

from megalm.config.deepspeed_json import read_deepspeed
from megalm.config.failures import Failure
from megalm.config.root import SECTIONS, Config
from megalm.config.settings import Settings


def load_file(path: str, settings: Settings, *, including: tuple[str, ...] = ()) -> None:
    """Apply a YAML file, its bases first. `base:` is a path, or a list of them, relative to the file that names it."""
    if os.path.realpath(path) in including:
        settings.failures.append(Failure(f"{path} is a base of itself", "", "remove one of the base: lines"))
        return
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        settings.failures.append(
            Failure(f"cannot read the configuration {path}: {reason}", "", "presets lie in configs/")
        )
        return
    load_text(text, path, settings, including=(*including, os.path.realpath(path)))


def load_text(text: str, name: str, settings: Settings, *, including: tuple[str, ...] = ()) -> None:
    """Apply YAML text that is called `name` in sources and errors."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        settings.failures.append(Failure(f"{name} is not YAML: {' '.join(str(error).split())}"))
        return
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        settings.failures.append(Failure(f"{name} must hold sections ({', '.join(SECTIONS)})"))
        return
    try:
        _load_root(root, name, settings, including)
    except (yaml.YAMLError, ValueError) as error:  # a tag that it does not know, a date that is none
        settings.failures.append(Failure(f"{name} is not YAML: {' '.join(str(error).split())}"))


def _load_root(root: yaml.MappingNode, name: str, settings: Settings, including: tuple[str, ...]) -> None:
    entries = list(_entries(root, name, settings))
    for key, node, source in entries:
        if key == "base":
            _load_bases(node, source, name, settings, including)
    for key, node, source in entries:
        if key != "base":
            _load_entry(key, node, source, name, settings)


def _load_bases(node: yaml.Node, source: str, name: str, settings: Settings, including: tuple[str, ...]) -> None:
    value = _value(node)
    bases = value if isinstance(value, list) else [value]
    if not all(isinstance(base, str) for base in bases):
        settings.failures.append(Failure(f"base = {value!r} must be a path or a list of paths", f"set in {source}"))
        return
    for base in bases:
        load_file(os.path.join(os.path.dirname(name), base), settings, including=including)


def _load_entry(key: str, node: yaml.Node, source: str, name: str, settings: Settings) -> None:
    """One top-level entry: a section, the DeepSpeed keys, or a dotted path."""
    if key == "deepspeed":
        read_deepspeed(_value(node) or {}, source, settings)
    elif key in SECTIONS:
        if isinstance(node, yaml.MappingNode):
            for field_name, child, child_source in _entries(node, name, settings):
                settings.set_from_yaml(f"{key}.{field_name}", _value(child), child_source)
        elif _value(node) is not None:
            settings.failures.append(Failure(f"{key} must be a section of fields", f"set in {source}"))
    else:
        settings.set_from_yaml(key, _value(node), source)


def _entries(node: yaml.MappingNode, name: str, settings: Settings) -> Iterator[tuple[str, yaml.Node, str]]:
    """Key, value node and `FILE:LINE` of a mapping; a key given twice is a failure."""
    seen: dict[str, str] = {}
    for key_node, value_node in node.value:
        key = str(_value(key_node))
        source = f"{name}:{key_node.start_mark.line + 1}"
        if key in seen:
            settings.failures.append(
                Failure(f"{key} is set twice", f"in {seen[key]} and {source}", "remove one of them")
            )
            continue
        seen[key] = source
        yield key, value_node, source


def _value(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    return loader.construct_object(node, deep=True)


def config_from_yaml(text: str, *, name: str = "config.yaml") -> Config:
    """The Config that `config_to_yaml` wrote.

    Raises: ConfigError with every value that cannot be read.
    """
    from megalm.config.failures import raise_if_any

    settings = Settings()
    load_text(text, name, settings)
    raise_if_any([*settings.failures, *settings.missing()])
    return settings.build()


def config_to_yaml(config: Config) -> str:
    """The configuration as YAML, one field a line, with the origin of every value that was set beside it."""
    lines = []
    section = ""
    for path, value in config.values().items():
        owner, field_name = path.split(".")
        if owner != section:
            section = owner
            lines.append(f"{section}:")
        origin = config.sources.get(path)
        lines.append(f"  {field_name}: {_scalar(value)}" + (f"  # {' '.join(origin.split())}" if origin else ""))
    if config.deepspeed:
        lines.append(yaml.safe_dump({"deepspeed": dict(config.deepspeed)}, sort_keys=False).rstrip())
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("...\n").rstrip("\n")
