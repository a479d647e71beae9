"""Values on their way to a Config: each dotted path with what it was set to, and by whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megalm.config.failures import Failure, nearest
from megalm.config.root import DEFAULT, SECTIONS, Config, option_table
from megalm.config.values import from_yaml


@dataclass
class Settings:
    """Values and sources by dotted path, the DeepSpeed keys passed on, and the failures met so far."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def set(self, path: str, value: Any, source: str) -> None:
        """Set a path that exists to a value of its type; the last one wins."""
        self.values[path] = value
        self.sources[path] = source

    def set_from_yaml(self, path: str, value: Any, source: str) -> None:
        """Set a path to a value from a file, or record why it cannot be."""
        info = option_table().get(path)
        if info is None:
            self.fail_unknown(path, source)
            return
        try:
            self.set(path, from_yaml(info, value), source)
        except ValueError as error:
            self.failures.append(Failure(f"{path} = {value!r}: {error}", f"set in {source}", info.doc))

    def fail_unknown(self, path: str, source: str) -> None:
        """Record a path that no section has, with the nearest ones."""
        name = path.rpartition(".")[2]
        known = list(option_table())
        same_name = [other for other in known if other.endswith(f".{name}")]
        near = list(dict.fromkeys([*same_name, *nearest(path, known)]))
        self.failures.append(
            Failure(f"{path} is not a setting", f"given by {source}", f"nearest: {', '.join(near)}" if near else "")
        )

    def source(self, path: str) -> str:
        """Where a path was set, or `default`."""
        return self.sources.get(path, DEFAULT)

    def value(self, path: str) -> Any:
        """What a path is set to, or its default."""
        return self.values.get(path, option_table()[path].default)

    def missing(self) -> list[Failure]:
        """A failure for each field that has no default and was not set."""
        from megalm.config.flags import flag_table

        failures = []
        for path, info in option_table().items():
            if info.required and path not in self.values:
                flags = [flag.name for flag in flag_table().values() if flag.target == path]
                failures.append(
                    Failure(
                        f"{path} is not set: {info.doc}",
                        "",
                        f"pass {flags[0]}, {path}=VALUE, or a preset with --config",
                    )
                )
        return failures

    def build(self, *, dry_run: bool = False) -> Config:
        """The Config of these settings; every required path must be set."""
        by_section: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        for path, value in self.values.items():
            section, name = path.split(".")
            by_section[section][name] = value
        sections: Mapping[str, Any] = {name: cls(**by_section[name]) for name, cls in SECTIONS.items()}
        return Config(**sections, deepspeed=dict(self.deepspeed), dry_run=dry_run, sources=dict(self.sources))
