"""A4: bits, lengths and places of files that changed on the disk."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megalm.checkpoint import layout
from megalm.checkpoint.find import find_checkpoint
from megalm.errors import CheckpointError
from tests.faults.report import Figures
from tests.faults.trial import TP2, Clean, CleanRuns, Trial

pytestmark = pytest.mark.dist

Damage = Callable[[Path, random.Random], None]


def flip_a_bit(path: Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, generator: random.Random) -> None:
    with open(path, "r+b") as file:
        file.truncate(generator.randrange(path.stat().st_size))


def remove(path: Path, generator: random.Random) -> None:
    path.unlink()


def swap(path: Path, generator: random.Random) -> None:
    """Exchange two files of the checkpoint."""
    others = sorted(other for other in path.parent.iterdir() if other.read_bytes() != path.read_bytes())
    other = generator.choice(others)
    other.rename(path.with_name("aside"))
    path.rename(other)
    path.with_name("aside").rename(path)


def bring_from_an_earlier_step(path: Path, generator: random.Random) -> None:
    """A whole file of the same run, from another checkpoint."""
    shutil.copy(path.parent.parent / "global_step5" / path.name, path)


KINDS: tuple[Damage, ...] = (truncate, remove, swap, bring_from_an_earlier_step)


def cases(clean: Clean, number: int) -> list[tuple[str, Damage]]:
    """The other kinds over every file, then bit flips over every file in turn."""
    files = sorted(path.name for path in (clean.folder / "global_step10").iterdir())
    same = {name for name in files if (clean.folder / "global_step5" / name).read_bytes()
            == (clean.folder / "global_step10" / name).read_bytes()}  # fmt: skip
    found: list[tuple[str, Damage]] = []
    for name in files:
        found += [(name, kind) for kind in KINDS if kind is not bring_from_an_earlier_step or name not in same]
    while len(found) < number:
        found.append((files[len(found) % len(files)], flip_a_bit))
    return found


def test_damage_is_found_named_and_fallen_back_from(
    figures: Figures, full: bool, clean_runs: CleanRuns, tmp_path: Path
) -> None:
    clean = clean_runs.of(TP2)
    generator = random.Random(4)
    with figures.count("A4", "bit flips, truncations, swapped, missing and foreign files of a checkpoint") as count:
        for number, (name, damage) in enumerate(cases(clean, 700 if full else 100)):
            with count.case(f"{damage.__name__} {name}"):
                folder = tmp_path / str(number)
                for step in (5, 10):
                    shutil.copytree(clean.folder / f"global_step{step}", folder / f"global_step{step}")
                (folder / layout.LATEST).write_text("global_step10")
                damage(folder / "global_step10" / name, generator)
                warnings: list[str] = []
                assert find_checkpoint(folder, warn=warnings.append).name == "global_step5"
                # A file that took the manifest's place is told from the manifest, which is no longer there to say more.
                culprits = (name, layout.MANIFEST) if damage is swap else (name,)
                said = [warning for warning in warnings if "global_step10" in warning]
                assert any(culprit in warning for warning in said for culprit in culprits), warnings
                shutil.rmtree(folder)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_never_from_step_0(
    clean_runs: CleanRuns, tmp_path: Path
) -> None:
    trial = Trial(clean_runs.of(replace(TP2, steps=15)), tmp_path / "run", flags=["--log-level", "warning"])
    assert trial.run("--exit-interval", "10").code == 75
    flip_a_bit(trial.folder / "global_step10" / "layer_03-model_01-model_states.pt", random.Random(0))
    ended = trial.run()
    assert ended.code == 0
    assert "layer_03-model_01-model_states.pt" in ended.output
    trial.check_complete()
    for step in (5, 10, 15):
        flip_a_bit(trial.folder / f"global_step{step}" / "train_state.json", random.Random(0))
    ended = trial.run()
    assert ended.code == CheckpointError.exit_code
    assert "no valid checkpoint" in ended.output
