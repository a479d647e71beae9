from __future__ import annotations

import contextlib
import os
import pickle
import re
from pathlib import Path

import pytest
import torch

from megalm.checkpoint import layout
from megalm.checkpoint.find import find_checkpoint
from megalm.checkpoint.reshape import reshape_checkpoint
from megalm.checkpoint.source import open_checkpoint
from megalm.checkpoint.universal import is_universal, pipeline_name, universal_info
from megalm.checkpoint.universal_writer import write_universal
from megalm.errors import CheckpointError
from megalm.models.gpt.shape import gpt_shape
from megalm.models.gpt.weights import weight_table
from tests.support.bigscience import write_bigscience
from tests.support.checkpoints import bloom_config, gptmeg_config, write_checkpoint
from tools import convert_checkpoint, inspect_checkpoint, verify_checkpoint

CONFIGS = {"bloom": bloom_config(), "gptmeg": gptmeg_config()}


@pytest.fixture
def universal(tmp_path: Path) -> Path:
    write_bigscience(tmp_path / "run" / "global_step7", bloom_config())
    return write_universal(find_checkpoint(tmp_path / "run", warn=str), tmp_path / "universal")


@pytest.mark.parametrize("family", CONFIGS)
def test_masters_and_moments_of_a_bigscience_checkpoint_come_through_and_back(tmp_path: Path, family: str) -> None:
    truth = write_bigscience(tmp_path / "run" / "global_step7", CONFIGS[family], version=1.0)
    folder = write_universal(find_checkpoint(tmp_path / "run", warn=str), tmp_path / "universal", num_threads=3)
    back = reshape_checkpoint(folder, tmp_path / "back", tp_size=4, pp_size=2)
    for path in (folder, back):
        source = open_checkpoint(find_checkpoint(path.parent, warn=str))
        files = source.optimizer()
        for weight in weight_table(source.shape):
            for key, expected in truth[weight.name].items():
                assert torch.equal(files.whole(weight, key), expected), (path, weight.name, key)
            assert files.state(weight, 0).step == 7
        assert source.train_state["consumed_samples"] == 28


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_alone_come_through(tmp_path: Path, family: str) -> None:
    weights = write_checkpoint(tmp_path / "run" / "global_step3", CONFIGS[family], tp_size=2)
    source = open_checkpoint(write_universal(tmp_path / "run" / "global_step3", tmp_path / "universal"))
    assert not source.optimizer().exists
    for (weight, tensor), (_, expected) in zip(source.layers.iterate(), weights, strict=True):
        assert torch.equal(tensor, expected), weight.name


def test_the_patterns_name_every_parameter_that_is_not_cut_along_its_rows() -> None:
    shape = gpt_shape(bloom_config(num_layers=12).model)
    info = universal_info(shape, pipelined=True)
    assert info["universal_checkpoint_version"] == 0.4
    for weight in weight_table(shape):
        matched = [
            kind.removesuffix("_patterns")
            for kind, patterns in info.items()
            if kind.endswith("_patterns")
            for pattern in patterns
            if re.match(pattern, pipeline_name(weight, shape))
        ]
        expected = {None: ["tp_replicated_parameter"], 1: ["parameter_with_row_parallelism"], 0: []}
        if weight.name == "word_embeddings.weight":
            assert sorted(matched) == ["pipeline_replicated_parameter", "vocabulary_parameter"]
        else:
            assert matched == expected[weight.partition_dim], weight.name


def test_a_flipped_bit_and_a_link_are_found(universal: Path) -> None:
    file = universal / layout.universal_file("3.self_attention.dense.weight", "exp_avg")
    intact = file.read_bytes()
    file.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="sha256 differs"):
        find_checkpoint(universal.parent, warn=str)
    file.write_bytes(intact)
    assert find_checkpoint(universal.parent, warn=str) == universal
    file.parent.rename(universal.parent / "elsewhere")
    file.parent.symlink_to(universal.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link"):
        find_checkpoint(universal.parent, warn=str)


def test_the_universal_one_is_taken_when_asked_for_or_alone(universal: Path) -> None:
    root = universal.parent
    write_checkpoint(root / "global_step9", bloom_config(), step=9)
    (root / layout.LATEST).write_text("global_step9")
    assert find_checkpoint(root, warn=str).name == "global_step9"
    assert find_checkpoint(root, universal=True, warn=str) == universal
    (root / layout.LATEST).unlink()
    assert find_checkpoint(root, warn=str) == universal
    with pytest.raises(CheckpointError, match="is no universal checkpoint"):
        find_checkpoint(root / "global_step9", universal=True)


@pytest.mark.parametrize("name", ["../elsewhere", "/", "", "global_step8"])
def test_a_latest_universal_that_leads_elsewhere_is_not_followed(universal: Path, name: str) -> None:
    (universal.parent / layout.LATEST_UNIVERSAL).write_text(name)
    said: list[str] = []
    assert find_checkpoint(universal.parent, warn=said.append) == universal
    assert "latest_universal" in said[0]


def test_a_missing_parameter_is_named(universal: Path) -> None:
    (universal / layout.MANIFEST).unlink()  # as DeepSpeed's own have none
    (universal / layout.universal_file("4.mlp.dense_4h_to_h.bias", "fp32")).unlink()
    with pytest.raises(CheckpointError, match=r"4\.mlp\.dense_4h_to_h\.bias/fp32\.pt is missing"):
        list(open_checkpoint(universal).layers.iterate())


def test_a_description_that_no_model_has_is_refused(universal: Path) -> None:
    (universal / layout.MANIFEST).unlink()
    path = universal / layout.model_file(0)
    state = torch.load(path)
    for model in ({"num_layers": 10**9}, {"no": "field"}, 7):
        torch.save({**state, "megalm": {**state["megalm"], "model": model}}, path)
        with pytest.raises(CheckpointError):
            open_checkpoint(universal)
    torch.save({"module": None}, path)
    with pytest.raises(CheckpointError, match="neither of which model"):
        open_checkpoint(universal)


def test_the_tool_converts_both_ways(tmp_path: Path, universal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, back, again = tmp_path / "run", tmp_path / "back", tmp_path / "again"
    tool = convert_checkpoint.main
    assert tool(["--load", str(run), "--save", str(again), "--to-universal"]) == 0
    assert is_universal(again / "global_step7")
    assert tool(["--load", str(again), "--save", str(back), "--tensor-model-parallel-size", "2"]) == 0
    assert (back / "global_step7" / layout.layer_file(1, 1)).is_file()
    for wrong in (["--to-universal", "--tensor-model-parallel-size", "2"], []):
        assert tool(["--load", str(run), "--save", str(tmp_path / "no"), *wrong]) == CheckpointError.exit_code
    assert "--to-universal" in capsys.readouterr().err


def test_its_weights_are_those_of_the_run_and_tools_read_it(
    tmp_path: Path, universal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a bf16 run: weights are the rounded masters, as in its layer files."""
    run = str(tmp_path / "run")
    assert inspect_checkpoint.main(["--load", str(universal), "--diff", run]) == 0
    assert "every tensor is bit-equal" in capsys.readouterr().out
    (universal / layout.MANIFEST).unlink()  # as DeepSpeed's own have none
    for folder in (universal, universal.parent, tmp_path / "run" / "global_step7"):
        assert verify_checkpoint.main(["--load", str(folder)]) == 0
        assert "has no hashes" in capsys.readouterr().out
    path = universal / layout.universal_file("3.mlp.dense_4h_to_h.bias", "exp_avg")
    state = torch.load(path)
    state["param"][0] = float("nan")
    torch.save(state, path)
    assert verify_checkpoint.main(["--load", str(universal)]) == CheckpointError.exit_code
    assert "holds NaN" in capsys.readouterr().out


class Call:
    """Pickles into a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "name",
    [
        layout.model_file(0),
        "zero/optimizer_state.pt",
        "zero/3.mlp.dense_4h_to_h.bias/fp32.pt",
        "zero/3.mlp.dense_4h_to_h.bias/exp_avg.pt",
        "zero/3.mlp.dense_4h_to_h.bias/step.pt",
    ],
)
@pytest.mark.parametrize("bare", [True, False])
def test_a_call_in_any_of_its_files_is_never_made(tmp_path: Path, universal: Path, name: str, bare: bool) -> None:
    (universal / layout.MANIFEST).unlink()
    canary = tmp_path / "canary"
    if bare:
        (universal / name).write_bytes(pickle.dumps(Call(canary)))
    else:
        stored = torch.load(universal / name, weights_only=False)
        torch.save({**stored, "more": Call(canary)} if isinstance(stored, dict) else Call(canary), universal / name)

    def read_all() -> None:
        source = open_checkpoint(universal)
        files = source.optimizer()
        files.loss_scaler()
        files.parameter_groups()
        for weight, _ in source.layers.iterate():
            files.state(weight, 0)

    with contextlib.suppress(CheckpointError):
        read_all()
    assert not canary.exists()
