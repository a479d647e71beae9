"""A run that was taken back: which checkpoints of its folder are its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalm.checkpoint import layout
from megalm.checkpoint.durable import replace_text, write_text
from megalm.checkpoint.find import find_checkpoint
from megalm.checkpoint.lineage import KEY, Lineage, Tip, attempt_at, describe, lineage_in, new_attempt, parse_lineage
from megalm.checkpoint.manifest import Manifest, read_manifest
from megalm.checkpoint.retention import Retention, remove_outdated

AGAIN: Lineage = (("20260101-000000-aaaa", 11),)
"""Of a run that was taken back to step 10."""


def saved(folder: Path, step: int, lineage: Lineage | None) -> Path:
    """A checkpoint with nothing but its train state."""
    path = folder / layout.step_folder(step)
    path.mkdir(parents=True)
    state = {"step": step, **({} if lineage is None else {KEY: lineage})}
    files = (write_text(path / layout.TRAIN_STATE, json.dumps(state)), write_text(path / "a.pt", "a" * step))
    manifest = Manifest(step=step, layout={}, model={}, versions={}, files=files, lineage=lineage)
    write_text(path / layout.MANIFEST, manifest.to_json())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that saved 10 to 40, was taken back to 10, and saved 25 and 50."""
    for step in (10, 20, 30, 40):
        saved(tmp_path, step, ())
    for step in (25, 50):
        saved(tmp_path, step, AGAIN)
    replace_text(tmp_path / layout.LATEST, "global_step50")
    return tmp_path


def damage(folder: Path, *steps: int, file: str = "a.pt") -> None:
    for step in steps:
        (folder / f"global_step{step}" / file).write_text("damaged")


def found(folder: Path) -> tuple[str, str]:
    said: list[str] = []
    return find_checkpoint(folder, warn=said.append).name, said[-1] if said else ""


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("global_step")) for path in folder.glob("global_step*"))


@pytest.mark.parametrize("file", ["a.pt", layout.TRAIN_STATE, layout.MANIFEST])
def test_a_damaged_newest_step_is_followed_by_those_of_its_own_attempts(folder: Path, file: str) -> None:
    assert found(folder) == ("global_step50", "")
    damage(folder, 50, file=file)
    assert found(folder)[0] == "global_step25"
    damage(folder, 25)
    assert found(folder)[0] == "global_step10"
    damage(folder, 10)
    name, said = found(folder)
    assert name == "global_step40"
    assert "steps that the run had left behind: none that it came by is valid" in said


def test_going_on_with_the_earlier_attempt_passes_over_the_later_one(folder: Path) -> None:
    saved(folder, 60, ())
    replace_text(folder / layout.LATEST, "global_step60")
    damage(folder, 60)
    assert found(folder)[0] == "global_step40"


@pytest.mark.parametrize("latest", [None, "global_step99"])
def test_without_latest_the_attempt_that_began_last_is_gone_on_with(folder: Path, latest: str | None) -> None:
    (folder / layout.LATEST).unlink()
    if latest is not None:
        (folder / layout.LATEST).write_text(latest)
    (folder / "global_step50").rename(folder / "elsewhere")
    assert found(folder)[0] == "global_step25"


@pytest.mark.parametrize("keep_last, left", [(1, [20, 30, 40, 50]), (2, [20, 25, 30, 40, 50]), (3, None)])
def test_retention_counts_the_run_s_own_and_keeps_what_was_left_behind(
    folder: Path, keep_last: int, left: list[int] | None
) -> None:
    remove_outdated(folder, Retention(keep_last), newest=folder / "global_step50", lineage=AGAIN)
    assert steps(folder) == (left or [10, 20, 25, 30, 40, 50])


def test_checkpoints_without_a_lineage_count_by_their_step(tmp_path: Path) -> None:
    for step in (10, 20, 25, 30):
        saved(tmp_path, step, None)
    replace_text(tmp_path / layout.LATEST, "global_step30")
    damage(tmp_path, 30)
    assert found(tmp_path)[0] == "global_step25"
    assert read_manifest(tmp_path / "global_step25").lineage is None
    remove_outdated(tmp_path, Retention(2), newest=saved(tmp_path, 40, ()), lineage=())
    assert steps(tmp_path) == [30, 40]


def test_a_run_taken_back_among_checkpoints_without_a_lineage_leaves_the_later_ones_behind(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        saved(tmp_path, step, None)
    saved(tmp_path, 25, AGAIN)
    remove_outdated(tmp_path, Retention(2), newest=saved(tmp_path, 50, AGAIN), lineage=AGAIN)
    assert steps(tmp_path) == [20, 25, 30, 40, 50]


def test_retention_reads_no_state_where_nothing_would_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalm.checkpoint.retention.own_checkpoints", None)
    assert remove_outdated(folder, Retention(6), newest=folder / "global_step50", lineage=AGAIN) == ((), ())


def test_each_step_has_one_attempt() -> None:
    lineage: Lineage = (("b", 11), ("c", 26))
    assert [attempt_at(lineage, step) for step in (0, 10, 11, 25, 26, 90)] == ["", "", "b", "b", "c", "c"]
    tip = Tip(30, lineage)
    behind = [(10, ()), (20, lineage[:1]), (25, lineage[:1]), (30, lineage)]
    assert all(tip.has_behind(step, own) for step, own in behind)
    left = [(20, ()), (28, lineage[:1]), (28, (("b", 11), ("d", 27))), (40, lineage)]
    assert not any(tip.has_behind(step, own) for step, own in left)
    assert describe(lineage) == "the first attempt, attempt b from step 11 on, attempt c from step 26 on"


def test_names_of_attempts_are_read_back_and_differ() -> None:
    first, second = new_attempt(), new_attempt()
    assert first != second
    lineage = ((first, 1), (second, 2))
    assert lineage_in(json.loads(json.dumps({KEY: lineage}))) == lineage


@pytest.mark.parametrize(
    "stored", [1, "x", [1], [["a"]], [["a", "1"]], [[1, 1]], [["a", -1]], [["a", 5], ["b", 5]], [["a", True]]]
)
def test_what_is_no_lineage_is_refused(stored: object) -> None:
    with pytest.raises(ValueError, match="lineage"):
        parse_lineage(stored)
    assert lineage_in({KEY: stored}) is None
