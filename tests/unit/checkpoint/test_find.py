from __future__ import annotations

from pathlib import Path

import pytest

from megalm.checkpoint import layout
from megalm.checkpoint.durable import publish_folder, replace_text
from megalm.checkpoint.find import find_checkpoint
from megalm.checkpoint.retention import Retention, remove_outdated
from megalm.errors import CheckpointError
from tests.unit.checkpoint.test_manifest import checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (5, 10, 15):
        checkpoint(tmp_path / layout.step_folder(step), step=step)
    replace_text(tmp_path / layout.LATEST, "global_step15")
    return tmp_path


def test_latest_is_taken_without_a_word(folder: Path) -> None:
    said: list[str] = []
    assert find_checkpoint(folder, warn=said.append).name == "global_step15"
    assert said == []


def test_latest_may_name_an_older_checkpoint_on_purpose(folder: Path) -> None:
    replace_text(folder / layout.LATEST, "global_step5")
    assert find_checkpoint(folder, warn=print).name == "global_step5"


def test_a_damaged_checkpoint_is_named_and_the_newest_valid_one_used(folder: Path) -> None:
    (folder / "global_step15" / "a.pt").write_text("x" * 400)
    said: list[str] = []
    assert find_checkpoint(folder, warn=said.append).name == "global_step10"
    assert "global_step15/a.pt does not have the bytes" in said[0]
    assert "continuing from" in said[1]


@pytest.mark.parametrize("latest", [None, "", "global_step99", "../global_step5", "global_step10\0"])
def test_a_bad_latest_falls_back_to_the_newest_checkpoint(folder: Path, latest: str | None) -> None:
    (folder / layout.LATEST).unlink()
    if latest is not None:
        (folder / layout.LATEST).write_text(latest)
    said: list[str] = []
    assert find_checkpoint(folder, warn=said.append).name == "global_step15"
    assert "latest" in said[0]


def test_a_checkpoint_set_aside_by_an_interrupted_replacement_counts(folder: Path) -> None:
    (folder / "global_step15").rename(folder / "global_step15.old")
    said: list[str] = []
    assert find_checkpoint(folder, warn=said.append).name == "global_step15.old"


def test_a_checkpoint_that_was_moved_and_linked_counts_and_is_not_lost(folder: Path) -> None:
    elsewhere = folder / "disk"
    elsewhere.mkdir()
    (folder / "global_step15").rename(elsewhere / "global_step15")
    (folder / "global_step15").symlink_to(elsewhere / "global_step15")
    said: list[str] = []
    assert find_checkpoint(folder, warn=said.append).name == "global_step15"
    assert said == []
    checkpoint(folder / "global_step15.tmp", step=15)
    publish_folder(folder / "global_step15.tmp", folder / "global_step15", replaced=folder / "global_step15.old")
    assert not (folder / "global_step15").is_symlink()
    (folder / "global_step10").rename(elsewhere / "global_step10")
    (folder / "global_step10").symlink_to(elsewhere / "global_step10")
    remove_outdated(folder, Retention(1), newest=folder / "global_step15")
    assert sorted(path.name for path in folder.iterdir()) == ["disk", "global_step15", "latest"]
    assert sorted(path.name for path in elsewhere.iterdir()) == ["global_step10", "global_step15"]


def test_unfinished_folders_are_never_candidates(folder: Path) -> None:
    checkpoint(folder / "global_step20.tmp", step=20)
    (folder / layout.LATEST).unlink()
    assert find_checkpoint(folder, warn=str).name == "global_step15"


def test_a_step_that_is_asked_for_is_found_or_an_error(folder: Path) -> None:
    assert find_checkpoint(folder, step=10).name == "global_step10"
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; there are 15, 10, 5"):
        find_checkpoint(folder, step=7)


def test_one_checkpoints_own_folder_is_accepted(folder: Path) -> None:
    assert find_checkpoint(folder / "global_step5") == folder / "global_step5"


def test_nothing_valid_is_an_error_that_names_everything(folder: Path) -> None:
    for step in (5, 10, 15):
        (folder / f"global_step{step}" / "b.pt").unlink()
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(folder)
    for step in (5, 10, 15):
        assert f"global_step{step}/b.pt is missing" in str(caught.value)
    assert str(caught.value).endswith("give the folder that a run saved to")


def test_a_hugging_face_folder_is_told_from_a_damaged_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"it is a Hugging Face folder, of which tools/import_hf\.py makes"):
        find_checkpoint(tmp_path)


def test_checkpoints_beside_a_hugging_face_model_are_found(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    assert find_checkpoint(folder) == folder / "global_step15"


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        find_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("keep_last", [0, 1, 2, 3, 9])
def test_retention_keeps_the_newest_and_never_the_last_one_less(folder: Path, keep_last: int) -> None:
    newest = folder / "global_step15"
    remove_outdated(folder, Retention(keep_last), newest=newest)
    left = sorted(path.name for path in folder.glob("global_step*"))
    expected = ["global_step15", "global_step10", "global_step5"][: max(1, keep_last)]
    assert left == sorted(expected)


def test_retention_keeps_what_was_just_saved_beside_later_steps(folder: Path) -> None:
    """A run that went back to step 5 and saved: the abandoned later checkpoints neither push it out nor count."""
    assert remove_outdated(folder, Retention(1), newest=folder / "global_step5") == ((), ())
    removed, problems = remove_outdated(folder, Retention(1), newest=folder / "global_step10")
    assert {path.name for path in removed} == {"global_step5"}
    assert problems == ()


def test_a_run_that_was_taken_back_does_not_go_on_from_a_later_step_that_it_left(folder: Path) -> None:
    (folder / "latest").write_text("global_step10")
    (folder / "global_step10" / "a.pt").unlink()
    assert find_checkpoint(folder, warn=lambda line: None) == folder / "global_step5"
    (folder / "global_step5" / "a.pt").unlink()
    assert find_checkpoint(folder, warn=lambda line: None) == folder / "global_step15"


def test_checkpoints_of_every_kth_step_stay_besides(folder: Path) -> None:
    remove_outdated(folder, Retention(keep_last=1, keep_every=10), newest=folder / "global_step15")
    assert sorted(path.name for path in folder.glob("global_step*")) == ["global_step10", "global_step15"]


def test_all_stay_without_a_number(folder: Path) -> None:
    assert remove_outdated(folder, Retention(keep_every=10), newest=folder / "global_step15") == ((), ())
