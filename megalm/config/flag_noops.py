"""Flags of the Megatron family that ask for what megalm does anyway. Each note says why nothing is left to do."""

from __future__ import annotations

from megalm.config.flags import noop

NOOPS = (
    noop("--deepspeed", "DeepSpeed always does the distribution."),
    noop("--use-pytorch-profiler", "--profile always uses torch's profiler."),
    noop("--deepscale", "The older name of --deepspeed."),
    noop("--local_rank", "The launcher's environment variables say the same.", arity="1"),
    noop("--local-rank", "The launcher's environment variables say the same.", arity="1"),
    noop(
        "--abort-on-unmet-fused-kernel-constraints",
        "A kernel that is asked for by name and cannot run is always an error.",
    ),
    noop(
        "--no-query-key-layer-scaling",
        "Scores are scaled inside the product and normalised in fp32; layers need no scaling.",
    ),
    noop("--attention-softmax-in-fp32", "The attention softmax always computes in fp32."),
    noop("--no-masked-softmax-fusion", "There is one result for every kernel; output.attention names the kernel."),
    noop("--no-bias-dropout-fusion", "There is one result, fused or not."),
    noop(
        "--no-gradient-accumulation-fusion",
        "Gradients of bf16 weights are accumulated in fp32 by the engine.",
    ),
    noop(
        "--accumulate-allreduce-grads-in-fp32",
        "bf16 runs always accumulate gradients in fp32, and with ZeRO-0 and ZeRO-1 reduce them in it.",
    ),
    noop("--no-async-tensor-model-parallel-allreduce", "There is one result, asynchronous or not."),
    noop(
        "--sync-tp-duplicated-parameters",
        "Replicated parameters start bit-equal and get equal updates, as the tests check.",
    ),
    noop("--log-timers-to-tensorboard", "Step time and throughput are written whenever tensorboard_dir is set."),
    noop(
        "--log-batch-size-to-tensorboard",
        "Consumed samples are written at every logged step, which give the batch size.",
    ),
    noop("--log-validation-ppl-to-tensorboard", "Validation loss is written in nats; perplexity is its exponential."),
    noop("--log-learning-rate-to-tensorboard", "The learning rate is written whenever tensorboard_dir is set."),
    noop("--log-loss-scale-to-tensorboard", "The loss scale is written whenever there is one."),
    noop("--log-throughput", "Throughput is in every progress line."),
    noop("--exit-signal-handler", "SIGTERM and SIGINT always save and stop."),
    noop("--log-level-replica", "Ranks other than the first print errors only.", arity="1"),
    noop(
        "--data-impl",
        "Corpora are read through a memory map.",
        arity="1",
        allowed=("mmap", "infer"),
        remedy="tokenize the corpus again with tools/preprocess_data.py, which writes the mmap format",
    ),
    noop(
        "--dataloader-type",
        "Samples are read once, in the order of consumed samples.",
        arity="1",
        allowed=("single",),
        remedy="leave the flag out, or pass single",
    ),
    noop(
        "--DDP-impl",
        "Gradients are averaged by DeepSpeed.",
        arity="1",
        allowed=("local", "torch"),
        remedy="leave the flag out",
    ),
    noop(
        "--recompute-method",
        "With --recompute-granularity full every block is recomputed by itself.",
        arity="1",
        allowed=("uniform",),
        remedy="pass uniform, with --recompute-num-layers 1",
    ),
    noop(
        "--recompute-num-layers",
        "With --recompute-granularity full every block is recomputed by itself.",
        arity="1",
        allowed=("1",),
        remedy="pass 1, or leave the flag out",
    ),
    noop(
        "--checkpoint-num-layers",
        "Every block is recomputed by itself.",
        arity="1",
        allowed=("1",),
        remedy="pass 1, or leave the flag out",
    ),
    noop(
        "--activations-checkpoint-method",
        "Every block is recomputed by itself.",
        arity="1",
        allowed=("uniform",),
        remedy="pass uniform, or leave the flag out",
    ),
    noop(
        "--lr-warmup-init",
        "Warm-up starts at 0.",
        arity="1",
        allowed=("0", "0.0"),
        remedy="pass 0, or leave the flag out",
    ),
    noop("--normalization", "Every norm is a LayerNorm.", arity="1", allowed=("LayerNorm",), remedy="pass LayerNorm"),
    noop("--transformer-impl", "The blocks are megalm's own.", arity="1", allowed=("local",), remedy="pass local"),
    noop(
        "--ckpt-format",
        "Checkpoints have the DeepSpeed layout.",
        arity="1",
        allowed=("torch",),
        remedy="leave the flag out",
    ),
)
