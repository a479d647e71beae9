"""What a run reads and writes beside its data: checkpoints, metrics, log lines."""

from __future__ import annotations

from dataclasses import dataclass

from megalm.config.option import option


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Checkpoints in and out, sinks of the metrics."""

    save: str | None = option(None, doc="Folder that receives checkpoints.")
    load: str | None = option(None, doc="Folder whose newest valid checkpoint the run continues from.")
    universal_checkpoint: bool = option(
        False,
        doc="Load the checkpoint that latest_universal names, which is in DeepSpeed's universal form. Without it one "
        "is taken where the folder has no other.",
    )
    save_interval: int | None = option(None, doc="Steps between checkpoints; only at the end when not given.")
    keep_last: int | None = option(
        None, doc="Newest checkpoints kept; all when not given. The last valid one always stays."
    )
    keep_every: int | None = option(
        None, doc="Checkpoints whose step is a multiple of this always stay, whatever keep_last says."
    )
    async_save: bool = option(
        False, doc="Write checkpoints while training goes on; a step waits for the copy to host memory alone."
    )
    on_save_failure: str = option(
        "stop",
        doc="When a checkpoint cannot be written: stop, or continue with those that there are. The one at the end of a "
        "run must succeed in either case.",
        choices=("stop", "continue"),
    )
    allow_fresh_start: bool = option(False, doc="Start from step 0 when load holds no valid checkpoint.")
    load_optim: bool = option(True, doc="Load optimizer state with the weights.")
    load_rng: bool = option(True, doc="Load the random-number states.")
    finetune: bool = option(False, doc="Load weights alone; step, samples, schedule and optimizer start anew.")
    reset_progress: bool = option(False, doc="Load weights and optimizer, but count steps and samples from 0.")
    override_lr_schedule: bool = option(
        False, doc="Continue although the schedule differs from the checkpoint's; refused otherwise."
    )

    log_interval: int = option(10, doc="Steps between progress lines.")
    straggler_interval: int = option(
        0,
        doc="Compare what each rank takes for a step by itself every so many steps, and name those that are slower "
        "than others of their stage. On GPUs their waits for data alone are seen. 0 compares nothing.",
    )
    metrics_path: str | None = option(
        None, doc="JSON-lines file of every logged metric; save/metrics.jsonl when not given."
    )
    tensorboard_dir: str | None = option(None, doc="Folder of TensorBoard events; none are written when not given.")
    tensorboard_queue_size: int = option(1000, doc="Events held before TensorBoard writes them.")
    wandb_project: str | None = option(
        None, doc="W&B project; nothing is sent or written when not given. A resumed run goes on in its W&B run."
    )
    wandb_name: str | None = option(None, doc="W&B run name.")
    wandb_mode: str = option(
        "offline", doc="offline writes records under save/wandb; online sends them.", choices=("offline", "online")
    )
    wandb_dir: str | None = option(None, doc="Folder of the W&B records; the save folder when not given.")
    plot: str | None = option(None, doc="PNG that receives the training and validation curve at the end.")
    log_level: str = option(
        "info",
        doc="Least severe message shown.",
        choices=("debug", "info", "warning", "error"),
        spellings={"passive": "info", "critical": "error"},
    )

    attention: str = option(
        "auto",
        doc="Attention core: auto, baddbmm (the reference), sdpa, triton (ALiBi and documents in the kernel; GPUs), "
        "flex (GPUs).",
    )
    layer_norm: str = option(
        "auto", doc="LayerNorm implementation: auto, reference (fp32 arithmetic), torch, triton, apex."
    )
    bias_gelu: str = option(
        "auto",
        doc="Bias-GeLU implementation: auto, jit, torch, triton. With a gated MLP auto, torch, triton; "
        "with --no-bias-gelu-fusion auto, torch.",
    )
    gelu_linear: str = option(
        "auto",
        doc="The MLP's products and its GELU: auto, separate (bias-GeLU between them), cublaslt (the GELU inside them; "
        "NVIDIA GPUs, 16 bits, one tensor-parallel rank), torch (the reference of that). auto tries cublaslt on Hopper "
        "and newer GPUs before the run, and takes it where it is faster; separate elsewhere.",
    )
    dropout_add: str = option(
        "auto",
        doc="Bias, dropout and addition to the residual stream: auto, torch, triton (Philox, no mask in memory).",
    )
    adamw: str = option(
        "auto",
        doc="AdamW in bf16 with ZeRO-0 or 1: auto, torch, triton (one pass over weights, moments and sums; GPUs). auto "
        "tries triton on Hopper and newer GPUs before the run, and takes it where it is faster; torch elsewhere.",
        choices=("auto", "torch", "triton"),
    )
    head: str = option(
        "auto",
        doc="Head and cross-entropy: auto, reference (the logits of all tokens in memory), chunked (some tokens at a "
        "time), triton (chunked, in fewer passes over the logits).",
    )
    linear: str = option(
        "auto",
        doc="Matrix products of the linear layers: auto, torch, onednn (fp32 on CPUs), fp32 (16-bit operands in fp32), "
        "fp8 (8-bit operands, e5m2 gradients), fp8_e4m3 (e4m3 gradients). auto never takes 8 bits.",
        choices=("auto", "torch", "onednn", "fp32", "fp8", "fp8_e4m3"),
    )
    compile: str = option(
        "auto",
        doc="Compile each block with torch.compile: on, off, or auto: on GPUs with Triton and a C compiler.",
        choices=("auto", "on", "off"),
    )
    cuda_graph: str = option(
        "auto",
        doc="Run forward and backward of a micro-batch as one CUDA graph: on, off, or auto: on a GPU that holds the "
        "whole model, in bf16, without dropout.",
        choices=("auto", "on", "off"),
    )

    profile: bool = option(
        False, doc="Profile some steps on the ranks of the first replica: a trace, and each kernel family's share."
    )
    profile_step_start: int = option(10, doc="First step that is profiled, counted from 1.")
    profile_step_end: int = option(12, doc="Last step that is profiled.")
    profile_dir: str | None = option(None, doc="Folder of the profiles; save/profile when not given, or profile.")
