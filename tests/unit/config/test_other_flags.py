"""Every flag that the Megatron family's trainers take for GPT is obeyed, accepted, or refused by name or family."""

from __future__ import annotations

import pytest

from megalm.config.flag_families import FAMILIES
from megalm.config.flags import find_flag, flag_table
from megalm.config.parse import split_command_line
from tests.support.other_flags import BIGSCIENCE, MEGATRON_BEFORE, MEGATRON_CORE, MEGATRON_DEEPSPEED
from tests.unit.config.arguments import smallest
from tests.unit.config.test_parse import failure_of

SOURCES = {
    "megatron_core": MEGATRON_CORE,
    "megatron_before": MEGATRON_BEFORE,
    "megatron_deepspeed": MEGATRON_DEEPSPEED,
    "bigscience": BIGSCIENCE,
}
VALUES = {"": [], "=": ["-1"], "=+": ["1", "2"]}


@pytest.mark.parametrize("source", SOURCES)
def test_every_flag_of_others_has_an_answer_and_takes_its_values(source: str) -> None:
    line = []
    for entry in SOURCES[source]:
        name, sign, several = entry.partition("=")
        line += [f"--{name}", *VALUES[sign + several]]
        line += [f"--{name}=-1"] if sign else []
    given, _, failures = split_command_line(line)
    assert [str(failure) for failure in failures] == []
    assert [one.flag.name for one in given] == [word.partition("=")[0] for word in line if word.startswith("--")]


def test_every_name_of_a_family_is_some_flag_of_others() -> None:
    names = {f"--{entry.partition('=')[0]}" for entries in SOURCES.values() for entry in entries}
    for one in FAMILIES:
        for known in one.names:
            alone = type(one)((known,), "", "")
            assert any(alone.holds(name, patterns="*" in known) for name in names), known
            assert known not in flag_table(), known


def test_a_flag_with_an_answer_of_its_own_is_in_no_family() -> None:
    for name in ("--num-experts", "--ckpt-format", "--fp8-format", "--inference", "--moe-expert-parallel-size"):
        assert find_flag(name) is flag_table()[name]
    assert find_flag("--no-one-has-thought-of") is None


def test_a_whole_name_goes_before_the_pattern_of_another_family() -> None:
    for name, note in (("--rotary-scaling-factor", "multi-latent"), ("--hybrid-context-parallel", "is not split")):
        found = find_flag(name)
        assert found is not None
        assert note in found.note


def test_flags_of_one_family_are_one_failure() -> None:
    said = failure_of(
        "--num-experts", "8", "--moe-router-topk", "2", "--moe-grouped-gemm", "--disable-moe-token-dropping"
    )
    assert said.startswith("2 settings cannot be obeyed")
    assert "--moe-router-topk 2, --moe-grouped-gemm, --disable-moe-token-dropping: there are no mixtures" in said
    assert said.endswith("remove them to train a dense model")
    assert "--num-experts 8: There are no mixtures of experts.\n  remove it" in said


@pytest.mark.parametrize(
    "words",
    [
        "--context-parallel-size 1 --ds-sequence-parallel-size 1 --num-experts 1 --moe-expert-parallel-size 1",
        "--rerun-mode disabled --no-one-logger --timing-log-level 0 --no-barrier-with-level-1-timing",
        "--calculate-per-token-loss --cross-entropy-loss-fusion --cross-entropy-fusion-impl te --no-rope-fusion",
        "--exp-avg-dtype fp32 --fp8-recipe tensorwise --normalization layernorm --recompute-modules core_attn",
        "--weight-decay-incr-style constant --empty-unused-memory-level 0 --data-parallel-sharding-strategy no_shard",
        "--cpu-offloading-num-layers 0 --num-virtual-stages-per-pipeline-rank 1 --no-mmap-bin-files",
        "--num-distributed-optimizer-instances 1 --exit-signal SIGTERM --verify-integrity",
        "--no-align-grad-reduce --disable-align-grad-reduce --no-clone-scatter-output-in-embedding --torch_adam",
        f"--kv-channels {smallest().model.head_size}",
        "--num-dataset-builder-threads 8 --disable-gloo-process-groups --softmax-type vanilla",
    ],
)
def test_what_changes_nothing_is_accepted(words: str) -> None:
    assert smallest(*words.split()) == smallest()


@pytest.mark.parametrize(
    "beside, words, like",
    [
        ("--load c", "--skip-train", "--eval-only"),
        ("", "--kill-switch-file stop", "--kill-switch-path stop"),
        ("", "--padded-vocab-size 512", "--pad-vocab-size-to 512"),
        ("", "--no-pad-vocab-size", "--make-vocab-size-divisible-by 1"),
        ("--save s", "--persistent-save-interval 5", "--save-interval 5"),
        ("", "--logging-level 30", "--log-level warning"),
        ("", "--profile pt", "--profile"),
        ("--bf16", "--fp8-hybrid", "--fp8-format hybrid"),
        ("--bf16", "--fp8-e4m3", "--fp8-format e4m3"),
    ],
)
def test_other_names_of_a_field_mean_the_same(beside: str, words: str, like: str) -> None:
    known = beside.split()
    assert smallest(*known, *words.split()) == smallest(*known, *like.split())
    assert smallest(*known, *words.split()) != smallest(*known)


def test_sizes_of_an_encoder_are_the_models() -> None:
    config = smallest(
        "--encoder-seq-length", "16", "--encoder-num-layers", "8", without=("--seq-length", "--num-layers")
    )
    assert (config.data.seq_length, config.model.num_layers) == (16, 8)


@pytest.mark.parametrize(
    "words, remedy",
    [
        ("--context-parallel-size 2", "--sequence-parallel saves activations"),
        ("--num-experts 1 4", "remove it to train a dense model"),
        ("--recompute-modules core_attn mlp", "pass core_attn"),
        ("--rerun-mode validate_results", "pass disabled"),
        ("--weight-decay-incr-style linear", "pass --weight-decay alone"),
        ("--calculate-per-token-loss --eod-mask-loss", "remove it, or --eod-mask-loss"),
        ("--kv-channels 7", "model.head_size is 16"),
        ("--kv-channels 7 --num-attention-heads 0", "model.num_heads = 0"),
        ("--main-grads-dtype fp32 --fp16", "pass --bf16"),
        ("--fp8-recipe delayed", "pass tensorwise"),
        ("--fp8-amax-history-len 1024", "pass --fp8-format hybrid or e4m3 alone"),
        ("--exit-on-missing-checkpoint --allow-fresh-start", "keep one of these flags"),
        ("--profile pt-full", "--profile takes pt"),
        ("--train-data-path 1 a", "--train-weighted-split-paths"),
        ("--data-args-path list.txt", "$(cat FILE)"),
        ("--use-torch-fsdp2", "--zero-stage"),
        ("--ckpt-step 100", "--load FOLDER/global_step"),
        ("--overlap-p2p-communication --tp-comm-overlap", "--overlap-p2p-communication, --tp-comm-overlap: "),
        ("--dist-ckpt-format zarr", "remove it"),
        ("--grad-reduce-in-bf16", "summed and reduced in fp32"),
        ("--wandb-entity team", "WANDB_ENTITY"),
        ("--ffn_hidden_size 64", "it is written --ffn-hidden-size"),
        ("--deepspeed-config ds.json", "it is written --deepspeed_config"),
        ("--zero_reduce_scatter", "it is written --zero-reduce-scatter"),
        ("--moe_router_topk 2", "train a dense model"),
        ("--use_flash_attn", "--attention-kernel sdpa"),
    ],
)
def test_what_would_change_a_run_is_refused_with_a_remedy(words: str, remedy: str) -> None:
    assert remedy in failure_of(*words.split())


def test_made_up_data_is_refused_for_one_reason() -> None:
    said = failure_of("--mock-data", without=("--data-path",))
    assert "tools/preprocess_data.py" in said
    assert "no corpus is given" not in said
