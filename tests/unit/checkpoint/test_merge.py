from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalm.checkpoint import layout
from megalm.checkpoint.merge import LayerFiles
from megalm.checkpoint.source import open_checkpoint
from megalm.checkpoint.tensor_files import read_tensors
from megalm.errors import CheckpointError
from megalm.models.gpt.weights import FIRST_BLOCK_LAYER
from tests.support.checkpoints import bloom_config, gptmeg_config, write_checkpoint


def layers_of(folder: Path) -> LayerFiles:
    return open_checkpoint(folder).layers


@pytest.mark.parametrize("config", [bloom_config(), gptmeg_config()], ids=["bloom", "gptmeg"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_shards_of_any_tensor_parallel_size_merge_into_the_weights(
    tmp_path: Path, config: object, tp_size: int
) -> None:
    weights = write_checkpoint(tmp_path / "c", config, tp_size=tp_size)  # type: ignore[arg-type]
    layers = layers_of(tmp_path / "c")
    merged = list(layers.iterate())
    assert [weight for weight, _ in merged] == [weight for weight, _ in weights]
    for (weight, expected), (_, actual) in zip(weights, merged, strict=True):
        assert torch.equal(expected, actual), weight.name
    assert layers.drift == {}


def test_drifted_replicas_are_averaged_and_reported(tmp_path: Path) -> None:
    weights = {weight.name: tensor for weight, tensor in write_checkpoint(tmp_path / "c", bloom_config(), tp_size=2)}
    file = tmp_path / "c" / layout.layer_file(FIRST_BLOCK_LAYER + 1, 1)
    state = read_tensors(file)
    state["input_layernorm.weight"] += 0.5
    torch.save(state, file)
    layers = layers_of(tmp_path / "c")
    merged = {weight.name: tensor for weight, tensor in layers.iterate()}
    name = "h.1.input_layernorm.weight"
    torch.testing.assert_close(merged[name], weights[name] + 0.25)
    assert layers.drift == {name: pytest.approx(0.25)}


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", bloom_config(), tp_size=2)
    (tmp_path / "c" / layout.layer_file(FIRST_BLOCK_LAYER, 1)).unlink()
    with pytest.raises(CheckpointError, match="layer 3 has shards"):
        layers_of(tmp_path / "c")


def test_a_shard_of_another_model_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", bloom_config())
    write_checkpoint(tmp_path / "other", bloom_config(num_heads=2))
    name = layout.layer_file(FIRST_BLOCK_LAYER, 0)
    (tmp_path / "c" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(CheckpointError, match="shape"):
        list(layers_of(tmp_path / "c").iterate())
