from __future__ import annotations

import pytest

from megalm.config.checks import check
from megalm.config.root import Config
from megalm.errors import ConfigError
from tests.unit.config.arguments import smallest


def failure_of(*more: str, without: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as raised:
        smallest(*more, without=without)
    return str(raised.value)


def layout_failure(
    config: Config, *, world_size: int = 1, device_type: str = "cuda", vocab_size: int | None = 512
) -> str:
    with pytest.raises(ConfigError) as raised:
        check(config, world_size=world_size, device_type=device_type, vocab_size=vocab_size)
    return str(raised.value)


def test_smallest_configuration_passes() -> None:
    check(smallest(), world_size=1, device_type="cpu", vocab_size=512)
    check(smallest(), world_size=4, device_type="cuda", vocab_size=None)


def test_error_has_value_rule_origin_and_what_would_work() -> None:
    assert failure_of("--num-attention-heads", "7").splitlines() == [
        "model.num_heads = 7 must divide model.hidden_size = 64",
        "  model.num_heads set by --num-attention-heads; model.hidden_size set by --hidden-size",
        "  values that fit: 1, 2, 4, 8, 16, 32, 64",
    ]


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--lr 0", "training.lr = 0.0 must be greater than 0"),
        ("--tensor-model-parallel-size 0", "parallel.tp = 0 must be greater than 0"),
        ("--weight-decay -0.1", "training.weight_decay = -0.1 must not be negative"),
        ("--hidden-dropout 1.0", "model.hidden_dropout = 1.0 must be at least 0 and less than 1"),
        ("--vocab-size 100 --pad-vocab-size-to 64", "model.pad_vocab_size_to = 64 must hold model.vocab_size = 100"),
        ("--max-position-embeddings 16", "model.max_position_embeddings = 16 must be at least data.seq_length = 32"),
        ("--pipeline-model-parallel-size 5", "parallel.pp = 5 must not exceed model.num_layers = 4"),
        ("--pp-partition-method layers", "parallel.pipeline_partition = layers is not a way to deal layers"),
        ("--pp-partition-method 'type:transformer|embedding'", "without quotation marks or colons inside the value"),
        ("--pp-partition-method type:(", "parallel.pipeline_partition = type:( is not"),
        ("--pp-partition-method type:(?:layer)", "quotation marks or colons inside the value"),
        ("--seed 4294967296", "training.seed = 4294967296 must be less than 2^32"),
        (
            "--initial-loss-scale 1e300 --fp16",
            "= 1e+300 must be a power of two, from 1 to 2^127",
        ),
        ("--gelu-linear-kernel torch --glu-activation swiglu", "needs model.glu_activation = no gate, not swiglu"),
        ("--gelu-linear-kernel torch --no-bias-gelu-fusion", "needs model.activation = gelu_tanh, not gelu_erf"),
        ("--gelu-linear-kernel torch --tensor-model-parallel-size 2", "needs parallel.tp = 1, not 2"),
        ("--gelu-linear-kernel torch --zero-stage 3", "needs parallel.zero_stage = less than 3, not 3"),
        ("--gelu-linear-kernel torch --recompute-granularity activation", "selective or full, not activation"),
        ("--gelu-linear-kernel torch --bf16 output.linear=fp8", "needs output.linear = torch, not fp8"),
        ("--gelu-linear-kernel cublaslt", "needs training.dtype = bf16 or fp16, not fp32"),
        ("--adamw-kernel triton", "output.adamw = triton updates bf16 weights with ZeRO-0 or 1, not fp32 with ZeRO-0"),
        ("--adamw-kernel triton --fp16 --zero-stage 1", "not fp16 with ZeRO-1"),
        ("--adamw-kernel triton --bf16 --zero-stage 2", "not bf16 with ZeRO-2"),
        ("--sequence-parallel", "parallel.sequence_parallel needs parallel.tp > 1"),
        ("--sequence-parallel --tensor-model-parallel-size 3", "parallel.tp = 3 must divide data.seq_length = 32"),
        ("--zero-stage 2 --pipeline-model-parallel-size 2", "parallel.zero_stage = 2 cannot be combined"),
        ("--train-samples 100", "training.train_iters = 10 excludes training.train_samples = 100"),
        ("--eval-only", "training.eval_only needs a checkpoint"),
        ("--lr-decay-samples 50", "training.lr_decay_samples = 50 does not fit a run that counts steps"),
        ("--lr-warmup-iters 10", "training.lr_warmup_iters = 10 must be less than the decay of 10 steps"),
        ("--lr-warmup-iters 2 --lr-warmup-fraction 0.1", "excludes training.lr_warmup_iters = 2"),
        ("--min-lr 1", "training.min_lr = 1.0 must not exceed training.lr = 0.001"),
        ("--rampup-batch-size 2 2 10 --global-batch-size 4", "needs a run that counts samples"),
        ("--rampup-batch-size 2 2 10", "needs the batch to grow to"),
        ("--rampup-batch-size 2 3 10 --global-batch-size 4", "does not reach training.global_batch_size = 4"),
        ("--loss-scale 8 --bf16", "training.loss_scale = 8.0 has no meaning in bf16"),
        ("--initial-loss-scale 1000 --fp16", "training.initial_loss_scale = 1000.0 must be a power of two"),
        ("--min-loss-scale 0.5 --fp16", "training.min_loss_scale = 0.5 must be a whole number"),
        (
            "--min-loss-scale 512 --initial-loss-scale 256 --fp16",
            "training.min_loss_scale = 512.0 must not exceed training.initial_loss_scale = 256.0",
        ),
        ("--train-weighted-split-paths g", "data.data_path excludes weighted groups"),
        ("--split 1,2,3,4", "data.split = '1,2,3,4' must be one to three proportions"),
        ("--split nan,1", "data.split = 'nan,1' must be one to three proportions"),
        ("--split 0,0,0", "data.split = '0,0,0' must be one to three proportions"),
        ("--tokenizer-type GPT2BPETokenizer --vocab-file v", "needs data.merge_file"),
        ("--tokenizer-type NullTokenizer", "needs model.vocab_size"),
        ("--save-interval 5", "output.save_interval = 5 needs a folder to save to"),
        ("--loss-spike-threshold 5", "training.loss_spike_threshold = 5.0 needs checkpoints to go back to"),
        ("--loss-spike-threshold 5 --save x", "pass --save FOLDER and --save-interval N"),
        (
            "--loss-spike-threshold 5 --save x --save-interval 50 --keep-last 3",
            "loss_spike_margin = 103 steps, and output.keep_last = 3 keeps checkpoints of 100",
        ),
        ("--loss-spike-threshold 5 --save x --save-interval 50 --keep-last 3", "--keep-last 4, or more"),
        ("--loss-spike-steps 0", "training.loss_spike_steps = 0 must be greater than 0"),
        ("--loss-spike-margin -1", "training.loss_spike_margin = -1 must not be negative"),
        ("--finetune", "output.finetune needs a checkpoint to load"),
        ("--wandb-exp-name x", "output.wandb_name needs a W&B project"),
    ],
)
def test_rule_that_needs_no_processes(words: str, expected: str) -> None:
    assert expected in failure_of(*words.split(" "))


def test_what_must_be_given() -> None:
    assert "pass --data-path PREFIX" in failure_of(without=("--data-path",))
    assert "pass --train-iters or --train-samples" in failure_of(without=("--train-iters",))
    assert "pass --tokenizer-name-or-path FOLDER" in failure_of(without=("--tokenizer-name-or-path",))


def test_sample_counted_run_refuses_step_counted_schedule() -> None:
    message = failure_of("--train-samples", "100", "--lr-warmup-iters", "3", without=("--train-iters",))
    assert "pass --lr-warmup-samples instead" in message


def test_alibi_run_may_name_any_number_of_positions() -> None:
    assert smallest("--position-embedding-type", "alibi", "--max-position-embeddings", "8").model.num_layers == 4


def test_tensor_ranks_must_divide_heads_width_and_vocabulary() -> None:
    message = layout_failure(smallest("--tensor-model-parallel-size", "8"), world_size=8)
    assert "parallel.tp = 8 must divide model.num_heads = 4" in message
    message = layout_failure(smallest("--tensor-model-parallel-size", "4", "--ffn-hidden-size", "102"), world_size=4)
    assert "parallel.tp = 4 must divide the MLP's width = 102" in message
    assert message.splitlines()[-1] == "  values that fit: 1, 2"
    odd = smallest("--tensor-model-parallel-size", "2", "--make-vocab-size-divisible-by", "1")
    assert "the padded vocabulary = 513" in layout_failure(odd, world_size=2, vocab_size=513)


def test_embedding_must_hold_the_tokenizer() -> None:
    assert "model.vocab_size = 100 must hold the tokenizer's 512" in layout_failure(smallest("--vocab-size", "100"))
    assert "model.pad_vocab_size_to = 256 must hold" in layout_failure(smallest("--pad-vocab-size-to", "256"))


def test_layout_must_fit_the_processes_and_batches_the_replicas() -> None:
    config = smallest(
        "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--global-batch-size", "6"
    )
    message = layout_failure(config, world_size=6)
    assert "parallel.tp * parallel.pp = 2 * 2 must divide the 6 processes" in message
    assert "tp x pp of: 1x1, 1x2, 1x3, 1x6, 2x1, 2x3, 3x1, 3x2, 6x1" in message
    check(config, world_size=4, device_type="cuda", vocab_size=512)
    message = layout_failure(config, world_size=8)
    assert "training.global_batch_size = 6 must be a multiple of micro_batch_size * dp = 2 * 2" in message
    assert "nearest: 4 or 8" in message


def test_ramp_up_must_be_made_of_whole_micro_batches() -> None:
    config = smallest(
        "--rampup-batch-size", "2", "2", "100", "--global-batch-size", "8", "--train-samples", "1000",
        without=("--train-iters",),
    )  # fmt: skip
    check(config, world_size=1, device_type="cuda", vocab_size=512)
    message = layout_failure(config, world_size=2)
    assert "the start of training.rampup_batch_size = 2 must be a multiple" in message
    assert "the increment of training.rampup_batch_size = 2 must be a multiple" in message


def test_device_must_be_able_to() -> None:
    assert "needs a GPU" in layout_failure(smallest("--fp16"), device_type="cpu")
    assert "needs GPUs" in layout_failure(smallest("--distributed-backend", "nccl"), device_type="cpu")
    check(smallest("--fp16", "--distributed-backend", "nccl"), world_size=1, device_type="cuda", vocab_size=512)
    gloo = smallest("--distributed-backend", "gloo")
    assert "is for CPUs" in layout_failure(gloo, world_size=2, device_type="cuda")
    check(gloo, world_size=2, device_type="cpu", vocab_size=512)
    check(gloo, world_size=1, device_type="cuda", vocab_size=512)


def test_layout_failures_join_the_others_in_one_error() -> None:
    config = smallest("--tensor-model-parallel-size", "8", "--fp16", "--global-batch-size", "3")
    assert layout_failure(config, world_size=8, device_type="cpu").startswith("3 settings cannot be obeyed")
