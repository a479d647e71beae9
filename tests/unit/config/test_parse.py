from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megalm.config.parse import HelpRequested, parse_command_line, read_groups, split_command_line
from megalm.errors import ConfigError
from tests.unit.config.arguments import SMALLEST, smallest


def failure_of(*more: str, without: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as raised:
        smallest(*more, without=without)
    return str(raised.value)


def test_defaults_then_preset_then_flag_then_override(tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text("training:\n  min_lr: 1e-5\n  clip_grad: 0.5\n  weight_decay: 0.3\n")
    config = smallest(
        "training.weight_decay=0.5", "--weight-decay", "0.4", "--clip-grad", "0.7", "--config", str(preset)
    )
    training = config.training
    assert (training.adam_beta1, training.min_lr, training.clip_grad, training.weight_decay) == (0.9, 1e-5, 0.7, 0.5)
    assert config.source("training.adam_beta1") == "default"
    assert config.source("training.min_lr") == f"{preset}:2"
    assert config.source("training.clip_grad") == "--clip-grad"
    assert config.source("training.weight_decay") == "the argument training.weight_decay=0.5"


def test_values_keep_their_types() -> None:
    config = smallest(
        "--rampup-batch-size", "2", "2", "1_000", "--train-samples=220_000_000", "--global-batch-size", "8",
        "training.lr=6e-5", "output.load_optim=false", "model.ffn_hidden_size=none", "--weight-decay", "1",
        without=("--train-iters",),
    )  # fmt: skip
    assert config.training.rampup_batch_size == (2, 2, 1000)
    assert config.training.train_samples == 220_000_000
    assert config.training.lr == 6e-5
    assert config.output.load_optim is False
    assert config.model.ffn_hidden_size is None
    assert isinstance(config.training.weight_decay, float)


@pytest.mark.parametrize(
    "words, expected",
    [
        (("--lr", "nan"), "expected a finite number, got 'nan'"),
        (("--seed", "1.5"), "expected an integer"),
        (("--optimizer", "sgd"), "expected one of adamw, got 'sgd' (--optimizer takes adam, adamw)"),
        (("--rampup-batch-size", "2", "2"), "expected three integers"),
        (("--lr",), "--lr needs a value: a finite number"),
        (("--bf16=true",), "--bf16 takes no value, got 'true'"),
        (("--data-impl", "lazy"), "tokenize the corpus again with tools/preprocess_data.py"),
        (("training.lr=fast",), "set by the argument training.lr=fast"),
        (("training.learning_rate=1",), "training.learning_rate is not a setting"),
        (("stray",), "'stray' belongs to no flag"),
        (("--config", "absent.yaml"), "cannot read the configuration absent.yaml: No such file or directory"),
    ],
)
def test_bad_value_is_refused_in_words(words: tuple[str, ...], expected: str) -> None:
    assert expected in failure_of(*words)


def test_unknown_flag_names_the_nearest_and_abbreviations_are_unknown() -> None:
    message = failure_of("--tensor-model-parallel", "2")
    assert message.startswith("--tensor-model-parallel is not a flag")
    assert "--tensor-model-parallel-size" in message
    assert "--deepspeed_config" in failure_of("--deepspeed-config", "x.json")


def test_same_flag_twice_counts_once_the_last() -> None:
    assert smallest("--seed", "1", "--seed", "2").training.seed == 2


def test_two_flags_that_set_one_field_differently_are_refused() -> None:
    assert "training.dtype is set differently by --bf16 (bf16), --fp16 (fp16)" in failure_of("--bf16", "--fp16")
    config = smallest("--checkpoint-activations", "--deepspeed-activation-checkpointing")
    assert config.parallel.recompute == "full"
    assert smallest("--deepspeed-activation-checkpointing").parallel.recompute == "none"
    assert "parallel.recompute" in failure_of("--checkpoint-activations", "--recompute-granularity", "selective")


@pytest.mark.parametrize(
    "words, remedy",
    [
        ("--lr-warmup-tokens 6400", "--lr-warmup-samples"),
        ("--warmup 0.01", "--lr-warmup-fraction"),
        ("--from-weights DIR", "--load FOLDER --finetune"),
        ("--scattered-embeddings", "--sequence-parallel"),
        ("--zero-reduce-bucket-size 5", '"reduce_bucket_size"'),
        ("--log-level-replica info", "pass error"),
        ("--remote-device cpu", "offload_param"),
        ("--vocab-extra-ids 100", "sentinels of T5"),
        ("--fp16 --accumulate-allreduce-grads-in-fp32", "pass --bf16"),
        ("--tokenizer-type Llama2Tokenizer", "pass --tokenizer-type SentencePieceTokenizer"),
        ("data.tokenizer_type=BertWordPieceCase", "a folder that holds BERT's tokenizer.json"),
        ("--eval-iters 0", "--eval-interval 0 leaves validation out"),
        ("--lr 0", "--eval-only"),
    ],
)
def test_flags_of_older_launch_lines_are_answered(words: str, remedy: str) -> None:
    assert remedy in failure_of(*words.split())


def test_flags_of_older_launch_lines_that_change_nothing_are_accepted() -> None:
    line = (
        "--no-log-loss-scale-to-tensorboard --no-log-learnig-rate-to-tensorboard --mmap-warmup --lazy-mpu-init "
        "--use-cpu-initialization --use-contiguous-buffers-in-ddp --no-scatter-gather-tensors-in-pipeline "
        "--zero-contigious-gradients --zero-reduce-scatter --use-pin-memory --no-pipeline-parallel --sample-rate 1.0 "
        "--vocab-extra-ids 0 --remote-device none --short-seq-prob 0.1 --log-level-replica error "
        "--deepspeed-activation-checkpointing"
    )
    assert smallest(*line.split()) == smallest()


def test_the_nearest_of_an_unknown_flag_is_neither_its_opposite_nor_one_without_effect() -> None:
    for unknown in ("--no-checkpoint-activations", "--exit-signal-handlers", "--num-expert"):
        near = failure_of(unknown).partition("nearest: ")[2].split()
        assert not {"--checkpoint-activations", "--exit-signal-handler", "--num-experts"} & {n.strip(",") for n in near}
    assert "nearest: --checkpoint-activations" in failure_of("--checkpoint-activation")


GROUPS = ("a: 1 0:1 A, 2 0:1 B", "b: 1 0:1 C")


@pytest.mark.parametrize(
    "word, value",
    [
        ("data.data_path=0.5 A 0.5 'B C'", ("0.5", "A", "0.5", "B C")),
        (r"data.data_path=/my data/c\d", (r"/my data/c\d",)),
        ("data.train_weighted_split_paths=" + GROUPS[0], GROUPS[:1]),
        ("data.train_weighted_split_paths=" + " ".join(f'"{group}"' for group in GROUPS), GROUPS),
        ("training.rampup_batch_size=2 2 20", (2, 2, 20)),
        ("training.rampup_batch_size=2,2,20", (2, 2, 20)),
    ],
)
def test_lists_in_one_override(word: str, value: tuple[object, ...]) -> None:
    grows = ("--train-samples", "100", "--global-batch-size", "4")
    if "rampup" in word:
        config = smallest(word, *grows, without=("--train-iters",))
    else:
        config = smallest(word, without=("--data-path",))
    assert config.get(word.partition("=")[0]) == value


def test_a_misspelled_section_is_no_part_of_the_flag_before_it() -> None:
    said = failure_of("--data-path", "corpus", "modle.num_layers=3")
    assert "modle.num_layers is not a setting" in said
    assert "nearest: model.num_layers" in said
    for prefix in ("a/b.c=d", "corpus.seed=1", "wiki.split=a"):
        assert smallest("--data-path", prefix).data.data_path == (prefix,)


def test_two_files_without_a_type_are_gpt2s_tokenizer() -> None:
    files = ["--vocab-file", "vocab.json", "--merge-file", "merges.txt"]
    assert smallest(*files, without=("--tokenizer-name-or-path",)).data.tokenizer_type == "GPT2BPETokenizer"
    assert smallest(*files).data.tokenizer_type == "PretrainedFromHF"


@pytest.mark.parametrize("name", ["HuggingFaceTokenizer", "HFTokenizer"])
def test_other_names_of_tokenizer_types_are_known_wherever_they_stand(name: str) -> None:
    assert smallest("--tokenizer-type", name).data.tokenizer_type == "PretrainedFromHF"
    assert smallest(f"data.tokenizer_type={name}").data.tokenizer_type == "PretrainedFromHF"
    assert smallest("--log-level", "critical").output.log_level == "error"


def test_every_missing_field_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        parse_command_line([])
    for flag in (
        "--num-layers",
        "--hidden-size",
        "--num-attention-heads",
        "--seq-length",
        "--micro-batch-size",
        "--lr",
    ):
        assert f"pass {flag}, " in str(raised.value)


def test_several_failures_come_in_one_error() -> None:
    message = failure_of("--bitfit", "--sead", "3", "--lr", "x")
    assert message.startswith("3 settings cannot be obeyed")


def test_parse_failure_does_not_hide_a_rule_that_is_broken() -> None:
    message = failure_of("--bitfit", "--zero-stage", "3", "--pipeline-model-parallel-size", "2")
    assert "--bitfit" in message
    assert "parallel.zero_stage = 3 cannot be combined" in message


def test_override_ends_the_words_of_a_flag() -> None:
    given, overrides, failures = split_command_line(["--data-path", "a", "b", "training.lr=1", "--bf16"])
    assert [(one.flag.name, one.words) for one in given] == [("--data-path", ("a", "b")), ("--bf16", ())]
    assert overrides == [("training.lr", "1")]
    assert failures == []


def test_groups_of_a_paths_file() -> None:
    assert read_groups('"t: 1 0:0.9 a, 2 0:0.9 b" "u: 1 0:1 c"\n') == ("t: 1 0:0.9 a, 2 0:0.9 b", "u: 1 0:1 c")
    for broken in ("", "t: 1 0:1 a", '"t: 1 0:1 a" rest', '"unclosed'):
        with pytest.raises(ValueError, match="double quotes"):
            read_groups(broken)


def test_paths_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.txt")
    message = failure_of("--train-weighted-split-paths-path", absent, without=("--data-path",))
    assert f"cannot read {absent}" in message
    assert "no corpus is given" not in message


def test_dry_run_and_equality_ignore_where_values_came_from() -> None:
    assert smallest("--dry-run").dry_run
    assert smallest("--seed", "7") == smallest("training.seed=7")
    assert smallest("--seed", "7") != smallest()


def test_help_lists_every_flag_and_field() -> None:
    from megalm.config.flags import flag_table
    from megalm.config.root import option_table

    with pytest.raises(HelpRequested) as raised:
        parse_command_line([*SMALLEST, "--help"])
    text = raised.value.text
    assert [name for name in flag_table() if name not in text] == []
    assert [path for path in option_table() if path not in text] == []


def test_command_line_and_help_need_no_torch_and_no_numpy() -> None:
    program = (
        "import sys; from megalm.config.parse import *\n"
        f"parse_command_line({SMALLEST!r})\n"
        "try: parse_command_line(['--help'])\nexcept HelpRequested: pass\n"
        "print([name for name in ('torch', 'numpy', 'deepspeed', 'yaml') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    assert ran.stdout.strip() == "[]"
