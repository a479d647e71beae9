"""A disk that fills: tmpfs in a mount namespace of its own, so that nothing outside sees it and nothing is left."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

# One command a line from standard input, so that the disk can be resized; the namespace ends with the shell.
_SHELL = 'while read -r line; do eval "$line" && echo done || echo failed; done'


class SmallDisk:
    """A tmpfs of a given size. `path` is its folder as every process of this host reaches it."""

    def __init__(self, mount_point: Path, size: int) -> None:
        """Raises: OSError where neither root nor a user namespace may mount."""
        mount_point.mkdir(parents=True)
        self._mount_point = mount_point
        self._shell = subprocess.Popen(
            ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), "sh", "-c", _SHELL],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._command(f"mount -t tmpfs -o size={max(1, size)} tmpfs '{mount_point}'")
        self.path = Path(f"/proc/{self._shell.pid}/root") / mount_point.relative_to("/")

    def __enter__(self) -> SmallDisk:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._shell.stdin is not None
        self._shell.stdin.close()
        self._shell.wait()

    def resize(self, size: int) -> None:
        """Make it larger or smaller."""
        self._command(f"mount -o remount,size={size} '{self._mount_point}'")

    def _command(self, line: str) -> None:
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        try:
            self._shell.stdin.write(line + "\n")
            self._shell.stdin.flush()
        except BrokenPipeError:
            pass
        said = self._shell.stdout.readline()
        while said not in ("done\n", "failed\n", ""):
            said = self._shell.stdout.readline()
        if said != "done\n":
            raise OSError(f"this host allows no mounts: {line}")


def can_mount(folder: Path) -> bool:
    """Whether a SmallDisk can be made here."""
    try:
        with SmallDisk(folder, 1 << 16):
            return True
    except OSError:
        return False
