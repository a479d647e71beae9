"""The optimisation: batch, duration, precision, optimizer, schedule, evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from megalm.config.option import option

DTYPES = ("fp32", "bf16", "fp16")
DECAY_STYLES = ("constant", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything that decides the sequence of parameter updates, given the model and the data."""

    micro_batch_size: int = option(doc="Samples in one forward pass of one data-parallel replica.")
    global_batch_size: int | None = option(None, doc="Samples in one step; micro_batch_size * dp when not given.")
    rampup_batch_size: tuple[int, int, int] | None = option(
        None, doc="START INCREMENT SAMPLES: grow the global batch from START by INCREMENT over SAMPLES samples."
    )
    train_iters: int | None = option(None, doc="Steps to train. Excludes train_samples.")
    train_samples: int | None = option(None, doc="Samples to train. Excludes train_iters.")
    skip_train_iteration_range: tuple[str, ...] = option(
        (),
        doc="FIRST-LAST ...: steps that are counted, with their samples, but neither read nor trained on; both ends "
        "included. A save, an evaluation or a stop that falls on them is left out too. For data that made the loss "
        "jump.",
    )
    exit_interval: int | None = option(None, doc="Save and stop at the first step that is a multiple of this.")
    exit_duration_minutes: float | None = option(None, doc="Save and stop at the first step past this many minutes.")
    hang_timeout_minutes: float = option(
        10.0,
        doc="End the run, and report every rank's stacks, when no rank has got any further for so many minutes: no "
        "micro-batch, no megabyte of a save. A part of a run's start or end has 120 minutes if that is more. 0 does "
        "not watch.",
    )
    check_replicas_interval: int = option(
        100,
        doc="Steps between comparisons of the parameters that several ranks hold alike, which come before every save "
        "and at the end too. Where copies differ the run ends and they are not saved. 0 never compares.",
    )
    kill_switch_path: str | None = option(None, doc="Save and stop when this file exists.")
    seed: int = option(1234, doc="Seed of initial weights, sample order and dropout.")

    dtype: str = option("fp32", doc="Arithmetic of the forward and backward pass.", choices=DTYPES)
    loss_scale: float | None = option(None, doc="fp16: a fixed loss scale; dynamic when not given.")
    initial_loss_scale: float = option(2.0**32, doc="fp16: first dynamic loss scale.")
    min_loss_scale: float = option(1.0, doc="fp16: smallest dynamic loss scale.")
    loss_scale_window: int = option(1000, doc="fp16: steps without overflow before the scale doubles.")
    hysteresis: int = option(2, doc="fp16: overflows tolerated before the scale halves.")

    max_skipped_steps: int = option(
        10,
        doc="Stop when so many updates in a row were left out, as gradients were not finite; 0 goes on. In fp16 the "
        "least loss scale ends the run instead, unless --loss-scale fixes it.",
    )

    loss_spike_threshold: float = option(
        0.0,
        doc="A loss is too high when it exceeds the mean of the last loss_spike_window losses by more than so many of "
        "their standard deviations, and by 0.1 nats. After loss_spike_steps of them the run goes back to a checkpoint "
        "from before, and ends; started again, it leaves out the steps around the spike. 0 does not watch.",
    )
    loss_spike_window: int = option(
        100, doc="Losses that one is compared with, of the steps before; without so many none is too high."
    )
    loss_spike_steps: int = option(3, doc="Losses in a row that are too high before the run goes back.")
    loss_spike_margin: int = option(
        100,
        doc="Steps before the first loss that is too high, and after the last, that are left out with them. PaLM left "
        "out 200 to 500 in all.",
    )
    max_roll_backs: int = option(
        2,
        doc="Times that a run goes back for one spike after another, each within loss_spike_window steps of what was "
        "left out: one that comes again is not of the data, and ends the run.",
    )

    lr: float = option(doc="Peak learning rate.")
    min_lr: float = option(0.0, doc="Learning rate at the end of the decay, and ever after.")
    lr_decay_style: str = option("linear", doc="Shape of the decay after warm-up.", choices=DECAY_STYLES)
    lr_decay_iters: int | None = option(None, doc="Steps to decay over; train_iters when not given.")
    lr_decay_samples: int | None = option(None, doc="Samples to decay over; train_samples when not given.")
    lr_warmup_fraction: float | None = option(None, doc="Warm-up as a share of the decay.")
    lr_warmup_iters: int = option(0, doc="Steps of linear warm-up.")
    lr_warmup_samples: int = option(0, doc="Samples of linear warm-up.")

    optimizer: str = option("adamw", doc="adamw: Adam with decoupled weight decay.", choices=("adamw",))
    adam_beta1: float = option(0.9, doc="Decay of Adam's first moment.")
    adam_beta2: float = option(0.999, doc="Decay of Adam's second moment.")
    adam_eps: float = option(1e-8, doc="Added to the root of Adam's second moment.")
    weight_decay: float = option(0.01, doc="Decoupled weight decay of matrices; biases and LayerNorms have none.")
    clip_grad: float = option(1.0, doc="Largest global gradient norm; 0 does not clip.")

    z_loss_coeff: float = option(
        0.0,
        doc="Weight of the square of log(sum of exp(logits)), added to the training loss alone, against logits that "
        "drift away. PaLM took 1e-4.",
    )

    eval_interval: int = option(1000, doc="Steps between validations; 0 never validates.")
    eval_iters: int = option(100, doc="Global batches in one validation.")
    eval_only: bool = option(False, doc="Load, evaluate on the validation and test sets, and stop.")

    @property
    def by_samples(self) -> bool:
        """Whether duration and schedule count samples rather than steps."""
        return self.train_samples is not None
