from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.checkpoint.export import export_checkpoint
from megalm.checkpoint.proof import prove_export
from megalm.checkpoint.proof_by_layer import fits_in_memory, prove_by_layer
from megalm.errors import CheckpointError
from tests.support.checkpoints import bloom_config, gptmeg_config, write_checkpoint

pytest.importorskip("transformers")
TOKENS = torch.randint(0, 48, (2, 24), generator=torch.Generator().manual_seed(3))


def prove_whole(folder: Path, checkpoint: Path, dtype: torch.dtype) -> Any:
    return prove_export(folder, checkpoint, tokens=TOKENS, num_new=4, vocab_size=48, dtype=dtype)


def prove_layers(folder: Path, checkpoint: Path, dtype: torch.dtype) -> Any:
    return prove_by_layer(folder, checkpoint, tokens=TOKENS, dtype=dtype)


@pytest.mark.parametrize("prove", [prove_whole, prove_layers])
@pytest.mark.parametrize("config", [bloom_config(), gptmeg_config()], ids=["bloom", "gptmeg"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_true_export_is_proved_in_either_way(tmp_path: Path, prove: Any, config: Any, dtype: str) -> None:
    write_checkpoint(tmp_path / "c", config, tp_size=2)
    export = export_checkpoint(tmp_path / "c", tmp_path / "hf", dtype=dtype)
    proof = prove(tmp_path / "hf", tmp_path / "c", export.dtype)
    assert 0.0 <= proof.largest_difference < 1e-5
    assert "48 tokens" in str(proof)


def test_logits_that_are_not_finite_prove_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    from megalm.checkpoint import proof

    write_checkpoint(tmp_path / "c", bloom_config())
    export_checkpoint(tmp_path / "c", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    state = load_file(file)
    state["transformer.ln_f.weight"][0] = float("nan")
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="differ from the trainer's by nan"):
        prove_whole(tmp_path / "hf", tmp_path / "c", torch.float32)

    def diverged(*arguments: Any, **options: Any) -> Any:
        model = load_model(*arguments, **options)
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
        return model

    load_model = proof.load_model
    monkeypatch.setattr(proof, "load_model", diverged)
    with pytest.raises(CheckpointError, match="own logits are not finite with its weights in float32"):
        prove_whole(tmp_path / "hf", tmp_path / "c", torch.float32)


@pytest.mark.parametrize("prove", [prove_whole, prove_layers])
@pytest.mark.parametrize(
    "name",
    [
        "word_embeddings.weight",
        "word_embeddings_layernorm.bias",
        "h.1.input_layernorm.weight",
        "h.0.self_attention.query_key_value.weight",
        "h.1.mlp.dense_4h_to_h.bias",
        "ln_f.weight",
    ],
)
def test_one_wrong_weight_is_found_in_either_way(tmp_path: Path, prove: Any, name: str) -> None:
    from safetensors.torch import load_file, save_file

    write_checkpoint(tmp_path / "c", bloom_config())
    export_checkpoint(tmp_path / "c", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    state = load_file(file)
    tensor = state[f"transformer.{name}"]
    row = int(TOKENS[0, 0]) if name == "word_embeddings.weight" else 0
    tensor[row] += 0.01
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="differs? from the trainer's"):
        prove(tmp_path / "hf", tmp_path / "c", torch.float32)


def test_a_model_that_does_not_fit_twice_is_proved_by_layer() -> None:
    assert fits_in_memory(1_000_000, available_bytes=2**30)
    assert not fits_in_memory(176_247_271_424, available_bytes=2**40)
    assert fits_in_memory(1)
