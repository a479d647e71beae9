"""Whose checkpoints a run saves among, and whether it begins another attempt."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalm.checkpoint import layout
from megalm.checkpoint.identity import as_given
from megalm.checkpoint.lineage import Lineage, Tip
from megalm.checkpoint.manifest import Manifest
from megalm.checkpoint.roll_backs import RollBack
from megalm.config.yaml_file import config_to_yaml
from megalm.errors import CheckpointError
from megalm.train.continuing import Onward, check_save_folder, compare, left_out_ahead, onward
from tests.unit.checkpoint.test_lineage import AGAIN, saved
from tests.unit.config.arguments import smallest


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name in ("run/global_step10", "run/global_step20", "imported/global_step0", "empty"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    "words, loaded",
    [
        ("--save empty", None),
        ("--save new", None),
        ("--load empty --allow-fresh-start --save empty", None),
        ("--load run --save run", "run/global_step20"),
        ("--load run/global_step10 --save run", "run/global_step10"),
        ("--load run/../run --save run", "run/global_step20"),
        ("--load run --save empty", "run/global_step20"),
        ("--load run --finetune --save empty", "run/global_step20"),
        ("--load imported --finetune --save imported", "imported/global_step0"),
        ("--load run --eval-only --save imported", "run/global_step20"),
        # All of its checkpoints are damaged.
        ("--load run --allow-fresh-start --save run", None),
    ],
)
def test_a_run_saves_where_there_are_none_but_its_own(words: str, loaded: str | None, folders: Path) -> None:
    check_save_folder(*_given(words, loaded, folders))


@pytest.mark.parametrize(
    "words, loaded, remedy",
    [
        ("--save run", None, "--load .*/run goes on from them; for another run give another --save"),
        ("--load empty --allow-fresh-start --save run", None, "goes on from them"),
        ("--load imported --save run", "imported/global_step0", "goes on from them"),
        ("--load run --finetune --save run", "run/global_step20", "  give another --save"),
        ("--load run/global_step10 --reset-progress --save run", "run/global_step10", "  give another --save"),
        ("--load run --save imported", "run/global_step20", "goes on from them"),
    ],
)
def test_another_run_s_checkpoints_are_not_replaced(words: str, loaded: str | None, remedy: str, folders: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"holds checkpoints of another run (.|\n)*{remedy}"):
        check_save_folder(*_given(words, loaded, folders))


def _given(words: str, loaded: str | None, folders: Path) -> tuple[object, Path | None]:
    """The configuration with its folders inside `folders`, and the checkpoint found."""
    names = {"run", "imported", "empty", "new"}
    line = [str(folders / word) if word.split("/")[0] in names else word for word in words.split()]
    return smallest(*line), None if loaded is None else folders / loaded


def test_a_step_is_of_its_folder_under_any_name(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = folders / "run" / "global_step20"
    monkeypatch.chdir(step)
    (folders / "link").symlink_to(step)
    (folders / "disk").mkdir()
    (folders / "run" / "global_step30").symlink_to(folders / "disk")
    for loaded in (Path(), folders / "link", folders / "run" / "global_step30"):
        check_save_folder(smallest("--load", str(loaded), "--save", str(folders / "run")), loaded)


@pytest.fixture
def taken_back(tmp_path: Path) -> Path:
    """A run that saved 10 to 40, was taken back to 10, and saved 25 and 50."""
    for step, lineage in ((10, ()), (20, ()), (40, ()), (25, AGAIN), (50, AGAIN)):
        saved(tmp_path / "run", step, lineage)
    return tmp_path


@pytest.mark.parametrize(
    "words, step, lineage, kept",
    [
        ("--load run --save run", 50, AGAIN, AGAIN),
        # The newest of the first attempt, whatever the other one saved later.
        ("--load run/global_step40 --save run", 40, (), ()),
        ("--load run/global_step10 --save new", 10, (), ()),
        ("--load run/global_step25 --save new", 25, AGAIN, AGAIN),
        ("--load run/global_step25", 25, AGAIN, AGAIN),
        ("--load run/global_step10 --save run --eval-only", 10, (), ()),
        ("--load run/global_step25 --save new --finetune", 25, AGAIN, ()),
        ("--load run/global_step25 --save new --reset-progress", 25, AGAIN, ()),
    ],
)
def test_a_run_that_goes_on_from_its_newest_step_keeps_its_attempt(
    words: str, step: int, lineage: Lineage, kept: Lineage, taken_back: Path
) -> None:
    config, _ = _given(words, None, taken_back)
    found = onward(config, taken_back / "run" / f"global_step{step}", Tip(step, lineage))
    assert (found.lineage, found.begins) == (kept, None)
    assert found.later == (("global_step50",) if words == "--load run/global_step40 --save run" else ())


@pytest.mark.parametrize("step, lineage", [(10, ()), (20, ()), (25, AGAIN), (10, None)])
def test_a_run_that_was_taken_back_begins_another_attempt(step: int, lineage: Lineage | None, taken_back: Path) -> None:
    found = _back_to(step, lineage, taken_back)
    assert found.begins is not None
    assert found.lineage == (*(lineage or ()), (found.begins, step + 1))
    assert found.later[0] == "global_step50"
    assert str(found).startswith("later steps than the one gone on from: global_step50, ")


def test_a_later_step_whose_lineage_cannot_be_read_may_be_of_this_run(taken_back: Path) -> None:
    assert _back_to(40, (), taken_back).begins is None
    for file in ("train_state.json", "manifest.json"):
        (taken_back / "run" / "global_step50" / file).unlink()
    assert _back_to(40, (), taken_back).begins is not None


def test_a_fresh_start_beside_damaged_checkpoints_is_an_attempt_of_its_own(taken_back: Path) -> None:
    config, _ = _given("--load run --allow-fresh-start --save run", None, taken_back)
    found = onward(config, None, Tip(0, None))
    assert found.lineage == ((found.begins, 0),)
    assert onward(_given("--load empty --allow-fresh-start --save empty", None, taken_back)[0], None, Tip(0, None)) == (
        Onward()
    )


def _back_to(step: int, lineage: Lineage | None, folders: Path) -> Onward:
    config, _ = _given(f"--load run/global_step{step} --save run", None, folders)
    return onward(config, folders / "run" / f"global_step{step}", Tip(step, lineage))


@pytest.mark.parametrize(
    "before, dp_before, now, dp_now, told",
    [
        ((), 1, (), 1, []),
        ((), 1, (), 2, ["training.global_batch_size: 2 in the checkpoint, 4 now (micro_batch_size * dp, which is 2; "]),
        (("--global-batch-size", "4"), 1, ("--global-batch-size", "4"), 2, []),
        (("--micro-batch-size", "2"), 4, ("--micro-batch-size", "4"), 2, ["training.micro_batch_size: 2 in the"]),
        ((), None, (), 2, []),
    ],
)
def test_a_batch_that_follows_the_replicas_is_told_when_it_changes(
    before: tuple[str, ...], dp_before: int | None, now: tuple[str, ...], dp_now: int, told: list[str], tmp_path: Path
) -> None:
    path = saved(tmp_path, 10, ())
    (path / layout.CONFIG).write_text(config_to_yaml(as_given(smallest(*before))))
    manifest = Manifest(step=10, layout={"dp": dp_before} if dp_before else {}, model={}, versions={}, files=())
    (path / layout.MANIFEST).write_text(manifest.to_json())
    lines: list[str] = []
    found = compare(smallest(*now), path, dp_size=dp_now, info=lines.append, warn=lines.append)
    assert len(lines) == len(found) == len(told)
    for line, wanted in zip(lines, told, strict=True):
        assert line.startswith(f"changed since global_step10: {wanted}")


def test_steps_ahead_that_are_left_out_are_told_where_the_run_trains() -> None:
    known = (RollBack(first=3, last=5, spike=4), RollBack(first=11, last=12, spike=11))
    assert left_out_ahead(smallest(), known, step=5) == ["left out are steps 11 to 12, as the loss rose at step 11"]
    assert len(left_out_ahead(smallest(), known, step=4)) == 2
    assert left_out_ahead(smallest("--load", "run", "--eval-only"), known, step=0) == []
