from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.checkpoint import durable
from megalm.checkpoint.export import export_checkpoint, parse_size
from megalm.config.root import Config
from megalm.errors import CheckpointError
from megalm.models.gpt.build import plan_gpt
from megalm.models.gpt.model import GPT
from megalm.models.gpt.weights import named_in_model
from megalm.tokenizers.huggingface import HuggingFaceTokenizer
from tests.support.checkpoints import SEQ_LENGTH, bloom_config, config_of, gptmeg_config, write_checkpoint
from tests.support.tokenizer_folder import write_tokenizer

transformers = pytest.importorskip("transformers")


def own_model(config: Config, weights: Any) -> GPT:
    model = GPT(plan_gpt(config.model, seq_length=SEQ_LENGTH)).eval()
    values = {weight.name: tensor for weight, tensor in weights}
    with torch.no_grad():
        for name, parameter in named_in_model(model, model.plan.shape):
            parameter.copy_(values[name])
    return model


def load(cls: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    model, info = cls.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    return model.eval(), info


@pytest.mark.parametrize("num_heads", [4, 6, 12])
def test_bloom_export_computes_the_trainers_logits(tmp_path: Path, num_heads: int) -> None:
    config = bloom_config(num_heads=num_heads)
    weights = write_checkpoint(tmp_path / "c", config, tp_size=2)
    export_checkpoint(tmp_path / "c", tmp_path / "hf")
    model, info = load(transformers.BloomForCausalLM, tmp_path / "hf")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    check_logits_and_greedy(model, own_model(config, weights))


@pytest.mark.parametrize("num_heads", [4, 6])
def test_gptmeg_export_computes_the_trainers_logits_as_gpt2(tmp_path: Path, num_heads: int) -> None:
    config = gptmeg_config(num_heads=num_heads)
    weights = write_checkpoint(tmp_path / "c", config, tp_size=2)
    export_checkpoint(tmp_path / "c", tmp_path / "hf")
    model, info = load(transformers.GPT2LMHeadModel, tmp_path / "hf")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    check_logits_and_greedy(model, own_model(config, weights))


@torch.no_grad()
def check_logits_and_greedy(theirs: Any, ours: GPT) -> None:
    tokens = torch.randint(0, 48, (3, 16), generator=torch.Generator().manual_seed(1))
    # fp32: both sum the same products in another order; logits are of size 1 to 10.
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)
    continued = tokens[:1]
    for _ in range(12):
        continued = torch.cat([continued, ours(continued)[:, -1:].argmax(-1)], dim=1)
    for use_cache in (True, False):
        generated = theirs.generate(tokens[:1], max_new_tokens=12, do_sample=False, use_cache=use_cache)
        assert generated.tolist() == continued.tolist()


@pytest.mark.parametrize(
    "cls, missing",
    [
        ("BloomModel", set()),
        ("BloomForSequenceClassification", {"score.weight"}),
        ("BloomForTokenClassification", {"classifier.weight", "classifier.bias"}),
        ("BloomForQuestionAnswering", {"qa_outputs.weight", "qa_outputs.bias"}),
    ],
)
def test_bloom_export_misses_exactly_the_keys_of_each_head(tmp_path: Path, cls: str, missing: set[str]) -> None:
    write_checkpoint(tmp_path / "c", bloom_config())
    export_checkpoint(tmp_path / "c", tmp_path / "hf")
    _, info = load(getattr(transformers, cls), tmp_path / "hf")
    assert set(info["missing_keys"]) == missing
    assert not info["unexpected_keys"]


def test_shards_are_indexed_and_hold_the_same_weights(tmp_path: Path) -> None:
    config = bloom_config()
    weights = write_checkpoint(tmp_path / "c", config)
    export = export_checkpoint(tmp_path / "c", tmp_path / "hf", max_shard_bytes=20_000)
    shards = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == export.num_bytes == sum(tensor.nbytes for _, tensor in weights)
    model, info = load(transformers.BloomForCausalLM, tmp_path / "hf")
    assert not info["missing_keys"]
    loaded = model.state_dict()
    for weight, tensor in weights:
        assert torch.equal(loaded[f"transformer.{weight.name}"], tensor), weight.name


def test_dtype_is_the_checkpoints_unless_asked_for(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", bloom_config(), dtype=torch.bfloat16)
    export_checkpoint(tmp_path / "c", tmp_path / "same")
    export_checkpoint(tmp_path / "c", tmp_path / "half", dtype="fp16")
    for folder, dtype in (("same", torch.bfloat16), ("half", torch.float16)):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert model.dtype == dtype


@pytest.mark.parametrize(
    "change, words",
    [
        ({"activation": "gelu_erf"}, "--no-bias-gelu-fusion"),
        ({"tie_embeddings": False}, "untied head"),
        ({"glu_activation": "swiglu"}, "swiglu: .*--glu-activation"),
        ({"glu_activation": "geglu", "position_embedding": "learned", "embed_layernorm": False}, "--glu-activation"),
        ({"ffn_hidden_size": 40}, "--ffn-hidden-size"),
        ({"embed_layernorm": False}, "--embed-layernorm"),
        ({"position_embedding": "learned"}, "--position-embedding-type"),
    ],
)
def test_what_bloom_cannot_express_is_refused_by_its_flag(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    from dataclasses import replace

    config = config_of(replace(bloom_config().model, **change))
    write_checkpoint(tmp_path / "c", config)
    with pytest.raises(CheckpointError, match=words):
        export_checkpoint(tmp_path / "c", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_an_untied_erf_gptmeg_with_another_ffn_is_a_gpt2(tmp_path: Path) -> None:
    from dataclasses import replace

    model_config = replace(gptmeg_config().model, tie_embeddings=False, activation="gelu_erf", ffn_hidden_size=40)
    config = config_of(model_config)
    weights = write_checkpoint(tmp_path / "c", config)
    export_checkpoint(tmp_path / "c", tmp_path / "hf")
    model, info = load(transformers.GPT2LMHeadModel, tmp_path / "hf")
    assert not info["missing_keys"]
    check_logits_and_greedy(model, own_model(config, weights))


def test_nothing_is_published_if_the_proof_fails(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", bloom_config())

    def refuse(export: object) -> None:
        raise CheckpointError("logits differ")

    with pytest.raises(CheckpointError, match="logits differ"):
        export_checkpoint(tmp_path / "c", tmp_path / "hf", prove=refuse)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


def test_an_export_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", bloom_config())
    export_checkpoint(tmp_path / "c", tmp_path / "hf")
    (tmp_path / "hf" / "README.md").write_text("of the first")
    with pytest.raises(CheckpointError, match="exists"):
        export_checkpoint(tmp_path / "c", tmp_path / "hf")
    assert (tmp_path / "hf" / "README.md").read_text() == "of the first"
    export_checkpoint(tmp_path / "c", tmp_path / "hf", overwrite=True)
    assert (tmp_path / "hf" / "README.md").read_text() != "of the first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "hf"]


def test_overwriting_removes_nothing_but_an_export(tmp_path: Path) -> None:
    run, checkpoint = tmp_path / "run", tmp_path / "run" / "global_step3"
    write_checkpoint(checkpoint, bloom_config())
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "precious").write_text("x")
    # Exports that someone made around checkpoints: of this one, and of others.
    other = tmp_path / "other"
    write_checkpoint(other / "global_step3", bloom_config())
    for folder in (run, other):
        (folder / "config.json").write_text("{}")
    # An export, to which someone added; and a program's folder, which has a config.json as many do.
    added, project = tmp_path / "added", tmp_path / "project"
    export_checkpoint(checkpoint, added)
    (added / "notes").mkdir()
    project.mkdir()
    (project / "config.json").write_text("{}")
    (project / "thesis.txt").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    for folder in (notes, notes / "precious", run, checkpoint, other, tmp_path, added, project):
        with pytest.raises(CheckpointError, match="removes an earlier export"):
            export_checkpoint(checkpoint, folder, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    export_checkpoint(checkpoint, tmp_path / "empty", overwrite=True)
    assert (tmp_path / "empty" / "config.json").is_file()


def test_folders_beside_an_export_are_nobody_elses(tmp_path: Path) -> None:
    checkpoint = tmp_path / "hf.tmp" / "global_step3"
    write_checkpoint(checkpoint, bloom_config())
    (tmp_path / "hf.removed.tmp").mkdir()
    for _ in range(2):
        export_checkpoint(checkpoint, tmp_path / "hf", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "hf.removed.tmp", "hf.tmp"]
    inside = tmp_path / "hf.unfinished-export.tmp"
    write_checkpoint(inside, bloom_config())
    with pytest.raises(CheckpointError, match="rename it"):
        export_checkpoint(inside, tmp_path / "hf", overwrite=True)
    assert (inside / "manifest.json").is_file()


@pytest.mark.parametrize("call", ["rename", "remove_tree"])
@pytest.mark.parametrize("number", [1, 2])
def test_an_export_that_is_interrupted_leaves_a_whole_one(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "c", bloom_config())
    export_checkpoint(tmp_path / "c", tmp_path / "hf")
    calls = 0
    act = getattr(durable, call)

    def interrupted(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            if call == "remove_tree":
                next(iter(arguments[0].iterdir())).unlink()  # half of it is gone
            raise KeyboardInterrupt
        act(*arguments)

    monkeypatch.setattr(durable, call, interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        export_checkpoint(tmp_path / "c", tmp_path / "hf", overwrite=True)
    monkeypatch.undo()
    manifest = json.loads((tmp_path / "hf" / "manifest.json").read_text())
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "manifest.json", *(entry["name"] for entry in manifest["files"])
    }  # fmt: skip
    export_checkpoint(tmp_path / "c", tmp_path / "hf", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "hf"]


def test_an_export_to_a_link_goes_where_it_leads(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", bloom_config())
    (tmp_path / "disk").mkdir()
    (tmp_path / "hf").symlink_to(tmp_path / "disk" / "hf")
    for _ in range(2):
        export_checkpoint(tmp_path / "c", tmp_path / "hf", overwrite=True)
    assert (tmp_path / "hf").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["hf"]


def test_an_export_takes_the_place_of_the_folder_it_is_made_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "c", bloom_config())
    (tmp_path / "hf").mkdir()
    monkeypatch.chdir(tmp_path / "hf")
    export_checkpoint(tmp_path / "c", Path("."), overwrite=True)
    assert (tmp_path / "hf" / "config.json").is_file()


def test_a_folder_that_cannot_be_written_is_an_answer(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", bloom_config())
    too_long = "x" * 300
    with pytest.raises(CheckpointError, match="cannot write .*File name too long"):
        export_checkpoint(tmp_path / "c", tmp_path / too_long)


def test_every_file_of_an_export_is_in_its_manifest(tmp_path: Path) -> None:
    from megalm.checkpoint.manifest import hash_file

    write_checkpoint(tmp_path / "c", bloom_config())

    def save_tokenizer(folder: Path) -> int:
        (folder / "tokenizer.json").write_text("{}")
        return 7

    export_checkpoint(tmp_path / "c", tmp_path / "hf", save_tokenizer=save_tokenizer)
    manifest = json.loads((tmp_path / "hf" / "manifest.json").read_text())
    listed = {entry["name"]: entry["sha256"] for entry in manifest["files"]}
    assert listed == {
        path.name: hash_file(path) for path in (tmp_path / "hf").iterdir() if path.name != "manifest.json"
    }
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 7


@pytest.mark.parametrize("make, cls", [(bloom_config, "PreTrainedTokenizerFast"), (gptmeg_config, "GPT2Tokenizer")])
@pytest.mark.parametrize("named", [{}, {"eos": "</s>"}, {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}])
@pytest.mark.parametrize("older", [False, True], ids=["tokenizer_config", "special_tokens_map"])
def test_ids_are_those_of_the_tokenizer_beside_them(
    tmp_path: Path, make: Any, cls: str, named: dict[str, str], older: bool
) -> None:
    import tokenizers

    size = write_tokenizer(tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(file))
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    backend.save(str(file))
    content = {"tokenizer_class": cls}
    tokens = {f"{kind}_token": token for kind, token in named.items()}
    if older:
        (tmp_path / "tokenizer" / "special_tokens_map.json").write_text(json.dumps(tokens))
    else:
        content.update(tokens)
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(content))
    tokenizer = HuggingFaceTokenizer(tmp_path / "tokenizer")

    def save_tokenizer(folder: Path) -> int | None:
        tokenizer.save_pretrained(folder)
        return tokenizer.eod_id

    write_checkpoint(tmp_path / "c", make(vocab_size=size + 3))
    export_checkpoint(tmp_path / "c", tmp_path / "hf", save_tokenizer=save_tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        own = getattr(theirs, name)
        expected = tokenizer.eod_id if own is None else own
        assert (getattr(config, name), getattr(generation, name)) == (expected, expected), name


@pytest.mark.parametrize("make", [bloom_config, gptmeg_config])
def test_ids_that_are_not_known_are_null(tmp_path: Path, make: Any) -> None:
    write_checkpoint(tmp_path / "c", make())
    export_checkpoint(tmp_path / "c", tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


def test_sizes_are_read_in_decimal_and_binary_units() -> None:
    assert [parse_size(text) for text in ("5GB", "1.5 mb", "2GiB", "4096")] == [5 * 10**9, 1_500_000, 2**31, 4096]
