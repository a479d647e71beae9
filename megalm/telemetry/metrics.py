"""Where the metrics of a run go: the console, a JSON-lines file, TensorBoard, W&B. One protocol for all."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megalm.errors import ConfigError
from megalm.telemetry.console import Console
from megalm.telemetry.event_files import take_back
from megalm.telemetry.metric_log import MetricLog
from megalm.telemetry.progress import perplexity, progress_line, validation_line
from megalm.telemetry.step_metrics import StepMetrics as StepMetrics


class Sink(Protocol):
    """Receives every step and every validation; made on the first rank alone."""

    def log_step(self, m: StepMetrics) -> None: ...

    def log_validation(self, step: int, consumed_samples: int, name: str, loss: float) -> None: ...

    def close(self) -> None: ...


class ConsoleSink:
    """The live progress line. It stays in the log at the first step, every `log_interval` steps and the last one."""

    def __init__(self, console: Console, *, log_interval: int = 10) -> None:
        self._console = console
        self._log_interval = log_interval
        self._is_first = True

    def log_step(self, m: StepMetrics) -> None:
        keep = self._is_first or m.step % self._log_interval == 0 or m.step == m.total_steps or m.skipped
        self._is_first = False
        self._console.progress(progress_line(m), keep=keep)

    def log_validation(self, step: int, consumed_samples: int, name: str, loss: float) -> None:
        self._console.info(validation_line(step, name, loss))

    def close(self) -> None:
        pass


class JsonlSink:
    """Every step and validation as one JSON object a line; see `metric_log` for the records."""

    def __init__(
        self, path: str | Path, *, resume_step: int | None = None, warn: Callable[[str], None] = print
    ) -> None:
        """With `resume_step`, what an earlier run wrote past that step leaves the file.

        Raises: ConfigError if the file cannot be written.
        """
        self._log = MetricLog(path, resume_step=resume_step, warn=warn)

    def log_step(self, m: StepMetrics) -> None:
        self._log.append({"kind": "train", **dataclasses.asdict(m)})

    def log_validation(self, step: int, consumed_samples: int, name: str, loss: float) -> None:
        self._log.append(
            {"kind": "valid", "step": step, "consumed_samples": consumed_samples, "name": name, "loss": loss}
        )

    def close(self) -> None:
        self._log.close()


LOSS = "lm-loss-"
TRAINING_LOSS = f"{LOSS}training/lm loss"
VALIDATION = f"{LOSS}validation/"
BY_SAMPLES, BY_TOKENS = " vs samples", " vs tokens"
"""Ends of tags: what x is, where it is not steps."""


class TensorBoardSink:
    """TensorBoard scalars under the tags that BLOOM's published logs have, so that runs can be laid over each other.

    Each quantity is drawn against steps, and again against samples (`... vs samples`) and tokens (`... vs tokens`).
    """

    def __init__(self, folder: str | Path, queue_size: int = 1000, *, resume_step: int | None = None) -> None:
        """With `resume_step`, what an earlier run wrote past that step is first moved out of TensorBoard's sight.

        Raises: ConfigError if the tensorboard package is missing or the folder cannot be written.
        """
        tensorboard = _import("torch.utils.tensorboard", package="tensorboard", asked_by="--tensorboard-dir")
        try:
            if resume_step:
                take_back(Path(folder), resume_step, counts_steps=_counts_steps, word=LOSS)
            self._writer = tensorboard.SummaryWriter(log_dir=str(folder), max_queue=queue_size)
        except OSError as failure:
            raise ConfigError(
                f"the TensorBoard folder {folder} cannot be written: {failure.strerror}\n"
                "  set by --tensorboard-dir; name a writable folder"
            ) from failure
        self._consumed_tokens: int | None = None

    def log_step(self, m: StepMetrics) -> None:
        self._consumed_tokens = m.consumed_tokens
        self._add(TRAINING_LOSS, m.loss, m.step, m.consumed_samples)
        self._add("learning-rate/learning-rate", m.lr, m.step, m.consumed_samples)
        if m.grad_norm is not None:
            self._add("grad-norm/grad-norm", m.grad_norm, m.step, m.consumed_samples)
        if m.loss_scale is not None:
            self._add("loss-scale/loss-scale", m.loss_scale, m.step, m.consumed_samples)
        if m.global_batch_size is not None:
            self._add("batch-size/batch-size", m.global_batch_size, m.step, m.consumed_samples)
        self._add("iteration-time/iteration-time", m.step_seconds, m.step, m.consumed_samples)
        add = self._writer.add_scalar
        add("iteration-time/tokens per second", m.tokens_per_second, m.step)
        add("iteration-time/TFLOP per second and process", m.tflops, m.step)
        add("steps-vs-samples/y=steps,x=samples", m.step, m.consumed_samples)
        add("steps-vs-samples/y=samples,x=steps", m.consumed_samples, m.step)
        add("steps-vs-tokens/y=steps,x=tokens", m.step, m.consumed_tokens)
        add("steps-vs-tokens/y=tokens,x=steps", m.consumed_tokens, m.step)

    def log_validation(self, step: int, consumed_samples: int, name: str, loss: float) -> None:
        # BLOOM puts a named validation set in a folder of its own, and the only set directly under the heading.
        split = "test" if name == "test" else "validation"
        group = "" if name in ("valid", "test") else f"{name}/"
        tag = f"{VALIDATION}{group}lm loss {split}"
        self._add(tag, loss, step, consumed_samples)
        self._add(f"{tag} ppl", perplexity(loss), step, consumed_samples)

    def close(self) -> None:
        self._writer.close()

    def _add(self, tag: str, value: float, step: int, consumed_samples: int) -> None:
        self._writer.add_scalar(tag, value, step)
        self._writer.add_scalar(f"{tag}{BY_SAMPLES}", value, consumed_samples)
        if self._consumed_tokens is not None:
            self._writer.add_scalar(f"{tag}{BY_TOKENS}", value, self._consumed_tokens)


def _counts_steps(tag: str) -> bool:
    """Whether a tag is one that begins a step or a validation."""
    return tag == TRAINING_LOSS or (tag.startswith(VALIDATION) and not tag.endswith((BY_SAMPLES, BY_TOKENS)))


class WandbSink:
    """A W&B run; offline it is a record in a folder, which `wandb sync` can send later.

    The folder keeps the run's id, so that a resumed training goes on in the same W&B run (offline: in a second record
    of it). WANDB_RUN_ID decides instead where it is set.
    """

    def __init__(
        self,
        project: str,
        name: str | None,
        *,
        mode: str,
        folder: str | Path,
        config: Mapping[str, Any],
        resumed: bool = False,
    ) -> None:
        """Raises: ConfigError if the wandb package is missing or does not start."""
        wandb = _import("wandb", package="wandb", asked_by="--wandb-project")
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            # The console is ours: wandb neither captures it nor adds its own lines.
            settings = wandb.Settings(console="off", silent=True)
            self._run = wandb.init(
                project=project,
                name=name,
                mode=mode,
                dir=str(folder),
                config=dict(config),
                settings=settings,
                id=None if "WANDB_RUN_ID" in os.environ else _run_id(Path(folder) / "wandb_run_id", resumed=resumed),
                resume="allow" if resumed and mode == "online" else None,
            )
        except (OSError, wandb.Error) as failure:
            raise ConfigError(
                f"the W&B run {project}/{name or '(unnamed)'} does not start: {failure}\n"
                f"  set by --wandb-project, in {folder}; --wandb-mode offline needs no account and no network"
            ) from failure

    def log_step(self, m: StepMetrics) -> None:
        named = {f"train/{key}": value for key, value in dataclasses.asdict(m).items() if value is not None}
        for derived in ("step", "total_steps", "eta_seconds"):
            named.pop(f"train/{derived}")
        self._run.log(named, step=m.step)

    def log_validation(self, step: int, consumed_samples: int, name: str, loss: float) -> None:
        heading = name if name in ("valid", "test") else f"valid/{name}"
        self._run.log({f"{heading}/loss": loss, f"{heading}/perplexity": perplexity(loss)}, step=step)

    def close(self) -> None:
        self._run.finish()


def _run_id(path: Path, *, resumed: bool) -> str:
    """The id that the file holds, for a training that goes on; otherwise a new one, kept there.

    Raises: OSError if the file cannot be written.
    """
    with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
        kept = path.read_text(encoding="utf-8").strip()
        if resumed and kept.isalnum():
            return kept
    new = secrets.token_hex(4)
    path.write_text(f"{new}\n", encoding="utf-8")
    return new


def _import(module: str, *, package: str, asked_by: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as failure:
        raise ConfigError(
            f"{asked_by} needs the package {package}, which cannot be imported: {failure}\n"
            f"  pip install 'megalm[tracking]', or leave {asked_by} out"
        ) from failure
