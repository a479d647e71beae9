from __future__ import annotations

import importlib.util
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.checkpoint import layout
from megalm.checkpoint.bigscience import is_bigscience
from megalm.checkpoint.find import find_checkpoint
from megalm.checkpoint.inert import InertObject, read_with_stand_ins
from megalm.checkpoint.source import open_checkpoint
from megalm.checkpoint.tensor_files import read_tensors
from megalm.errors import CheckpointError
from tests.support.bigscience import STEP, write_bigscience
from tests.support.checkpoints import bloom_config, gptmeg_config, write_checkpoint

CONFIGS = {"bloom": bloom_config(), "gptmeg": gptmeg_config()}


@pytest.mark.parametrize("version", [0, 1.0, 3.0])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_weights_and_moments_come_out_whole_without_megatron(
    tmp_path: Path, family: str, version: float, zipped: bool
) -> None:
    truth = write_bigscience(tmp_path / "global_step7", CONFIGS[family], version=version, zipped=zipped)
    assert importlib.util.find_spec("megatron") is None
    said: list[str] = []
    source = open_checkpoint(find_checkpoint(tmp_path, warn=said.append))
    assert "cannot be verified" in said[0]
    for weight, tensor in source.layers.iterate():
        assert torch.equal(tensor, truth[weight.name]["fp32"].bfloat16()), weight.name
        files = source.optimizer()
        for key, expected in truth[weight.name].items():
            assert torch.equal(files.whole(weight, key), expected), (weight.name, key)
        assert files.state(weight, 0).step == STEP
    assert source.layers.drift == {}
    assert source.train_state == {
        "step": STEP,
        "consumed_samples": 28,
        "consumed_tokens": 28 * 32,
        "skipped_steps": 0,
    }
    assert source.manifest.model["pad_vocab_size_to"] == 48
    assert "megatron" not in sys.modules


def test_an_export_of_it_is_the_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from megalm.checkpoint.export import export_checkpoint

    truth = write_bigscience(tmp_path / "run" / "global_step7", bloom_config(), version=1.0)
    export_checkpoint(find_checkpoint(tmp_path / "run", warn=str), tmp_path / "hf")
    state = transformers.BloomForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    for name, values in truth.items():
        assert torch.equal(state[f"transformer.{name}"], values["fp32"].bfloat16()), name


def test_arguments_are_inert(tmp_path: Path) -> None:
    write_bigscience(tmp_path / "global_step7", bloom_config())
    state = read_with_stand_ins(tmp_path / "global_step7" / layout.model_file(0))
    assert isinstance(state["args"], InertObject)
    assert state["args"].num_layers == 2
    assert state["args"].position_embedding_type.arguments == (3,)
    assert type(state["args"]).__name__ == "Namespace"


class Call:
    """Pickles into a call of anything."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.given = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.given


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [os.mkdir, os.system, eval, exec, getattr, open, Path.touch, pickle.loads])
def test_a_call_in_a_foreign_file_is_refused_or_inert(tmp_path: Path, function: Any, zipped: bool) -> None:
    canary = tmp_path / "canary"
    arguments: dict[Any, tuple[Any, ...]] = {
        os.mkdir: (str(canary),),
        os.system: (f"touch {canary}",),
        eval: (f"__import__('os').mkdir({str(canary)!r})",),
        exec: (f"__import__('os').mkdir({str(canary)!r})",),
        getattr: (1, "real"),
        open: (str(canary), "w"),
        Path.touch: (canary,),
        pickle.loads: (pickle.dumps(Call(os.mkdir, str(canary))),),
    }
    file = tmp_path / "file.pt"
    state = {"weight": torch.ones(3), "extra": Call(function, *arguments[function])}
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    for read in (read_tensors, read_with_stand_ins):
        try:
            loaded = read(file)
        except CheckpointError:
            continue
        assert isinstance(loaded["extra"], InertObject)
    assert not canary.exists()


def test_a_checkpoint_of_megalm_without_its_manifest_is_not_taken_for_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "global_step3", bloom_config())
    torch.save({}, tmp_path / "global_step3" / layout.model_file(0))
    (tmp_path / "global_step3" / layout.MANIFEST).unlink()
    assert not is_bigscience(tmp_path / "global_step3")
    with pytest.raises(CheckpointError, match="never published whole"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_layers": 10**9}, "num_layers"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"glu_activation": "geglu"}, "glu_activation"),
        ({"position_embedding_type": 1}, "neither absolute nor ALiBi"),
    ],
)
def test_arguments_that_cannot_be_built_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], words: str
) -> None:
    import argparse

    from tests.support import bigscience

    original = bigscience.engine_state

    def changed(*arguments: Any) -> dict[str, Any]:
        state = original(*arguments)
        state["args"] = argparse.Namespace(**{**vars(state["args"]), **change})
        return state

    monkeypatch.setattr(bigscience, "engine_state", changed)
    write_bigscience(tmp_path / "global_step7", bloom_config())
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path / "global_step7")
