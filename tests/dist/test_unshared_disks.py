"""Hosts that do not see the same files: all ranks end alike, with the reason, and nothing half is published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalm.checkpoint import layout
from megalm.errors import MegalmError
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist


def ending(action: Callable[[], object]) -> str:
    """The error that an action ends with on this rank, or its result's text."""
    try:
        return str(action())
    except MegalmError as error:
        return f"{type(error).__name__}: {error}"


def of_own_disk(folder: str, world: Any) -> str:
    """What is `folder` on the first rank's host is another one elsewhere."""
    return folder if world.is_first else folder + ".elsewhere"


def hold_the_folder(folder: str) -> str:
    from megalm.config.output import OutputConfig
    from megalm.topology.agree import exchange
    from megalm.topology.start import Launch, start
    from megalm.train.continuing import only_saver
    from tests.support.training import tiny_config

    topology = start(Launch.from_environment(), tp=1, pp=1)
    own = of_own_disk(folder, topology.world)
    config = replace(tiny_config(), output=OutputConfig(save=own, load=own))
    with only_saver(config, topology):
        return ", ".join(exchange(f"rank {topology.world.rank}", topology.world))


def test_a_folder_that_only_the_first_host_has_is_held_without_a_word_out_of_turn(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    assert run_ranks(hold_the_folder, 2, str(folder), timeout=60.0) == ["rank 0, rank 1"] * 2


def look_for_a_checkpoint(folder: str) -> str:
    from megalm.checkpoint import find
    from megalm.topology.start import Launch, start

    world = start(Launch.from_environment(), tp=1, pp=1).world
    if not world.is_first:
        find.has_no_hashes = lambda path: False  # as where the folder is not there
    return ending(lambda: find.find_checkpoint(folder, world=world))


def test_a_universal_checkpoint_that_only_the_first_host_sees_is_refused_by_all(tmp_path: Path) -> None:
    converted = tmp_path / "global_step3" / layout.UNIVERSAL_FOLDER
    converted.mkdir(parents=True)
    (converted / layout.UNIVERSAL_OPTIMIZER).write_bytes(b"")
    (tmp_path / layout.LATEST_UNIVERSAL).write_text("global_step3")
    first, second = run_ranks(look_for_a_checkpoint, 2, str(tmp_path), timeout=60.0)
    assert first == second
    assert "CheckpointError: no valid checkpoint" in first
    assert "manifest.json" in first


def save_then_load(folder: str) -> tuple[str, str]:
    """A save to disks of the hosts' own, then a load where only the first one has the checkpoint."""
    from megalm.checkpoint.load import load_checkpoint
    from megalm.checkpoint.save import save_checkpoint
    from tests.support.training import TinyRun, tiny_config

    config = tiny_config(pp=2)
    run = TinyRun(config)
    raw, top = run.engine.raw, run.topology

    def save(to: str) -> Path:
        return save_checkpoint(raw, to, {"step": 3, "consumed_samples": 12}, config=config, topology=top).path

    saved = ending(lambda: save(of_own_disk(folder, top.world)))
    path = save(folder + ".shared")
    if not top.world.is_first:
        path = path.with_name("global_step3.elsewhere")
    return saved, ending(lambda: load_checkpoint(raw, path, config=config, topology=top))


def save_in_the_background(folder: str) -> str:
    from megalm.checkpoint.background import BackgroundSaver
    from tests.support.training import TinyRun, tiny_config

    config = tiny_config(pp=2)
    run = TinyRun(config)
    own = of_own_disk(folder, run.topology.world)
    saver = BackgroundSaver(run.topology)

    def save() -> None:
        saver.start(run.engine.raw, own, {"step": 3, "consumed_samples": 12}, config=config)
        saver.finish()

    return ending(save)


def test_a_save_in_the_background_to_disks_of_the_hosts_own_says_what_is_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for said in run_ranks(save_in_the_background, 2, str(folder), timeout=90.0):
        assert "lacks records_00001.json" in said
        assert "--save must name a folder that all hosts share" in said
    assert list(folder.iterdir()) == []


def test_what_one_host_does_not_see_is_not_published_and_what_it_cannot_read_is_loaded_by_none(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (first, loaded), (second, also_loaded) = run_ranks(save_then_load, 2, str(folder), timeout=90.0)
    for saved in (first, second):
        assert "CheckpointError: saving" in saved
        assert "failed on 1 of 2 ranks" in saved
        assert "lacks layer_04" in saved
        assert "--save must name a folder that all hosts share" in saved
    assert list(folder.iterdir()) == []
    assert loaded == also_loaded
    assert "elsewhere" in loaded
