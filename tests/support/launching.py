"""Starts the program through the scripts of launch/, as its user does, and reads what it left."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.tiny_run import MODEL_FLAGS, TRAINING_FLAGS

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    code: int
    output: str
    """Standard output and error together."""
    cpu_seconds: float
    """Of the program and all of its processes that were waited for."""


def script(name: str, *options: str) -> list[str]:
    """The command of a launch script and its own options."""
    return ["bash", str(ROOT / "launch" / name), *options]


def program(*flags: str) -> list[str]:
    """pretrain_gpt.py with the tiny run's flags; later flags win over nothing: give none of its flags twice."""
    return ["pretrain_gpt.py", *MODEL_FLAGS, *TRAINING_FLAGS, *flags]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with this interpreter, on the CPU, without what an outer launcher may have set."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    }
    own = {"MEGALM_PYTHON": sys.executable, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**inherited, **own, **(extra or {})}


def start(command: Sequence[str], *, extra: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command at the root of the checkout, in a session of its own."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(extra),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], *, timeout: float = 240.0) -> Ended:
    """Wait for a started command; its whole session is killed if it takes too long."""
    before = _cpu_seconds()
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{process.args!r} did not end within {timeout:.0f} s:\n{output}") from None
    return Ended(process.returncode, output, _cpu_seconds() - before)


def run(command: Sequence[str], *, extra: Mapping[str, str] | None = None, timeout: float = 240.0) -> Ended:
    """Start a command and wait for it."""
    return finish(start(command, extra=extra), timeout=timeout)


def losses(save: Path) -> list[str]:
    """Every training loss that a run logged, bit for bit, in order of steps."""
    lines = (save / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss_hex"] for record in records]


def processes_of_session(session: int) -> list[int]:
    """Ids of the processes that still run in a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
