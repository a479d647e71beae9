from __future__ import annotations

from pathlib import Path

import pytest

from megalm.config.checks import check
from megalm.config.flags import flag_table
from megalm.config.parse import parse_command_line
from megalm.errors import ConfigError
from tests.support import launch_lines
from tests.support.launch_lines import words


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    launch_lines.write_files(tmp_path)
    return tmp_path


def test_bloom_176b_line_means_what_it_says(folder: Path) -> None:
    config = parse_command_line(words(launch_lines.BLOOM_176B, folder))
    check(config, world_size=384, device_type="cuda", vocab_size=250_680)
    assert (config.parallel.tp, config.parallel.pp, config.parallel.recompute) == (4, 12, "full")
    assert config.parallel.pipeline_partition == "type:transformer|embedding"
    assert (config.model.num_layers, config.model.hidden_size, config.model.num_heads) == (70, 14336, 112)
    assert (config.model.position_embedding, config.model.embed_layernorm) == ("alibi", True)
    assert config.model.padded_vocab_size == 250_880
    training = config.training
    assert training.rampup_batch_size == (192, 16, 9_765_625)
    assert (training.global_batch_size, training.train_samples) == (2048, 220_000_000)
    assert (training.lr_decay_samples, training.lr_warmup_samples, training.dtype) == (200_000_000, 183_105, "bf16")
    assert (training.lr, training.min_lr, training.weight_decay, training.seed) == (6e-5, 6e-6, 0.1, 42)
    assert config.data.train_weighted_split_paths == ("train: 0.25 0:0.949 data/ar, 0.75 0:0.949 data/en",)
    assert len(config.data.valid_weighted_split_paths) == 2
    assert (config.data.num_workers, config.data.valid_num_workers) == (2, 0)
    assert config.deepspeed == {"steps_per_print": 2000, "wall_clock_breakdown": False}
    assert config.source("parallel.tp") == "--tensor-model-parallel-size"


def test_13b_fp16_line_takes_its_loss_scale_from_the_deepspeed_file(folder: Path) -> None:
    config = parse_command_line(words(launch_lines.GPT_13B_FP16, folder))
    check(config, world_size=256, device_type="cuda", vocab_size=50_257)
    assert (config.training.dtype, config.training.loss_scale, config.training.initial_loss_scale) == (
        "fp16",
        None,
        4096,
    )
    assert config.training.loss_scale_window == 500
    assert config.source("training.initial_loss_scale") == f"{folder}/ds_fp16.json: fp16.initial_scale_power"
    assert config.model.position_embedding == "learned"


def test_line_that_counts_iterations_is_obeyed(folder: Path) -> None:
    config = parse_command_line(words(launch_lines.TINY_BY_ITERATIONS, folder))
    assert (config.training.train_iters, config.training.by_samples) == (1000, False)
    assert config.data.data_path == ("0.3", f"{folder}/a", "0.7", f"{folder}/b")
    assert (config.output.load_optim, config.output.load_rng, config.output.finetune) == (False, False, True)
    assert (config.model.activation, config.training.eval_only) == ("gelu_erf", True)


def test_line_of_an_experiment_is_refused_with_every_remedy_in_one_error(folder: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_command_line(words(launch_lines.EXPERIMENT, folder))
    message = str(raised.value)
    refused = [word for word in launch_lines.EXPERIMENT.split() if word in flag_table()]
    refused = [name for name in refused if flag_table()[name].action == "refuse"]
    assert len(refused) == 13
    for name in refused:
        assert f"{name}" in message
        if "tokens" not in name:
            assert flag_table()[name].remedy in message
    assert "pass --train-samples 54687500: 112000000000 tokens / seq_length 2048" in message
    assert "pass --lr-decay-samples 48828125: 100000000000 tokens / seq_length 2048" in message
    assert "--dataloader-type cyclic" in message
    assert message.startswith("15 settings cannot be obeyed")


def test_line_of_microsofts_trainer_is_obeyed(folder: Path) -> None:
    config = parse_command_line(words(launch_lines.MICROSOFT, folder))
    check(config, world_size=2, device_type="cuda", vocab_size=50_257)
    assert (config.parallel.zero_stage, config.parallel.recompute, config.training.dtype) == (1, "full", "bf16")
    assert config.data.tokenizer_type == "GPT2BPETokenizer"


def test_line_of_megatron_core_is_answered_by_reason(folder: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_command_line(words(launch_lines.MEGATRON_CORE, folder))
    message = str(raised.value)
    assert message.startswith("9 settings cannot be obeyed")
    for first_words in (
        "--num-experts 8, --expert-model-parallel-size 2: ",
        "--moe-router-topk 2, --moe-aux-loss-coeff 1e-2: there are no mixtures",
        "--rotary-percent 0.5, --rotary-base 1000000: ",
        "--overlap-grad-reduce, --overlap-param-gather, --tp-comm-overlap: ",
        "--dist-ckpt-strictness log_all, --dist-ckpt-optim-fully-reshardable: ",
        "model.position_embedding = rope",
        "--normalization RMSNorm",
        "--ckpt-format torch_dist",
        "--wandb-entity team",
    ):
        assert f") {first_words}" in message


# The flags of BigScience's launch scripts, its examples and tests, and of the launchers.
SCRIPT_FLAGS = """abort-on-unmet-fused-kernel-constraints adam-beta1 adam-beta2 adam-eps attention-dropout bf16 bitfit
checkpoint-activations clip-grad codecarbon-dir data-impl data-path dataloader-type deepspeed
deepspeed-activation-checkpointing deepspeed_config distributed-backend embed-layernorm eval-interval eval-iters
eval-only exit-duration-in-mins ffn-hidden-size fp16 global-batch-size glu-activation hidden-dropout hidden-size
init-method-std kill-switch-path load log-batch-size-to-tensorboard log-interval log-level log-level-replica
log-timers-to-tensorboard log-validation-ppl-to-tensorboard loss-on-targets-only loss-scale lr lr-decay-samples
lr-decay-style lr-decay-tokens lr-warmup-samples max-position-embeddings merge-file micro-batch-size min-lr mup
mup-attn-mult mup-input-mult mup-output-mult no-bias-gelu-fusion no-load-optim no-query-key-layer-scaling
norm-target-loss num-attention-heads num-layers num-workers optimizer pad-vocab-size-to pipeline-model-parallel-size
position-embedding-type pp-partition-method rampup-batch-size reset-attention-mask reset-progress save save-interval
seed seq-length skip-train-iteration-range split sync-tp-duplicated-parameters tensor-model-parallel-size
tensorboard-dir tensorboard-queue-size test-weighted-split-paths tokenizer-name-or-path tokenizer-type train-samples
train-tokens train-weighted-split-paths train-weighted-split-paths-path universal-checkpoint use-bnb-optimizer
valid-num-workers valid-weighted-split-paths valid-weighted-split-paths-path vocab-file weight-decay zero-stage
exit-interval hysteresis inference log-path lr-decay-iters lr-warmup-fraction lr-warmup-iters no-load-rng
override-lr-scheduler partition-activations reweight-loss-based-on-position-frequency train-iters local_rank deepscale
deepscale_config deepspeed_mpi deepscale_mpi""".split()


@pytest.mark.parametrize("name", SCRIPT_FLAGS)
def test_flag_of_existing_scripts_is_known(name: str) -> None:
    assert f"--{name}" in flag_table()
