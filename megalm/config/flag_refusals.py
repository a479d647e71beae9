"""Flags of the Megatron family that cannot be obeyed: why, and what to do instead."""

from __future__ import annotations

from megalm.config.flags import refused

TELEMETRY = "remove it; progress, metrics.jsonl, TensorBoard and W&B records carry throughput"

SHAPE = "remove it to train the BLOOM or GPT-2 shape"

OFFLOAD = 'use {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}'

REFUSALS = (
    # Durations in tokens.
    refused(
        "--train-tokens",
        "durations are counted in steps or samples, not tokens",
        "pass --train-samples, tokens / seq_length",
    ),
    refused(
        "--lr-decay-tokens",
        "the schedule counts steps or samples, not tokens",
        "pass --lr-decay-samples, tokens / seq_length",
    ),
    refused(
        "--lr-warmup-tokens",
        "the schedule counts steps or samples, not tokens",
        "pass --lr-warmup-samples, tokens / seq_length",
    ),
    refused("--warmup", "the old name is ambiguous", "pass --lr-warmup-fraction"),
    # The trained objective and the order of data.
    refused("--bitfit", "every parameter is trained, not the biases alone", "remove it to train the whole model"),
    refused(
        "--loss-on-targets-only",
        "the loss covers every token; there are no input/target pairs",
        "remove it for language modelling",
    ),
    refused(
        "--norm-target-loss",
        "the loss is a plain mean over tokens; there are no input/target pairs",
        "remove it for language modelling",
    ),
    refused("--reweight-loss-based-on-position-frequency", "every position weighs the same", "remove it"),
    refused("--prefix-lm", "attention is causal over the whole sample", "remove it for causal language modelling"),
    refused("--data-sharding", "the order of samples does not depend on the layout", "remove it"),
    refused("--no-data-sharding", "the order of samples does not depend on the layout", "remove it"),
    refused("--curriculum-learning", "seq_length is the same in every step", "remove it"),
    refused(
        "--iterations-to-skip",
        "steps that are left out are ranges",
        "pass --skip-train-iteration-range N-N, once for each step",
    ),
    refused(
        "--mock-data",
        "there is no synthetic data set",
        "tokenize any text with tools/preprocess_data.py and pass --data-path",
    ),
    # The shape of the model.
    refused(
        "--swiglu", "it changes the default of --ffn-hidden-size", "pass --glu-activation swiglu and --ffn-hidden-size"
    ),
    refused("--squared-relu", "the activation is GELU", SHAPE),
    refused("--openai-gelu", "the tanh GELU is the default already, with the bias inside", "remove it"),
    refused("--onnx-safe", "there is no ONNX export", "remove it"),
    refused("--mup", "widths are not re-parameterised", "remove it and tune --lr and --init-method-std at this width"),
    refused("--mup-attn-mult", "widths are not re-parameterised", "remove it; attention is scaled by 1 / sqrt(d)"),
    refused("--mup-input-mult", "widths are not re-parameterised", "remove it; the embedding is not scaled"),
    refused("--mup-output-mult", "widths are not re-parameterised", "remove it; logits are not scaled"),
    refused("--apply-residual-connection-post-layernorm", "the residual is taken before each LayerNorm", SHAPE),
    refused("--group-query-attention", "every head has its own keys and values", SHAPE),
    refused("--num-query-groups", "every head has its own keys and values", SHAPE),
    refused("--num-key-value-heads", "every head has its own keys and values", SHAPE),
    refused(
        "--use-rotary-position-embeddings",
        "positions are alibi or learned",
        "pass --position-embedding-type alibi or absolute",
    ),
    refused("--rotary-percent", "positions are alibi or learned", "pass --position-embedding-type alibi or absolute"),
    refused(
        "--no-position-embedding", "positions are alibi or learned", "pass --position-embedding-type alibi or absolute"
    ),
    refused("--disable-bias-linear", "every linear layer has a bias", SHAPE),
    refused("--add-qkv-bias", "every linear layer has a bias already", "remove it"),
    refused("--apply-layernorm-1p", "LayerNorm weights start at one", SHAPE),
    # Arithmetic.
    refused(
        "--apply-query-key-layer-scaling",
        "scores are not divided by the layer's number",
        "remove it; the softmax is fp32 anyway",
    ),
    refused("--fp16-lm-cross-entropy", "the cross-entropy computes in fp32", "remove it"),
    refused("--fp32-residual-connection", "the residual stream has the training dtype", "remove it, or train in fp32"),
    refused("--init-method-xavier-uniform", "initial weights are normal", "remove it and pass --init-method-std"),
    refused("--use-bnb-optimizer", "there is no 8-bit Adam", "remove it for AdamW; --zero-stage 1 shards its state"),
    refused("--sgd-momentum", "the optimizer is AdamW", "remove it"),
    refused("--cpu-optimizer", "set it in the DeepSpeed JSON", OFFLOAD),
    refused("--cpu_torch_adam", "set it in the DeepSpeed JSON", OFFLOAD),
    refused("--start-weight-decay", "weight decay is constant", "pass --weight-decay alone"),
    refused("--end-weight-decay", "weight decay is constant", "pass --weight-decay alone"),
    refused("--use-flash-attn", "attention cores are chosen by name", "pass --attention-kernel sdpa"),
    refused("--use-flash-attn-v2", "attention cores are chosen by name", "pass --attention-kernel sdpa"),
    # Layout and memory.
    refused("--model-parallel-size", "the old name is ambiguous", "pass --tensor-model-parallel-size"),
    refused("--batch-size", "the old name is ambiguous", "pass --micro-batch-size"),
    refused("--num-layers-per-virtual-pipeline-stage", "a stage holds one run of layers", "remove it"),
    refused("--use-distributed-optimizer", "optimizer state is sharded by ZeRO", "pass --zero-stage 1"),
    refused(
        "--partition-activations",
        "saved activations are not re-partitioned",
        "remove it; --sequence-parallel splits what is saved",
    ),
    refused(
        "--distribute-checkpointed-activations",
        "saved activations are not re-partitioned",
        "remove it; use --sequence-parallel",
    ),
    refused(
        "--distribute-saved-activations",
        "saved activations are not re-partitioned",
        "remove it; use --sequence-parallel",
    ),
    refused("--checkpoint-in-cpu", "saved activations stay on the device", "remove it; use --sequence-parallel"),
    refused("--synchronize-each-layer", "there is nothing to synchronise between layers", "remove it"),
    refused("--contigious-checkpointing", "saved activations are not copied together", "remove it"),
    refused("--profile-backward", "there is no such profile", "pass --profile"),
    refused("--profile_steps", "first and last step have a flag each", "pass --profile-step-start, --profile-step-end"),
    refused("--profile-ranks", "every rank of the first data-parallel replica is profiled", "remove it"),
    refused("--scattered-embeddings", "activations are split along the sequence", "pass --sequence-parallel"),
    refused("--split-transformers", "activations are split along the sequence", "pass --sequence-parallel"),
    *(
        refused(f"--zero-{name}-bucket-size", "set it in the DeepSpeed JSON", f'"zero_optimization": {{"{key}": N}}')
        for name, key in (("reduce", "reduce_bucket_size"), ("allgather", "allgather_bucket_size"))
    ),
    refused("--memory-centric-tiled-linear", "linear layers are not tiled", "remove it; --zero-stage 3 shards them"),
    refused("--tile-factor", "linear layers are not tiled", "remove it; --zero-stage 3 shards them"),
    refused(
        "--deepspeed_mpi", "ranks come from the launcher's environment, not from MPI", "launch with launch/deepspeed.sh"
    ),
    refused(
        "--deepscale_mpi", "ranks come from the launcher's environment, not from MPI", "launch with launch/deepspeed.sh"
    ),
    # Checkpoints.
    refused(
        "--use-checkpoint-args",
        "a checkpoint never changes the configuration",
        "pass --config FOLDER/global_stepN/config.yaml",
    ),
    refused(
        "--use-checkpoint-lr-scheduler",
        "a checkpoint never changes the schedule",
        "remove it and pass the schedule of FOLDER/global_stepN/config.yaml",
    ),
    refused(
        "--use-checkpoint-opt_param-scheduler",
        "a checkpoint never changes the schedule",
        "remove it and pass the schedule of FOLDER/global_stepN/config.yaml",
    ),
    refused(
        "--use-checkpoint-opt-param-scheduler",
        "a checkpoint never changes the schedule",
        "remove it and pass the schedule of FOLDER/global_stepN/config.yaml",
    ),
    refused(
        "--use-mp-args-from-checkpoint-args",
        "a checkpoint never changes the configuration",
        "remove it; a checkpoint loads into any layout",
    ),
    refused("--ckpt-step", "a checkpoint is named by its folder", "pass --load FOLDER/global_stepN"),
    refused("--load-tag", "a checkpoint is named by its folder", "pass --load FOLDER/global_stepN"),
    refused("--pretrained-checkpoint", "one folder is loaded from", "pass --load FOLDER --finetune"),
    refused(
        "--load-main-params-from-ckpt", "fp32 weights load with the optimizer's state", "remove it and --no-load-optim"
    ),
    refused("--no-load-lr-state", "the learning rate follows from the step", "remove it, or pass --reset-progress"),
    refused("--override-ckpt-iteration", "the step is the checkpoint's", "remove it, or pass --reset-progress"),
    refused("--reset-iteration", "steps and samples count together", "pass --reset-progress"),
    refused(
        "--save-retain-interval",
        "what stays is said by two flags",
        "pass --keep-every N, with --keep-last 1 to have only those and the newest",
    ),
    refused("--no-save-optim", "a checkpoint is always whole", "remove it; tools/export_hf.py writes weights alone"),
    refused("--no-save-rng", "a checkpoint is always whole", "remove it"),
    refused(
        "--from-weights",
        "weights alone are loaded from a checkpoint",
        "pass --load FOLDER --finetune; tools/import_hf.py makes FOLDER of a Hugging Face model",
    ),
    refused("--adlr-autoresume-interval", "there is no such service", "remove it; a signal saves and stops"),
    refused("--adlr-autoresume", "there is no such service", "remove it; a signal saves and stops"),
    # Beside training.
    refused("--inference", "this program trains", "generate with tools/generate.py"),
    refused("--codecarbon-dir", "no emissions are recorded", "remove it, and run codecarbon beside the trainer"),
    refused("--yaml-cfg", "presets have sections of their own", "pass --config with a file as those in configs/"),
    refused("--wandb-entity", "W&B reads it from the environment", "remove it and set WANDB_ENTITY"),
    refused("--log-path", "logs go to the terminal", "remove it and append: 2>&1 | tee LOG_FILE"),
    refused("--log-world-size-to-tensorboard", "the world size does not change within a run", TELEMETRY),
    refused("--tensorboard-log-interval", "every sink follows --log-interval", "pass --log-interval"),
)
