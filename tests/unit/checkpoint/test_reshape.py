from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megalm.checkpoint import layout
from megalm.checkpoint.find import find_checkpoint
from megalm.checkpoint.inspection import inspect_checkpoint
from megalm.checkpoint.optimizer_files import MASTER, MOMENTS, OptimizerFiles
from megalm.checkpoint.reshape import reshape_checkpoint
from megalm.checkpoint.roll_backs import KEY as ROLL_BACKS
from megalm.checkpoint.source import open_checkpoint
from megalm.errors import CheckpointError
from megalm.models.gpt.weights import Weight, weight_table
from tests.support.bigscience import STEP, write_bigscience
from tests.support.checkpoints import bloom_config, gptmeg_config, write_checkpoint


@pytest.mark.parametrize("tp_size, pp_size", [(1, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("version", [0, 3.0])
def test_a_reshaped_checkpoint_holds_the_same_weights_and_moments(
    tmp_path: Path, tp_size: int, pp_size: int, version: float
) -> None:
    truth = write_bigscience(tmp_path / "old" / "global_step7", bloom_config(), version=version)
    old = find_checkpoint(tmp_path / "old", warn=str)
    reshape_checkpoint(old, tmp_path / "new", tp_size=tp_size, pp_size=pp_size)
    path = find_checkpoint(tmp_path / "new")
    assert inspect_checkpoint(path).problems == []
    source = open_checkpoint(path)
    assert source.layers.tp_size == tp_size
    assert len(list(path.glob("mp_rank_*"))) == tp_size * pp_size
    files = source.optimizer()
    for weight, tensor in source.layers.iterate():
        assert torch.equal(tensor, truth[weight.name]["fp32"].bfloat16()), weight.name
        for key, expected in truth[weight.name].items():
            assert torch.equal(files.whole(weight, key), expected), (weight.name, key)
        assert files.state(weight, 0).step == STEP
    assert source.train_state["consumed_samples"] == 28


def test_each_state_is_read_once_whatever_the_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model of 176 billion parameters they are 2 TB, which each of 8 tensor ranks would read anew."""
    write_bigscience(tmp_path / "old" / "global_step7", bloom_config())
    whole, read = OptimizerFiles.whole, []

    def counted(files: OptimizerFiles, weight: Weight, key: str) -> torch.Tensor:
        read.append((weight.name, key))
        return whole(files, weight, key)

    monkeypatch.setattr(OptimizerFiles, "whole", counted)
    path = reshape_checkpoint(tmp_path / "old" / "global_step7", tmp_path / "new", tp_size=4, pp_size=2)
    weights = weight_table(open_checkpoint(path).shape)
    assert sorted(read) == sorted((weight.name, key) for weight in weights for key in (MASTER, *MOMENTS))
    assert not list(path.glob("scratch_*"))


def test_weights_alone_are_reshaped_too(tmp_path: Path) -> None:
    weights = write_checkpoint(tmp_path / "run" / "global_step3", gptmeg_config(), tp_size=2)
    path = reshape_checkpoint(tmp_path / "run" / "global_step3", tmp_path / "new", tp_size=4, pp_size=2)
    source = open_checkpoint(path)
    assert not source.optimizer().exists
    for (weight, expected), (_, actual) in zip(weights, source.layers.iterate(), strict=True):
        assert torch.equal(expected, actual), weight.name


def test_what_is_ahead_and_left_out_goes_with_the_copy(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run" / "global_step3", gptmeg_config(), tp_size=2)
    behind, ahead = ({"first": first, "last": first + 4, "spike": first + 2} for first in (2, 9))
    (tmp_path / "run" / layout.ROLL_BACKS).write_text(json.dumps([behind, ahead]), encoding="utf-8")
    path = reshape_checkpoint(tmp_path / "run" / "global_step3", tmp_path / "new", tp_size=1, pp_size=1)
    assert open_checkpoint(path).train_state[ROLL_BACKS] == [ahead]
    again = reshape_checkpoint(path, tmp_path / "newer", tp_size=2, pp_size=1)
    assert open_checkpoint(again).train_state[ROLL_BACKS] == [ahead]


@pytest.mark.parametrize(
    "tp_size, pp_size, words",
    [
        (3, 1, "cannot be cut into 3"),
        (8, 1, "4 attention heads cannot be cut into 8 parts"),
        (1, 3, "3 pipeline stages do not fit 2 layers\n  sizes that fit: 1 to 2"),
        (2, 0, "parallel sizes must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_and_leave_nothing(
    tmp_path: Path, tp_size: int, pp_size: int, words: str
) -> None:
    write_checkpoint(tmp_path / "run" / "global_step3", bloom_config())
    with pytest.raises(CheckpointError, match=words):
        reshape_checkpoint(tmp_path / "run" / "global_step3", tmp_path / "new", tp_size=tp_size, pp_size=pp_size)
    assert not list(tmp_path.glob("new/*"))


def test_a_step_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run" / "global_step3", bloom_config())
    with pytest.raises(CheckpointError, match="exists"):
        reshape_checkpoint(tmp_path / "run" / "global_step3", tmp_path / "run", tp_size=2, pp_size=1)
    assert not (tmp_path / "run" / layout.LATEST).exists()


def test_an_earlier_step_leaves_latest_to_a_later_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run" / "global_step3", bloom_config())
    new = tmp_path / "new"
    for named, kept in (("global_step4", True), ("global_step2", False), ("global_step9", False)):
        write_checkpoint(new / "global_step4", bloom_config())
        (new / layout.LATEST).write_text(named)
        reshape_checkpoint(tmp_path / "run" / "global_step3", new, tp_size=2, pp_size=1)
        assert (new / layout.LATEST).read_text() == (named if kept else "global_step3")
        shutil.rmtree(new)


def test_the_sizes_that_are_named_fit_the_vocabulary_too(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", bloom_config(num_heads=32, vocab_size=48))
    with pytest.raises(CheckpointError) as caught:
        reshape_checkpoint(tmp_path / "c", tmp_path / "out", tp_size=32, pp_size=1)
    assert str(caught.value) == (
        "the 48 rows of vocabulary cannot be cut into 32 parts\n  tensor-parallel sizes that fit: 1, 2, 4, 8, 16"
    )


@pytest.mark.parametrize("place", ["file/out", "x" * 300])
def test_a_destination_that_cannot_be_written_is_an_answer(tmp_path: Path, place: str) -> None:
    write_checkpoint(tmp_path / "c", bloom_config())
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write "):
        reshape_checkpoint(tmp_path / "c", tmp_path / place, tp_size=1, pp_size=1)
