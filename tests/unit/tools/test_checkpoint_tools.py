from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.checkpoint import layout
from megalm.checkpoint.durable import replace_text
from megalm.models.gpt.weights import FIRST_BLOCK_LAYER
from megalm.tokenizers.train import train_byte_level_bpe
from tests.support.checkpoints import bloom_config, gptmeg_config, write_checkpoint
from tests.support.tokenizer_folder import write_tokenizer
from tools import convert_checkpoint, export_hf, generate, import_hf, inspect_checkpoint, verify_checkpoint

PROMPT = "def main"


@pytest.fixture(params=["bloom", "gptmeg"])
def run_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    vocab_size = write_tokenizer(tmp_path / "tokenizer")
    make = {"bloom": bloom_config, "gptmeg": gptmeg_config}[request.param]
    config = make(vocab_size=vocab_size)
    config = replace(config, data=replace(config.data, tokenizer_path=str(tmp_path / "tokenizer")))
    write_checkpoint(tmp_path / "run" / "global_step3", config, tp_size=2)
    replace_text(tmp_path / "run" / layout.LATEST, "global_step3")
    return tmp_path / "run"


def test_export_with_proof_then_generate_from_both_sides(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    out = run_folder.parent / "hf"
    assert export_hf.main(["--load", str(run_folder), "--save", str(out), "--verify"]) == 0
    said = capsys.readouterr().out
    assert "verified: logits of 128 tokens equal transformers' to" in said
    assert " continues " in said
    assert all(len(line) < 250 and "[" not in line for line in said.splitlines())
    assert "MB of weights in 1 file, " in said
    texts = []
    for folder in (run_folder, out):
        assert generate.main(["--load", str(folder), "--prompt", PROMPT, "--max-new-tokens", "8"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith(PROMPT)
    assert "Loading" not in capsys.readouterr().err
    assert generate.main(["--load", str(out), "--prompt", PROMPT, "--step", "3"]) == 2
    assert "--step 3 has no meaning for the Hugging Face folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--top-k", "0", "--temperature", "1"], "--top-k 0 must be at least 1"),
        (["--top-k", "5"], "--top-k 5 limits a choice at random, and --temperature 0 takes the likeliest token"),
        (["--temperature", "-1"], "--temperature -1.0 must be at least 0"),
        (["--temperature", "nan"], "--temperature nan must be at least 0"),
        (["--temperature", "inf"], "--temperature inf must be 0, or finite"),
        (["--temperature", "1e-300"], "--temperature 1e-300 must be 0, or finite and at least 1e-06"),
        (["--seed", "-1"], "--seed -1 must be at least 0"),
        (["--seed", str(2**63)], "must be less than 2^63"),
        (["--max-new-tokens", "-3"], "--max-new-tokens -3 must be at least 0"),
    ],
)
def test_a_choice_of_tokens_that_cannot_be_is_refused(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--load", str(tmp_path), "--prompt", PROMPT, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_folder_without_a_model_is_no_hugging_face_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
    assert generate.main(["--load", str(tmp_path), "--prompt", PROMPT]) == 5
    assert "holds no model that transformers reads: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--save", "{run}/out", "--tensor-model-parallel-size", "0"], "parallel sizes must be at least 1"),
        (["--save", "{run}/latest", "--tensor-model-parallel-size", "2"], "latest is a file"),
        (["--save", "{run}/latest/out", "--to-universal"], "cannot write "),
    ],
)
def test_a_conversion_that_cannot_be_is_refused(
    run_folder: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words_of_it = [word.replace("{run}", str(run_folder)) for word in arguments]
    assert convert_checkpoint.main(["--load", str(run_folder), *words_of_it]) == 5
    assert words in capsys.readouterr().err


def test_an_export_loads_with_its_tokenizer(run_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    out = run_folder.parent / "hf"
    assert export_hf.main(["--load", str(run_folder), "--save", str(out), "--dtype", "bf16"]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer(PROMPT)["input_ids"]) == PROMPT
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.config.eos_token_id == tokenizer.eos_token_id == 256


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--load", "{run}/nowhere"], "is not a folder"),
        (["--load", "{run}", "--step", "4"], "no checkpoint of step 4; there are 3"),
        (["--load", "{run}/global_step3", "--step", "4"], "global_step3 is one checkpoint, and not that of step 4"),
        (["--load", "{run}", "--max-shard-size", "big"], "give a size such as 5GB"),
        (["--load", "{run}", "--max-shard-size", "0"], "give a size such as 5GB"),
        (["--load", "{run}", "--tokenizer-name-or-path", "{run}"], "tokenizer"),
        (["--load", "{run}", "--no-tokenizer", "--tokenizer-name-or-path", "{run}"], "--no-tokenizer excludes"),
        (["--load", "{run}", "--verify-text", "x"], "--verify-text is what --verify and --verify-by-layer compare on"),
        (["--load", "{run}", "--verify", "--verify-text", ""], "nothing to compare on: the text has no tokens"),
    ],
)
def test_bad_arguments_are_one_paragraph_and_leave_nothing(
    run_folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    out = run_folder.parent / "hf"
    filled = [argument.format(run=run_folder) for argument in arguments]
    assert export_hf.main([*filled, "--save", str(out)]) != 0
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_workers_that_cannot_be_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--load", str(tmp_path), "--save", str(tmp_path / "out"), "--to-universal", "--workers", "0"]
    assert convert_checkpoint.main(arguments) == 2
    assert "--workers 0 must be at least 1" in capsys.readouterr().err


def test_a_hugging_face_folder_is_no_damaged_checkpoint(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_folder.parent / "hf"
    assert export_hf.main(["--load", str(run_folder), "--save", str(out)]) == 0
    assert verify_checkpoint.main(["--load", str(out)]) == 5
    assert "is a Hugging Face folder" in capsys.readouterr().err


def test_verification_passes_a_whole_checkpoint(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_checkpoint.main(["--load", str(run_folder)]) == 0
    assert "global_step3: whole" in capsys.readouterr().out
    for step, code in (("3", 0), ("4", 5)):
        assert verify_checkpoint.main(["--load", str(run_folder / "global_step3"), "--step", step]) == code
    assert "global_step3 is one checkpoint, and not that of step 4" in capsys.readouterr().err


def test_verification_finds_a_flipped_bit_nan_and_drift(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder / "global_step3"
    file = folder / layout.layer_file(FIRST_BLOCK_LAYER, 0)
    intact = file.read_bytes()
    file.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    assert verify_checkpoint.main(["--load", str(folder)]) == 5
    assert "sha256 differs" in capsys.readouterr().out
    file.write_bytes(intact)

    def spoil(state: dict[str, Any]) -> None:
        state["self_attention.dense.bias"][0] = float("nan")
        state["input_layernorm.weight"] += 1.0

    rewrite_with_manifest(file, spoil)
    assert verify_checkpoint.main(["--load", str(folder)]) == 5
    said = capsys.readouterr().out
    assert "self_attention.dense.bias holds NaN or infinity" in said
    assert "copies of h.0.input_layernorm.weight differ" in said


def rewrite_with_manifest(file: Path, change: Any) -> None:
    """Change a tensor file as a faulty trainer would have: the manifest agrees with it."""
    from megalm.checkpoint.manifest import read_manifest
    from megalm.checkpoint.tensor_files import read_tensors, write_tensors

    state = read_tensors(file)
    change(state)
    file.unlink()
    record = write_tensors(file, state)
    manifest = read_manifest(file.parent)
    files = tuple(record if old.name == record.name else old for old in manifest.files)
    (file.parent / layout.MANIFEST).write_text(replace(manifest, files=files).to_json())


def test_import_convert_and_inspect_agree_about_every_tensor(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    base = run_folder.parent
    assert export_hf.main(["--load", str(run_folder), "--save", str(base / "new" / "hf")]) == 0
    imported = ["--model", str(base / "new" / "hf"), "--save", str(base / "imported")]
    assert import_hf.main([*imported, "--pipeline-model-parallel-size", "100"]) == 5
    assert "100 pipeline stages do not fit" in capsys.readouterr().err
    assert import_hf.main(imported) == 0
    arguments = ["--load", str(base / "imported"), "--save", str(base / "converted")]
    # 257 ids pad to 264 rows, which 4 and 2 divide.
    assert convert_checkpoint.main([*arguments, "--tensor-model-parallel-size", "4"]) == 0
    capsys.readouterr()
    assert inspect_checkpoint.main(["--load", str(run_folder), "--diff", str(base / "converted")]) == 0
    said = capsys.readouterr().out
    assert "every tensor is bit-equal" in said
    assert "tp 2, pp 1" in said
    assert "tp 4, pp 1" in said


def import_of_a_short_gpt2(base: Path, *, with_tokenizer: bool) -> Path:
    """An import of a GPT-2 of 33 positions: fewer than tokens that a proof takes where nothing says how many."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=24, n_layer=1, n_head=3, vocab_size=257, n_positions=33, pad_token_id=7)
    transformers.GPT2LMHeadModel(config).save_pretrained(base / "short")
    if with_tokenizer:
        write_tokenizer(base / "short")
    assert import_hf.main(["--model", str(base / "short"), "--save", str(base / "imported")]) == 0
    return base / "imported"


@pytest.mark.parametrize("by_layer", [False, True])
def test_an_import_is_exported_with_its_tokenizer_and_proved(
    tmp_path: Path, by_layer: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    imported, out = import_of_a_short_gpt2(tmp_path, with_tokenizer=True), tmp_path / "out"
    verify = "--verify-by-layer" if by_layer else "--verify"
    assert export_hf.main(["--load", str(imported), "--save", str(out), verify]) == 0
    said = capsys.readouterr()
    assert "verified: " in said.out
    assert "no tokenizer" not in said.err
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "short" / "tokenizer.json").read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (256, 256, 7)
    assert generate.main(["--load", str(imported), "--prompt", PROMPT, "--max-new-tokens", "4"]) == 0


def test_an_export_without_a_tokenizer_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported = import_of_a_short_gpt2(tmp_path, with_tokenizer=False)
    assert export_hf.main(["--load", str(imported), "--save", str(tmp_path / "out")]) == 0
    assert "no tokenizer is written: " in capsys.readouterr().err
    assert export_hf.main(["--load", str(imported), "--save", str(tmp_path / "out2"), "--no-tokenizer"]) == 0
    assert "no tokenizer" not in capsys.readouterr().err


def test_inspection_names_the_tensor_that_differs(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    other = run_folder.parent / "other" / "global_step3"
    shutil.copytree(run_folder / "global_step3", other)

    def change(state: dict[str, Any]) -> None:
        state["mlp.dense_4h_to_h.weight"][0, 0] += 0.5

    rewrite_with_manifest(other / layout.layer_file(FIRST_BLOCK_LAYER + 1, 1), change)
    arguments = ["--load", str(run_folder), "--diff", str(other), "--norms"]
    assert inspect_checkpoint.main(arguments) == 1
    said = capsys.readouterr().out
    assert "1 tensors differ" in said
    assert "differs by up to 5.000e-01" in said
    assert said.count("h.1.mlp.dense_4h_to_h.weight") == 2  # its norm, its difference


def test_text_goes_through_no_other_tokenizer_than_the_runs(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = run_folder.parent
    train_byte_level_bpe(["aa bb aa bb cc dd ee ff"] * 9, base / "larger", vocab_size=270)
    given = ["--tokenizer-name-or-path", str(base / "larger")]
    assert export_hf.main(["--load", str(run_folder), "--save", str(base / "hf"), *given]) == 3
    assert "ids, and the model has 264 rows of word embedding" in capsys.readouterr().err
    assert not (base / "hf").exists()
    assert export_hf.main(["--load", str(run_folder), "--save", str(base / "hf")]) == 0
    for folder in (run_folder, base / "hf"):
        capsys.readouterr()
        assert generate.main(["--load", str(folder), "--prompt", PROMPT, *given]) == 3
        assert "ids, and the model has 264 rows of word embedding" in capsys.readouterr().err


def test_nothing_is_generated_from_weights_that_are_not_there(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    out = run_folder.parent / "hf"
    assert export_hf.main(["--load", str(run_folder), "--save", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "n_layer": 3}))
    assert generate.main(["--load", str(out), "--prompt", PROMPT]) == 5
    said = capsys.readouterr()
    assert "transformers reports missing keys in" in said.err
    assert PROMPT not in said.out
