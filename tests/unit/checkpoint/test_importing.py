from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megalm.checkpoint.export import export_checkpoint
from megalm.checkpoint.find import find_checkpoint
from megalm.checkpoint.importing import import_folder
from megalm.checkpoint.standalone import load_model
from megalm.config.model import ModelConfig
from megalm.errors import CheckpointError
from tests.support.token_files import write_by_description

transformers = pytest.importorskip("transformers")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def bloom(num_heads: int = 4, vocab_size: int = 48, *, seed: int = 0, **fields: Any) -> Any:
    config = transformers.BloomConfig(
        hidden_size=8 * num_heads, n_layer=2, n_head=num_heads, vocab_size=vocab_size, **fields
    )
    return randomised(transformers.BloomForCausalLM(config), seed)


def gpt2(num_heads: int = 4, vocab_size: int = 48, *, seed: int = 0, **fields: Any) -> Any:
    config = transformers.GPT2Config(
        n_embd=8 * num_heads, n_layer=2, n_head=num_heads, n_positions=32, vocab_size=vocab_size, **fields
    )
    return randomised(transformers.GPT2LMHeadModel(config), seed)


def randomised(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


@pytest.mark.parametrize("make", [bloom, gpt2])
@pytest.mark.parametrize("num_heads, vocab_size, tp_size", [(4, 48, 2), (6, 50, 1), (12, 100, 4), (16, 37, 1)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_export_of_import_is_the_model_tensor_for_tensor(
    tmp_path: Path, make: Any, num_heads: int, vocab_size: int, tp_size: int, dtype: str
) -> None:
    original = make(num_heads, vocab_size).to(DTYPES[dtype])
    original.save_pretrained(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "run", tp_size=tp_size, pp_size=2)
    export_checkpoint(find_checkpoint(tmp_path / "run"), tmp_path / "back")
    back = type(original).from_pretrained(tmp_path / "back", dtype="auto")
    expected, actual = original.state_dict(), back.state_dict()
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == actual[name].dtype
        assert torch.equal(tensor, actual[name]), name


@pytest.mark.parametrize("make", [bloom, gpt2])
@torch.no_grad()
def test_loss_of_an_import_is_that_of_transformers(tmp_path: Path, make: Any) -> None:
    original = make(6, 50)
    original.save_pretrained(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "run")
    own = load_model(find_checkpoint(tmp_path / "run"))
    tokens = torch.randint(0, 50, (4, 17), generator=torch.Generator().manual_seed(1))
    theirs = original(tokens, labels=tokens).loss
    # The mean of 64 fp32 losses of size 1 to 10, summed in another order.
    torch.testing.assert_close(own(tokens[:, :-1], labels=tokens[:, 1:]), theirs, rtol=1e-6, atol=0)


def test_an_untied_gpt2_keeps_its_head(tmp_path: Path) -> None:
    original = gpt2(tie_word_embeddings=False, activation_function="gelu", n_inner=40)
    original.save_pretrained(tmp_path / "hf")
    assert not import_folder(tmp_path / "hf", tmp_path / "run").model.tie_embeddings
    export_checkpoint(find_checkpoint(tmp_path / "run"), tmp_path / "back")
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back")
    assert torch.equal(back.lm_head.weight, original.lm_head.weight)


def test_shards_and_a_headless_model_are_read(tmp_path: Path) -> None:
    original = bloom()
    original.transformer.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    import_folder(tmp_path / "hf", tmp_path / "run")
    own = dict(load_model(find_checkpoint(tmp_path / "run")).named_parameters())
    assert torch.equal(own["h.1.mlp.dense_h_to_4h.weight"], original.transformer.h[1].mlp.dense_h_to_4h.weight)


def test_bin_files_are_read_as_weights_alone(tmp_path: Path) -> None:
    original = bloom()
    folder = tmp_path / "hf"
    original.config.save_pretrained(folder)
    torch.save(original.state_dict(), folder / "pytorch_model.bin")
    import_folder(folder, tmp_path / "run")
    assert find_checkpoint(tmp_path / "run").name == "global_step0"


def test_the_preset_describes_the_model(tmp_path: Path) -> None:
    from megalm.config.parse import parse_command_line

    gpt2(6, 50).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    result = import_folder(tmp_path / "hf", tmp_path / "run", dtype="bf16")
    config = parse_command_line(
        ["--config", str(result.preset), "--micro-batch-size", "1", "--lr", "1e-3", "--train-iters", "1"]
        + ["--data-path", "x"]
    )
    assert isinstance(config.model, ModelConfig)
    assert (config.model.num_heads, config.model.padded_vocab_size, config.data.seq_length) == (6, 50, 32)
    assert config.data.tokenizer_path == str(tmp_path / "run" / "tokenizer")


@pytest.mark.parametrize(
    "make, renamed",
    [
        (bloom, {"n_head": "num_attention_heads", "hidden_size": "n_embed"}),
        (bloom, {"n_layer": "num_hidden_layers"}),
        (
            gpt2,
            {
                "n_head": "num_attention_heads",
                "n_layer": "num_hidden_layers",
                "n_embd": "hidden_size",
                "n_positions": "max_position_embeddings",
            },
        ),
    ],
)
def test_names_that_transformers_takes_for_a_key_are_taken(tmp_path: Path, make: Any, renamed: dict[str, str]) -> None:
    folder = tmp_path / "hf"
    original = make()
    original.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    for key, other in renamed.items():
        content[other] = content.pop(key)
    (folder / "config.json").write_text(json.dumps(content))
    expected = transformers.AutoConfig.from_pretrained(folder)
    model = import_folder(folder, tmp_path / "run").model
    assert (model.num_layers, model.num_heads, model.hidden_size) == (expected.n_layer, expected.n_head, 32)
    assert model.num_heads == original.config.n_head


def test_the_other_name_wins_where_both_are_there_as_in_transformers(tmp_path: Path) -> None:
    bloom().save_pretrained(tmp_path / "hf")
    change_config(tmp_path / "hf", num_attention_heads=2, n_embed=None)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "hf").n_head == 2
    assert import_folder(tmp_path / "hf", tmp_path / "run").model.num_heads == 2


@pytest.mark.parametrize("family, cls", [("bloom", "BloomConfig"), ("gpt2", "GPT2Config")])
def test_a_key_that_is_not_there_has_transformers_default(tmp_path: Path, family: str, cls: str) -> None:
    from megalm.checkpoint.foreign import _DEFAULTS, read_foreign_config

    expected = getattr(transformers, cls)()
    assert {key: getattr(expected, key) for key in _DEFAULTS[family]} == _DEFAULTS[family]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    model = read_foreign_config(tmp_path).model
    assert (model.num_layers, model.vocab_size) == (expected.num_hidden_layers, expected.vocab_size)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_single_file_is_read_before_an_index_as_by_transformers(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "hf"
    older, newer = bloom(seed=1), bloom(seed=2)
    if kind == "safetensors":
        older.save_pretrained(folder, max_shard_size="20KB")
        newer.save_pretrained(tmp_path / "newer")
        (tmp_path / "newer" / "model.safetensors").rename(folder / "model.safetensors")
    else:
        older.config.save_pretrained(folder)
        torch.save(older.state_dict(), folder / "pytorch_model-00001-of-00001.bin")
        weight_map = dict.fromkeys(older.state_dict(), "pytorch_model-00001-of-00001.bin")
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        torch.save(newer.state_dict(), folder / "pytorch_model.bin")
    import_folder(folder, tmp_path / "run")
    own = dict(load_model(find_checkpoint(tmp_path / "run")).named_parameters())
    theirs = transformers.BloomForCausalLM.from_pretrained(folder)
    for model in (theirs, newer):
        assert torch.equal(own["h.1.mlp.dense_h_to_4h.weight"], model.transformer.h[1].mlp.dense_h_to_4h.weight)


@pytest.mark.parametrize(
    "value, dtype, words",
    [
        (float("nan"), None, "h.0.mlp.dense_h_to_4h.weight holds NaN or infinity in fp32"),
        (float("-inf"), "bf16", "h.0.mlp.dense_h_to_4h.weight holds NaN or infinity in bf16"),
        (1e6, "fp16", "h.0.mlp.dense_h_to_4h.weight holds values up to 1e.06, which are infinity in fp16"),
    ],
)
def test_weights_that_are_no_numbers_are_not_published(
    tmp_path: Path, value: float, dtype: str | None, words: str
) -> None:
    original = bloom()
    with torch.no_grad():
        original.transformer.h[0].mlp.dense_h_to_4h.weight[0, 0] = value
    original.save_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=words):
        import_folder(tmp_path / "hf", tmp_path / "run", dtype=dtype)
    assert not list(tmp_path.glob("run/*"))


class Canary:
    """Pickles into a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def exported_config(folder: Path) -> Any:
    """config.json of the export of an import of a folder, as transformers reads it."""
    import_folder(folder, folder.parent / "run")
    export_checkpoint(find_checkpoint(folder.parent / "run"), folder.parent / "back")
    return transformers.AutoConfig.from_pretrained(folder.parent / "back")


@pytest.mark.parametrize("ids", [(5, 6, 7), (None, None, None), (5, [6, 7], None)])
@pytest.mark.parametrize(
    "make, dropouts",
    [
        (bloom, {"hidden_dropout": 0.1, "attention_dropout": 0.2}),
        (gpt2, {"resid_pdrop": 0.1, "attn_pdrop": 0.2, "embd_pdrop": 0.3}),
    ],
)
def test_special_ids_and_dropouts_come_back(
    tmp_path: Path, make: Any, dropouts: dict[str, float], ids: tuple[Any, Any, Any]
) -> None:
    named = dict(zip(("bos_token_id", "eos_token_id", "pad_token_id"), ids, strict=True))
    make(**dropouts, **named).save_pretrained(tmp_path / "hf")
    back = exported_config(tmp_path / "hf")
    expected = {**dropouts, **named}
    assert {name: getattr(back, name) for name in expected} == expected
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "back")
    assert {name: getattr(generation, name) for name in named} == named
    preset = (tmp_path / "run" / "model.yaml").read_text()
    assert "hidden_dropout: 0.1" in preset
    assert "attention_dropout: 0.2" in preset


def test_an_id_without_a_row_of_embedding_is_not_known(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"  # Some versions of transformers would refuse to write this.
    content = json.loads(file.read_text()) | {"bos_token_id": 50256, "eos_token_id": [1, 48], "pad_token_id": -1}
    file.write_text(json.dumps(content))
    back = exported_config(tmp_path / "hf")
    assert (back.bos_token_id, back.eos_token_id, back.pad_token_id) == (None, None, None)


def test_ids_that_nothing_names_are_transformers_default_where_there_is_a_row_for_it(tmp_path: Path) -> None:
    for make, eos in ((bloom, 2), (gpt2, None)):
        folder = tmp_path / make.__name__ / "hf"
        make().save_pretrained(folder)
        content = json.loads((folder / "config.json").read_text())
        for kind in ("bos", "eos", "pad"):
            content.pop(f"{kind}_token_id", None)
        (folder / "config.json").write_text(json.dumps(content))
        assert exported_config(folder).eos_token_id == eos


def test_a_converted_import_keeps_its_ids(tmp_path: Path) -> None:
    from megalm.checkpoint.reshape import reshape_checkpoint

    gpt2(bos_token_id=5, eos_token_id=6, pad_token_id=7).save_pretrained(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "run")
    reshape_checkpoint(find_checkpoint(tmp_path / "run"), tmp_path / "reshaped", tp_size=2, pp_size=1)
    export_checkpoint(find_checkpoint(tmp_path / "reshaped"), tmp_path / "back")
    back = transformers.AutoConfig.from_pretrained(tmp_path / "back")
    assert (back.bos_token_id, back.eos_token_id, back.pad_token_id) == (5, 6, 7)


def dry_run(preset: Path, *arguments: str) -> str:
    """What pretrain_gpt.py says of a preset without training."""
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, str(root / "pretrain_gpt.py"), "--config", str(preset), "--dry-run", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_preset_names_vocab_and_merges_where_there_is_no_tokenizer_json(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    gpt2(vocab_size=257).save_pretrained(tmp_path / "hf")
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (tmp_path / "hf" / "merges.txt").write_text("#version: 0.2\n")
    preset = import_folder(tmp_path / "hf", tmp_path / "run").preset
    data = yaml.safe_load(preset.read_text())["data"]
    folder = tmp_path / "run" / "tokenizer"
    assert data["tokenizer_type"] == "GPT2BPETokenizer"
    assert (data["vocab_file"], data["merge_file"]) == (str(folder / "vocab.json"), str(folder / "merges.txt"))
    run = ["--micro-batch-size", "1", "--lr", "1e-3", "--train-iters", "1", "--data-path", str(tmp_path / "corpus")]
    write_by_description(tmp_path / "corpus", [[[1, 2, 3] * 40]])
    assert "257" in dry_run(preset, *run)


def test_a_preset_names_the_sentencepiece_model(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    from megalm.tokenizers.train import train_sentencepiece

    texts = ["the quick brown fox jumps over the lazy dog"] * 20
    bloom(vocab_size=300).save_pretrained(tmp_path / "hf")
    train_sentencepiece(texts, tmp_path / "hf" / "tokenizer", vocab_size=300, model_type="bpe")
    preset = import_folder(tmp_path / "hf", tmp_path / "run").preset
    data = yaml.safe_load(preset.read_text())["data"]
    model = str(tmp_path / "run" / "tokenizer" / "tokenizer.model")
    assert data == {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_path": model}


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"auto_map": {"AutoModel": "modeling.Evil"}}, "auto_map"),
        ({"model_type": "llama"}, "must be bloom or gpt2"),
        ({"n_layer": 10**9}, "num_layers = 1000000000"),
        ({"n_layer": -1}, "num_layers"),
        ({"n_layer": "2"}, "num_layers"),
        ({"n_layer": True}, "num_layers"),
        ({"hidden_size": 2**40}, "hidden_size"),
        ({"hidden_size": 64}, "of shape"),
        ({"hidden_size": 30}, "must divide"),
        ({"vocab_size": 10**12}, "padded_vocab_size"),
        ({"vocab_size": 47}, "of shape"),
        ({"n_layer": 3}, "missing: h.2"),
        ({"n_layer": 1}, "not known: h.1"),
        ({"n_head": 0}, "num_heads"),
        ({"layer_norm_epsilon": float("nan")}, "small positive"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual"),
        ({"slow_but_exact": True, "pretraining_tp": 2}, "leave out the biases of two products"),
        ({"hidden_dropout": 1.5}, "dropout 1.5 must be at least 0 and less than 1"),
        ({"eos_token_id": "2"}, "eos_token_id = '2' must be a whole number"),
    ],
)
def test_a_configuration_that_lies_is_refused_before_anything_is_written(
    tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    bloom().save_pretrained(tmp_path / "hf")
    change_config(tmp_path / "hf", **fields)
    with pytest.raises(CheckpointError, match=words):
        import_folder(tmp_path / "hf", tmp_path / "run")
    assert not (tmp_path / "run" / "latest").exists()
    assert not list(tmp_path.glob("run/global_step*"))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b", "", 7])
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: Any) -> None:
    bloom().config.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(CheckpointError, match="no plain file name"):
        import_folder(tmp_path / "hf", tmp_path / "run")


def test_a_pickle_that_calls_is_refused_and_not_called(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    bloom().config.save_pretrained(folder)
    state = {**bloom().state_dict(), "transformer.ln_f.bias": Canary(tmp_path / "canary")}
    for write in (lambda path: torch.save(state, path), lambda path: path.write_bytes(pickle.dumps(state))):
        write(folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError):
            import_folder(folder, tmp_path / "run")
        assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"",
        lambda raw: (2**62).to_bytes(8, "little") + raw[8:],
        lambda raw: raw[:8] + b"[" + raw[9:],
        lambda raw: raw[:8] + raw[8:].replace(b'"shape":[', b'"shape":[9', 1),
        lambda raw: b"PK\x03\x04" + raw[4:],
    ],
    ids=["half", "empty", "long header", "no object", "shape", "zip"],
)
def test_a_hostile_safetensors_file_is_refused(tmp_path: Path, spoil: Any) -> None:
    bloom().save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(CheckpointError):
        import_folder(tmp_path / "hf", tmp_path / "run")


def test_a_folder_in_use_is_not_touched(tmp_path: Path) -> None:
    bloom().save_pretrained(tmp_path / "hf")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="is not empty"):
        import_folder(tmp_path / "hf", tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious"]


def test_a_tensor_parallel_size_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    bloom(4, 37).save_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"the 37 rows of vocabulary cannot be cut into 2 parts\n.* that fit: 1$"):
        import_folder(tmp_path / "hf", tmp_path / "run", tp_size=2)


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no Hugging Face folder: it has no config.json"):
        import_folder(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("place", ["file", "file/out", "x" * 300])
def test_a_destination_that_cannot_be_written_is_an_answer(tmp_path: Path, place: str) -> None:
    bloom().save_pretrained(tmp_path / "hf")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write |is a file"):
        import_folder(tmp_path / "hf", tmp_path / place)
