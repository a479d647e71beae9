"""A checkpoint between the first file and the published name."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megalm.checkpoint import layout
from megalm.checkpoint.durable import (
    RETRY_PAUSES_SECONDS,
    FileRecord,
    make_folder,
    publish_folder,
    remove_folder,
    replace_text,
    write_text,
)
from megalm.checkpoint.identity import as_given, model_fields
from megalm.checkpoint.lineage import lineage_in
from megalm.checkpoint.manifest import Manifest
from megalm.checkpoint.retention import Retention, remove_outdated
from megalm.config.deepspeed_json import effective_zero_stage
from megalm.config.root import Config
from megalm.config.yaml_file import config_to_yaml
from megalm.errors import CheckpointError, listed
from megalm.topology.layout import Layout


@dataclass(frozen=True)
class Draft:
    """Where the files of one save go, and everything about it that is known before they are written.

    All ranks hold an equal one; its methods are the first rank's to call.
    """

    folder: Path
    manifest: Manifest
    state_text: str
    config: Config
    retention: Retention

    @classmethod
    def of(
        cls, folder: Path, state: Mapping[str, Any], *, config: Config, sizes: Layout, retention: Retention
    ) -> Draft:
        """The draft of a run's checkpoint at `state["step"]`.

        Raises: ValueError if the state is not plain JSON.
        """
        manifest = Manifest(
            step=int(state["step"]),
            layout={
                "tp": sizes.tp,
                "pp": sizes.pp,
                "dp": sizes.dp,
                "zero_stage": effective_zero_stage(config),
                "dtype": config.training.dtype,
            },
            model=model_fields(config),
            versions=versions(),
            lineage=lineage_in(state),
        )
        state_text = json.dumps(dict(state), indent=1, allow_nan=False) + "\n"
        return cls(folder, manifest, state_text, config, retention)

    @property
    def state(self) -> dict[str, Any]:
        """The content of train_state.json."""
        content: dict[str, Any] = json.loads(self.state_text)
        return content

    @property
    def final(self) -> Path:
        """The folder's name once it is whole."""
        return self.folder / layout.step_folder(self.manifest.step)

    @property
    def temporary(self) -> Path:
        """The folder's name until then."""
        return self.folder / layout.temporary_folder(self.manifest.step)

    def begin(self) -> None:
        """Make the temporary folder, without what an interrupted save left of one."""
        make_folder(self.folder)
        for path in self.folder.glob("global_step*.tmp"):
            remove_folder(path)
        make_folder(self.temporary)

    def publish(self, records: list[FileRecord]) -> tuple[str, ...]:
        """Write the common files and the manifest, take the name, point `latest` to it, remove old checkpoints.

        Returns what went wrong after the checkpoint had its name: old ones that could not be removed.
        Raises: CheckpointError if this host does not see what another one wrote.
        """
        wait_until_seen(self.temporary, {record.name: record.bytes for record in records})
        own = [
            write_text(self.temporary / layout.TRAIN_STATE, self.state_text),
            write_text(self.temporary / layout.CONFIG, config_to_yaml(as_given(self.config))),
        ]
        files = tuple(sorted([*records, *own], key=lambda record: record.name))
        write_text(self.temporary / layout.MANIFEST, replace(self.manifest, files=files).to_json())
        publish_folder(self.temporary, self.final, replaced=self.folder / layout.replaced_folder(self.manifest.step))
        replace_text(self.folder / layout.LATEST, self.final.name)
        lineage = self.manifest.lineage
        _, problems = remove_outdated(self.folder, self.retention, newest=self.final, lineage=lineage)
        return problems

    def discard(self) -> None:
        """Remove what was written; a disk that refuses even that keeps a folder that nothing reads."""
        with contextlib.suppress(OSError):
            remove_folder(self.temporary)


def wait_until_seen(folder: Path, sizes: Mapping[str, int | None]) -> None:
    """Wait on the first rank for files that other ranks have written, of these sizes where they are known: a network
    file system may show them a moment later, and one that is not shared never does.

    Raises: CheckpointError after some seconds.
    """
    missing = list(sizes)
    for pause_seconds in (0.0, *RETRY_PAUSES_SECONDS):
        time.sleep(pause_seconds)
        missing = [name for name in missing if not _is_here(folder / name, sizes[name])]
        if not missing:
            return
    raise CheckpointError(
        f"{folder} lacks {listed(missing, 3)} on {socket.gethostname()}, where rank 0 is, though other ranks have "
        "written them\n"
        "  --save must name a folder that all hosts share"
    )


def _is_here(path: Path, size: int | None) -> bool:
    try:
        return size in (None, path.stat().st_size)
    except FileNotFoundError:
        return False


def versions() -> dict[str, str]:
    """Versions of what decides the content of a checkpoint."""
    found = {"python": platform.python_version()}
    for package in ("megalm", "torch", "deepspeed", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
