"""A3: a disk that fills in the middle of a save."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import pytest

from megalm.errors import CheckpointError
from tests.faults.report import Figures
from tests.faults.trial import ZERO1, Clean, CleanRuns, Trial
from tests.support.small_disk import SmallDisk, can_mount

pytestmark = pytest.mark.dist

PLENTY = 1 << 28
LARGEST_SHARE = 1.2


def limit_file_size(rank: int, size: int) -> None:
    """The nearest thing to a full disk where nothing can be mounted: no file may be larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def checkpoint_bytes(clean: Clean) -> int:
    """What a checkpoint takes on a disk of pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in (clean.folder / "global_step5").iterdir())


def fill_and_go_on(clean: Clean, folder: Path, share: float, flags: list[str]) -> None:
    """Train on a disk of `share` checkpoints until it is full, make room, and go on."""
    with SmallDisk(folder / "disk", int(share * checkpoint_bytes(clean))) as disk:
        trial = Trial(clean, disk.path / "run", flags=flags)
        trial.logs = folder / "logs"
        ended = trial.run()
        assert ended.code == CheckpointError.exit_code, ended.output
        assert ended.left == ()
        assert "No space left on device" in ended.output
        assert "Traceback" not in ended.output, ended.output
        newest = trial.check()
        # Between the two it depends on what the record of metrics takes.
        assert newest == 5 if share > 1.1 else newest == 0 or share > 1.0
        disk.resize(PLENTY)
        ended = trial.run()
        assert ended.code == 0, ended.output
        trial.check_complete()


def refuse_large_files_and_go_on(clean: Clean, folder: Path, share: float, flags: list[str]) -> None:
    """Train where the largest file of a checkpoint does not fit, then where it does."""
    largest = max(path.stat().st_size for path in (clean.folder / "global_step5").iterdir())
    trial = Trial(clean, folder / "run", flags=flags)
    ended = trial.run(prepare=limit_file_size, arguments=(int(share / LARGEST_SHARE * 0.98 * largest),))
    assert ended.code == CheckpointError.exit_code, ended.output
    assert "File too large" in ended.output
    assert trial.check() == 0
    ended = trial.run()
    assert ended.code == 0, ended.output
    trial.check_complete()


def test_a_full_disk_stops_the_run_with_what_it_had_and_room_lets_it_go_on(
    figures: Figures, full: bool, clean_runs: CleanRuns, tmp_path: Path
) -> None:
    clean = clean_runs.of(replace(ZERO1, steps=15))
    number = 25 if full else 8
    mounts = can_mount(tmp_path / "probe")
    case_of = fill_and_go_on if mounts else refuse_large_files_and_go_on
    what = "disks of 0 to 1.2 checkpoints that fill" if mounts else "files that may not grow to their size"
    with figures.count("A3", what) as count:
        for case in range(number):
            share = LARGEST_SHARE * case / (number - 1)
            # Every other run is told to go on without the checkpoint; the one at its end must succeed.
            flags = ["--on-save-failure", "continue"] if case % 2 == 0 else []
            with count.case(f"{share:.2f} checkpoints {' '.join(flags)}"):
                case_of(clean, tmp_path / str(case), share, flags)
