"""Flags of the Megatron family that ask for what megalm does anyway. Each note says why nothing is left to do."""

from __future__ import annotations

from megalm.config.flag_refusals import TELEMETRY
from megalm.config.flags import NEGATIONS, Unless, noop

SUMMED_IN_FP16 = Unless("training.dtype", "fp16", "fp16 gradients are summed in fp16", "remove it, or pass --bf16")

NOOPS = (
    noop("--deepspeed", "DeepSpeed always does the distribution."),
    noop("--use-pytorch-profiler", "--profile always uses torch's profiler."),
    noop("--use-mcore-models", "There is one implementation of each model."),
    noop("--use-legacy-models", "There is one implementation of each model."),
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
        unless=SUMMED_IN_FP16,
    ),
    noop(
        "--calculate-per-token-loss",
        "Every micro-batch has as many tokens where none is masked.",
        unless=Unless(
            "data.eod_mask_loss",
            True,
            "micro-batches weigh the same, however many of their tokens are masked",
            "remove it, or --eod-mask-loss",
        ),
    ),
    noop("--cross-entropy-loss-fusion", "There is one result for every kernel; output.head names the kernel."),
    noop(
        "--cross-entropy-fusion-impl",
        "There is one result for every kernel; output.head names the kernel.",
        arity="1",
        allowed=("native", "te"),
        remedy="leave the flag out",
    ),
    noop("--no-bias-swiglu-fusion", "There is one result, fused or not."),
    noop("--no-rope-fusion", "There are no rotary positions."),
    noop("--no-persist-layer-norm", "There is one result for every kernel; output.layer_norm names the kernel."),
    noop("--disable-mem-efficient-ln", "There is one result for every kernel; output.layer_norm names the kernel."),
    noop("--torch_adam", "The optimizer is AdamW, whatever computes it; output.adamw names the kernel."),
    noop("--ds_fused_adam", "The optimizer is AdamW, whatever computes it; output.adamw names the kernel."),
    noop("--no-async-tensor-model-parallel-allreduce", "There is one result, asynchronous or not."),
    noop("--no-overlap-p2p-communication", "There is one result, asynchronous or not."),
    noop("--no-delay-grad-reduce", "There is one result, whenever gradients are reduced."),
    *(noop(f"{no}align-grad-reduce", "There is one result, whenever gradients are reduced.") for no in NEGATIONS),
    noop("--no-align-param-gather", "There is one result, whenever parameters are gathered."),
    noop("--disable-gloo-process-groups", "On GPUs every group is NCCL's."),
    noop("--use-contiguous-parameters-in-local-ddp", "There is one result, wherever weights lie."),
    noop("--no-contiguous-buffers-in-local-ddp", "There is one result, wherever gradients lie."),
    *(noop(f"{no}clone-scatter-output-in-embedding", "There is one result, copied or not.") for no in NEGATIONS),
    noop(
        "--sync-tp-duplicated-parameters",
        "Replicated parameters start bit-equal and get equal updates, as the tests check.",
    ),
    noop("--log-timers-to-tensorboard", "Step time and throughput are written whenever tensorboard_dir is set."),
    noop(
        "--log-batch-size-to-tensorboard",
        "batch-size/batch-size is written whenever tensorboard_dir is set.",
    ),
    noop("--log-validation-ppl-to-tensorboard", "lm loss validation ppl is written whenever tensorboard_dir is set."),
    noop("--log-learning-rate-to-tensorboard", "The learning rate is written whenever tensorboard_dir is set."),
    noop("--log-loss-scale-to-tensorboard", "The loss scale is written whenever there is one."),
    noop("--no-log-learning-rate-to-tensorboard", "One more scalar in an event file is no harm: it is written."),
    noop("--no-log-learnig-rate-to-tensorboard", "One more scalar in an event file is no harm: it is written."),
    noop("--disable-log-loss-scale-to-tensorboard", "One more scalar in an event file is no harm: it is written."),
    noop("--no-log-loss-scale-to-tensorboard", "One more scalar in an event file is no harm: it is written."),
    noop("--no-barrier-with-level-1-timing", "No process waits for others to measure times."),
    noop(
        "--timing-log-level",
        "Step time is measured as a whole.",
        arity="1",
        allowed=("0",),
        remedy=TELEMETRY,
    ),
    noop("--no-mmap-bin-files", "There is one result, mapped or not."),
    noop("--num-dataset-builder-threads", "There is one result, whoever builds the sample maps.", arity="1"),
    noop(
        "--mid-level-dataset-surplus",
        "A blended corpus is asked for 0.5 % more samples than its share.",
        arity="1",
        allowed=("0.005",),
        remedy="leave the flag out",
    ),
    noop("--disable-msc", "Corpora and checkpoints are files."),
    noop("--mmap-warmup", "Linux reads a corpus ahead as it is mapped."),
    noop("--use-cpu-initialization", "Initial weights do not depend on the device or the layout."),
    noop("--lazy-mpu-init", "The processes join before the model is built.", arity="?"),
    noop("--use-contiguous-buffers-in-ddp", "Gradients lie in buffers of the engine."),
    noop("--no-scatter-gather-tensors-in-pipeline", "There is one result, whatever is sent between stages."),
    noop("--zero-contigious-gradients", 'The engine decides; "contiguous_gradients" is a key of the DeepSpeed JSON.'),
    noop("--zero-reduce-scatter", 'The engine decides; "reduce_scatter" is a key of the DeepSpeed JSON.'),
    noop("--use-pin-memory", "Batches are pinned where a GPU reads them."),
    noop("--bert-no-binary-head", "There is no BERT."),
    noop("--short-seq-prob", "There is no BERT.", arity="1"),
    noop("--mask-prob", "There is no BERT.", arity="1"),
    noop(
        "--no-pipeline-parallel",
        "Without --pipeline-model-parallel-size there is one stage.",
    ),
    noop(
        "--vocab-extra-ids",
        "There are no sentinel tokens.",
        arity="1",
        allowed=("0",),
        remedy="remove it; sentinels of T5 are tokens of the tokenizer's files",
    ),
    noop(
        "--sample-rate",
        "Every sample is read.",
        arity="1",
        allowed=("1", "1.0"),
        remedy="remove it",
    ),
    noop(
        "--remote-device",
        "Parameters stay on the device.",
        arity="1",
        allowed=("none",),
        remedy='use {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}} in the DeepSpeed JSON',
    ),
    noop("--log-throughput", "Throughput is in every progress line."),
    noop("--exit-signal-handler", "SIGTERM and SIGINT always save and stop."),
    noop("--exit-signal-handler-for-training", "SIGTERM and SIGINT always save and stop."),
    noop("--exit-signal-handler-for-dataloader", "Samples are read by threads, which stop with their process."),
    noop(
        "--exit-signal",
        "SIGTERM, SIGINT and SIGUSR1 always save and stop.",
        arity="1",
        allowed=("SIGTERM", "SIGINT", "SIGUSR1"),
        remedy="have the scheduler send SIGTERM or SIGUSR1",
    ),
    noop(
        "--rerun-mode",
        "No step is computed again.",
        arity="1",
        allowed=("disabled",),
        remedy="pass disabled, or leave the flag out",
    ),
    noop("--no-one-logger", "There is no one-logger."),
    noop("--verify-integrity", "Checkpoints are always hashed as they are saved, and checked as they are loaded."),
    noop("--auto-detect-ckpt-format", "A checkpoint says itself which form it has."),
    *(
        noop(f"{no}use-tokenizer-model-from-checkpoint-args", "A checkpoint never changes the configuration.")
        for no in NEGATIONS
    ),
    noop("--te-rng-tracker", "Dropout draws from streams of megalm's own."),
    noop(
        "--log-level-replica",
        "Ranks other than the first print errors only.",
        arity="1",
        allowed=("error", "critical"),
        remedy="pass error, or leave the flag out",
    ),
    noop(
        "--deepspeed-activation-checkpointing",
        "--checkpoint-activations and --recompute-granularity decide what is recomputed.",
    ),
    noop(
        "--attention-backend",
        "The attention core is chosen by what the model needs.",
        arity="1",
        allowed=("auto",),
        remedy="pass --attention-kernel sdpa, or leave the flag out",
    ),
    noop(
        "--async-tensor-model-parallel-allreduce",
        "Gradients of a layer's input always travel while its weight's gradient is computed.",
    ),
    noop("--no-create-attention-mask-in-dataloader", "The loader never makes attention masks."),
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
        "--recompute-modules",
        "With --recompute-granularity selective the attention core is recomputed.",
        arity="+",
        allowed=("core_attn",),
        remedy="pass core_attn, or --recompute-granularity activation for the MLP's",
    ),
    noop(
        "--checkpoint-num-layers",
        "Every block is recomputed by itself.",
        arity="1",
        allowed=("1",),
        remedy="pass 1, or leave the flag out",
    ),
    noop(
        "--lr-warmup-init",
        "Warm-up starts at 0.",
        arity="1",
        allowed=("0", "0.0"),
        remedy="pass 0, or leave the flag out",
    ),
    noop(
        "--normalization",
        "Every norm is a LayerNorm.",
        arity="1",
        allowed=("LayerNorm", "layernorm"),
        remedy="pass LayerNorm",
    ),
    *(
        noop(
            name,
            "There are no mixtures of experts.",
            arity="1",
            allowed=("1",),
            remedy="remove it to train a dense model",
        )
        for name in ("--expert-model-parallel-size", "--expert-tensor-parallel-size", "--moe-expert-parallel-size")
    ),
    noop(
        "--num-experts",
        "There are no mixtures of experts.",
        arity="+",
        allowed=("1",),
        remedy="remove it to train a dense model",
    ),
    *(
        noop(
            name,
            "A sample is not split over processes in attention.",
            arity="1",
            allowed=("1",),
            remedy="remove it; --sequence-parallel saves activations",
        )
        for name in ("--context-parallel-size", "--ds-sequence-parallel-size")
    ),
    noop(
        "--softmax-type",
        "The softmax has no further term.",
        arity="1",
        allowed=("vanilla",),
        remedy="leave the flag out",
    ),
    noop(
        "--main-grads-dtype",
        "Gradients of bf16 and fp32 weights are summed in fp32.",
        arity="1",
        allowed=("fp32",),
        remedy="leave the flag out",
        unless=SUMMED_IN_FP16,
    ),
    *(
        noop(name, "AdamW's weights and moments are fp32.", arity="1", allowed=("fp32",), remedy="leave the flag out")
        for name in ("--main-params-dtype", "--exp-avg-dtype", "--exp-avg-sq-dtype")
    ),
    noop(
        "--fp8-recipe",
        "Each tensor has a scale of its own.",
        arity="1",
        allowed=("tensorwise",),
        remedy="pass tensorwise",
    ),
    *(
        noop(name, "A scale is the present tensor's.", arity="1", allowed=(default,), remedy="leave the flag out")
        for name, default in (("--fp8-margin", "0"), ("--fp8-interval", "1"))
    ),
    noop("--transformer-impl", "The blocks are megalm's own.", arity="1", allowed=("local",), remedy="pass local"),
    noop(
        "--ckpt-format",
        "Checkpoints have the DeepSpeed layout.",
        arity="1",
        allowed=("torch",),
        remedy="leave the flag out",
    ),
)
