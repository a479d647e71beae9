"""Whose checkpoints a run saves among."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalm.errors import CheckpointError
from megalm.train.continuing import check_save_folder
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
