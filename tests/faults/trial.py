"""Runs that are disturbed, and the undisturbed ones that they must equal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalm.checkpoint import layout
from megalm.checkpoint.find import find_checkpoint
from megalm.checkpoint.lineage import KEY as LINEAGE
from megalm.checkpoint.manifest import read_manifest, verify
from megalm.checkpoint.retention import published_checkpoints
from megalm.checkpoint.roll_backs import KEY as ROLL_BACKS
from megalm.checkpoint.roll_backs import SPIKE_WATCH
from tests.support.jobs import Job, JobEnd, run_job
from tests.support.tiny_run import MODEL_FLAGS, SEQ_LENGTH, TRAINING_FLAGS


@dataclass(frozen=True)
class Setting:
    """How a run is laid out and what it does beside training."""

    name: str
    world_size: int
    flags: tuple[str, ...]
    steps: int = 60
    interval: int = 5


TP2 = Setting("TP2", 2, ("--tensor-model-parallel-size", "2"))
PP2 = Setting("PP2", 2, ("--pipeline-model-parallel-size", "2"))
DP2 = Setting("DP2", 2, ())
ZERO1 = Setting("ZeRO-1", 2, ("--zero-stage", "1"))
SETTINGS = (TP2, PP2, DP2, ZERO1)


@dataclass(frozen=True)
class Clean:
    """What the undisturbed run left."""

    setting: Setting
    corpus: str
    folder: Path
    losses: dict[int, str] = field(default_factory=dict)

    def command(self, save: Path) -> list[str]:
        """Flags of this run saving elsewhere."""
        training = [*TRAINING_FLAGS, "--hidden-dropout", "0.1", "--attention-dropout", "0.1"]
        own = {
            "training.train_iters": self.setting.steps,
            "output.save_interval": self.setting.interval,
            "output.save": save,
        }
        overrides = [f"{name}={value}" for name, value in own.items()]
        return [*MODEL_FLAGS, *training, "--data-path", self.corpus, *self.setting.flags, *overrides]

    def hashes(self, step: int) -> dict[str, str]:
        """sha256 by file of the checkpoint after `step`."""
        return content(self.folder / layout.step_folder(step))


class CleanRuns:
    """Makes each undisturbed run once."""

    def __init__(self, folder: Path, *, corpus: str) -> None:
        self.corpus = corpus
        self._folder = folder
        self._made: dict[Setting, Clean] = {}

    def of(self, setting: Setting) -> Clean:
        """The undisturbed run of a setting."""
        if setting not in self._made:
            folder = self._folder / f"{len(self._made)}-{setting.name}"
            clean = Clean(setting, self.corpus, folder)
            ended = run_job(clean.command(folder), world_size=setting.world_size, logs=folder.with_suffix(".logs"))
            assert ended.code == 0, ended.output
            clean.losses.update(losses(folder / "metrics.jsonl"))
            assert sorted(clean.losses) == list(range(1, setting.steps + 1))
            self._made[setting] = clean
        return self._made[setting]


class Trial:
    """One folder that a disturbed run saves to, continued after every fault."""

    def __init__(self, clean: Clean, folder: Path, *, flags: Sequence[str] = ()) -> None:
        self.clean = clean
        self.folder = folder
        self.logs = folder.with_suffix(".logs")
        self._flags = list(flags)

    def start(self, *flags: str, **options: Any) -> Job:
        """Start, or continue from what is published; what is there but not published is no reason to load."""
        load = ["--load", str(self.folder)] if self.newest() else []
        command = [*self.clean.command(self.folder), *self._flags, *load, *flags]
        return Job(command, world_size=self.clean.setting.world_size, logs=self.logs, **options)

    def run(self, *flags: str, **options: Any) -> JobEnd:
        """Start and wait."""
        with self.start(*flags, **options) as job:
            return job.wait()

    def newest(self) -> int:
        """Step of the newest published checkpoint, 0 without one."""
        if not self.folder.is_dir():
            return 0
        return max((step for step, _ in published_checkpoints(self.folder)), default=0)

    def reached(self) -> int:
        """The last step that was logged."""
        return max(losses(self.folder / "metrics.jsonl"), default=0)

    def check(self) -> int:
        """Everything on the disk is whole and what the undisturbed run has; returns the newest published step."""
        newest = self.check_whole()
        for step, path in published_checkpoints(self.folder) if newest else ():
            different = _different(content(path), self.clean.hashes(step))
            assert not different, f"{path} is not what the undisturbed run saved: {different}"
        for path in (self.folder / "metrics.jsonl", self.folder / "metrics.jsonl.discarded"):
            for step, loss in losses(path).items():
                assert self.clean.losses[step] == loss, f"the loss of step {step} differs"
        return newest

    def check_whole(self) -> int:
        """Every published checkpoint verifies; returns the newest step."""
        newest = self.newest()
        if newest:
            warnings: list[str] = []
            found = find_checkpoint(self.folder, warn=warnings.append)
            for step, path in published_checkpoints(self.folder):
                manifest = read_manifest(path)
                assert verify(path, manifest) == [], f"{path} is published and damaged"
                assert manifest.step == step
            # A fault between the rename and the replacement of `latest` leaves a newer one than it names.
            assert layout.parse_step(found.name.removesuffix(".old")) is not None, warnings
        return newest

    def check_complete(self) -> None:
        """The run came to its end and is the undisturbed one."""
        setting = self.clean.setting
        assert self.check() == setting.steps
        records = [record for record in read_records(self.folder / "metrics.jsonl") if record["kind"] == "train"]
        assert [(r["step"], r["loss_hex"]) for r in records] == sorted(self.clean.losses.items())
        assert records[-1]["consumed_tokens"] == setting.steps * 8 * SEQ_LENGTH
        assert leftovers(self.folder) == []


def content(checkpoint: Path) -> dict[str, str]:
    """sha256 by name of every file. config.yaml is left out, as it names the folder that was saved to; train_state.json
    is there as it is, without what tells how the run came there: attempts, roll-backs and what watches for them."""
    hashes = {record.name: record.sha256 for record in read_manifest(checkpoint).files if record.name != layout.CONFIG}
    own = (LINEAGE, ROLL_BACKS, SPIKE_WATCH)
    state = json.loads((checkpoint / layout.TRAIN_STATE).read_text(encoding="utf-8"))
    return {**hashes, layout.TRAIN_STATE: json.dumps({name: state[name] for name in state if name not in own})}


def leftovers(folder: Path) -> list[str]:
    """What an interrupted save leaves and the next one must remove."""
    return [path.name for path in folder.iterdir() if path.name.endswith((".tmp", ".old"))]


def losses(path: Path) -> dict[int, str]:
    """Every training loss of a record by step, bit for bit; of a step that was logged twice, both must agree."""
    found: dict[int, str] = {}
    for record in read_records(path):
        if record["kind"] == "train":
            known = found.setdefault(record["step"], record["loss_hex"])
            assert known == record["loss_hex"], f"two losses of step {record['step']} in {path}"
    return found


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a record; a last one that was cut short is left out."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def _different(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
