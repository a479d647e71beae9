"""Where a run is taken back to, what is written down of it, and when it is done so too often."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalm.checkpoint import layout
from megalm.checkpoint.lineage import Tip
from megalm.checkpoint.manifest import Manifest
from megalm.checkpoint.roll_backs import RollBack, in_a_row, parse_roll_backs, to_json
from megalm.checkpoint.taking_back import read_roll_backs, take_back
from megalm.checkpoint.universal import description
from megalm.errors import CheckpointError
from megalm.train.continuing import forget_roll_backs, roll_backs
from tests.unit.checkpoint.test_lineage import AGAIN, saved
from tests.unit.config.arguments import smallest
from tools import inspect_checkpoint

EARLIER = RollBack(first=30, last=44, spike=37)
WANTED = RollBack(first=33, last=47, spike=40)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that saved 10 to 40, was taken back to 10, and saved 25 and 35."""
    for step, lineage in ((10, ()), (20, ()), (30, ()), (40, ()), (25, AGAIN), (35, AGAIN)):
        saved(tmp_path, step, lineage)
    (tmp_path / layout.LATEST).write_text("global_step40")
    return tmp_path


@pytest.mark.parametrize(
    "tip, wanted, step, first",
    [
        (Tip(41, ()), WANTED, 30, 33),
        (Tip(38, AGAIN), WANTED, 25, 33),
        (Tip(41, ()), RollBack(first=31, last=47, spike=40), 30, 31),
        # None is far enough back.
        (Tip(41, ()), RollBack(first=3, last=47, spike=40), 30, 31),
        (Tip(38, AGAIN), RollBack(first=3, last=47, spike=36), 35, 36),
    ],
)
def test_the_newest_checkpoint_of_the_run_from_before_is_taken(
    tip: Tip, wanted: RollBack, step: int, first: int, run: Path
) -> None:
    found = take_back(run, tip, wanted)
    decided = RollBack(first, wanted.last, wanted.spike)
    assert found == (run / f"global_step{step}", decided)
    assert (run / layout.LATEST).read_text() == f"global_step{step}"
    assert read_roll_backs(run) == (decided,)


def test_without_a_checkpoint_from_before_nothing_changes(run: Path) -> None:
    assert take_back(run, Tip(12, ()), RollBack(first=3, last=20, spike=9)) is None
    assert (run / layout.LATEST).read_text() == "global_step40"
    assert not (run / layout.ROLL_BACKS).exists()


def test_earlier_roll_backs_stay_on_record(run: Path) -> None:
    take_back(run, Tip(41, ()), EARLIER)
    take_back(run, Tip(41, ()), WANTED)
    assert read_roll_backs(run) == (EARLIER, WANTED)
    assert parse_roll_backs(json.loads(json.dumps(to_json([EARLIER, WANTED])))) == (EARLIER, WANTED)


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '[{"first": 1, "last": 2}]', '[{"first": 2, "last": 9, "spike": 1}]', "[" * 100_000,
             '[{"first": 0, "last": 9, "spike": 1}]', '[{"first": true, "last": 9, "spike": 1}]']
)  # fmt: skip
def test_a_record_that_cannot_be_read_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / layout.ROLL_BACKS).write_text(text)
    with pytest.raises(CheckpointError, match=r"roll_backs.json cannot be read"):
        read_roll_backs(tmp_path)


def test_spikes_in_a_row_begin_soon_after_what_the_one_before_left_out() -> None:
    first, second = RollBack(33, 47, 40), RollBack(48, 62, 55)
    assert in_a_row([], 40, within=20) == 0
    assert in_a_row([first, second], 63, within=20) == 2
    assert in_a_row([second, first], 82, within=20) == 2
    assert in_a_row([first, second], 83, within=20) == 0
    assert in_a_row([first, second], 83, within=7) == 0
    assert in_a_row([first, second], 69, within=7) == 1
    # The run was taken back by hand to before them.
    assert in_a_row([first, second], 30, within=20) == 0


@pytest.mark.parametrize(
    "load, step, stored, expected",
    [
        ("", 30, None, (EARLIER, WANTED)[1:]),
        ("", 10, None, (EARLIER, WANTED)),
        ("", 40, to_json([EARLIER, WANTED]), (EARLIER, WANTED)),
        ("", 30, to_json([EARLIER]), (EARLIER, WANTED)),
        # Somebody goes on from what the run was taken back from.
        ("global_step40", 40, None, ()),
        ("global_step30", 30, None, (WANTED,)),
    ],
)
def test_what_is_left_out_is_what_lies_ahead_and_what_the_checkpoint_has(
    load: str, step: int, stored: object, expected: tuple[RollBack, ...], run: Path
) -> None:
    (run / layout.ROLL_BACKS).write_text(json.dumps(to_json([EARLIER, WANTED])))
    config, said = smallest("--load", str(run / load), "--save", str(run)), list[str]()
    if (step, stored) == (30, None) and not load:
        with pytest.raises(CheckpointError, match="is trained on steps that its run was taken back from: steps 30"):
            roll_backs(config, run / "global_step30", stored=stored, step=step, warn=said.append)
        return
    assert roll_backs(config, run / f"global_step{step}", stored=stored, step=step, warn=said.append) == expected
    assert [word for word in said if "was taken back from" not in word] == []
    assert len(said) == bool(load)
    assert all(f"--load {run} refuses what is trained on them until {run / layout.ROLL_BACKS}" in word for word in said)


def test_a_run_that_counts_anew_leaves_nothing_out(run: Path) -> None:
    (run / layout.ROLL_BACKS).write_text(json.dumps(to_json([WANTED])))
    for flag in ("--finetune", "--reset-progress"):
        config = smallest("--load", str(run), "--save", str(run / "new"), flag)
        assert roll_backs(config, run / "global_step10", stored=None, step=0, warn=print) == ()
    fresh = smallest("--load", str(run), "--save", str(run), "--allow-fresh-start")
    assert roll_backs(fresh, None, stored=None, step=0, warn=print) == (WANTED,)


@pytest.mark.parametrize(
    "words, loaded, is_forgotten",
    [
        ("--save run", None, True),
        ("--save run --load other", "other/global_step10", True),
        ("--save run --load run --finetune", "run/global_step0", True),
        ("--save run --load run", "run/global_step10", False),
        ("--save run --load run/global_step10", "run/global_step10", False),
        ("--save run --load run --allow-fresh-start", None, False),
        ("--save run --load other --eval-only", "other/global_step10", False),
    ],
)
def test_a_run_leaves_out_nothing_for_another_one_whose_checkpoints_are_gone(
    words: str, loaded: str | None, is_forgotten: bool, tmp_path: Path
) -> None:
    for name in ("run", "other"):
        (tmp_path / name).mkdir()
    file = tmp_path / "run" / layout.ROLL_BACKS
    file.write_text(json.dumps(to_json([WANTED])))
    flags = [word if word.startswith("--") else str(tmp_path / word) for word in words.split()]
    aside = forget_roll_backs(smallest(*flags), None if loaded is None else tmp_path / loaded)
    assert (aside is not None, file.exists()) == (is_forgotten, not is_forgotten)
    if aside is not None:
        assert aside.name == "roll_backs.json.1"
        assert parse_roll_backs(json.loads(aside.read_text())) == (WANTED,)


@pytest.mark.parametrize("step, expected", [(20, [EARLIER, WANTED]), (45, [WANTED]), (60, [])])
def test_copies_by_deepspeed_s_converter_say_what_lies_ahead(step: int, expected: list[RollBack]) -> None:
    manifest = Manifest(step=step, layout={}, model={}, versions={})
    state = description(manifest, {"step": step, "roll_backs": to_json([EARLIER, WANTED])})["train_state"]
    assert parse_roll_backs(state.get("roll_backs")) == tuple(expected)
    with pytest.raises(CheckpointError, match=r"train_state.json is damaged, roll-backs are 5"):
        description(manifest, {"roll_backs": 5})


def test_what_was_left_out_is_shown() -> None:
    state = {
        "left_out": [{"first_step": 33, "last_step": 47, "first_sample": 256, "last_sample": 375}],
        "roll_backs": to_json([WANTED]),
    }
    assert list(inspect_checkpoint.left_out_lines(state)) == [
        ("left out", "steps 33 to 47, samples 256 to 375"),
        ("taken back", "to leave out steps 33 to 47, as the loss rose at step 40"),
    ]
    assert list(inspect_checkpoint.left_out_lines({})) == []
