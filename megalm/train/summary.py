"""What a run came to: its last losses against the unigram entropy of the tokens that validation predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megalm.config.root import Config
from megalm.data.build import build_datasets
from megalm.data.entropy import predicted_tokens, unigram_entropy
from megalm.errors import DataError
from megalm.telemetry.metric_log import read_metric_log


@dataclass(frozen=True)
class Validation:
    """One validation set at the end of a run. Units: nats per token."""

    step: int
    loss: float
    unigram_entropy: float

    @property
    def margin(self) -> float:
        """How far the loss lies below what token frequencies alone allow."""
        return self.unigram_entropy - self.loss


@dataclass(frozen=True)
class Resume:
    """A step that the run continued from, and the training losses on both sides of it."""

    step: int
    loss_before: float | None
    loss_after: float | None


@dataclass(frozen=True)
class Summary:
    """A whole run as its metrics file tells it."""

    steps: int
    tokens: int
    step_seconds: float
    data_seconds: float
    """What of the steps' time the first rank waited for batches."""
    train_loss: float
    validation: Mapping[str, Validation]
    resumes: tuple[Resume, ...]

    @property
    def data_share(self) -> float:
        """Share of the steps' time that was spent waiting for batches."""
        return self.data_seconds / self.step_seconds

    @property
    def tokens_per_second(self) -> float:
        """Speed of training, without validation, saving and start-up."""
        return self.tokens / self.step_seconds


def validation_entropies(config: Config, *, dp_size: int) -> dict[str, float]:
    """Unigram entropy of the tokens that each validation of this configuration predicts, by set.

    Units: nats per token. Raises: DataError if a corpus cannot be read.
    """
    num_samples = config.training.eval_iters * config.global_batch_size(dp_size=dp_size)
    datasets = build_datasets(
        config.data, num_samples={"valid": num_samples}, seed=config.training.seed, verifies=False
    )
    return {name: unigram_entropy(predicted_tokens(source, num_samples)) for name, source in datasets.valid.items()}


def summarise(metrics_path: str | Path, entropies: Mapping[str, float]) -> Summary:
    """Condense a metrics file; `entropies` holds the unigram entropy of each validation set.

    Raises: DataError if the file is missing or damaged, or holds no training step or no validation.
    """
    train: dict[int, dict[str, float]] = {}
    valid: dict[str, tuple[int, float]] = {}
    resumed: list[int] = []
    for record in read_metric_log(metrics_path):
        if record["kind"] == "train":
            train[record["step"]] = record
        elif record["kind"] == "valid" and record["name"] in entropies:
            valid[record["name"]] = (record["step"], record["loss"])
        elif record["kind"] == "resume":
            resumed.append(record["step"])
    missing = sorted(set(entropies) - set(valid))
    if not train or missing:
        raise DataError(
            f"{metrics_path} holds {len(train)} training steps and no validation of {', '.join(missing) or 'any set'}\n"
            "  train at least one step, with --eval-interval above 0"
        )
    last = max(train)
    return Summary(
        steps=last,
        tokens=int(train[last]["consumed_tokens"]),
        step_seconds=sum(record["step_seconds"] for record in train.values()),
        data_seconds=sum(record.get("data_seconds") or 0.0 for record in train.values()),
        train_loss=train[last]["loss"],
        validation={name: Validation(*valid[name], unigram_entropy=entropies[name]) for name in entropies},
        resumes=tuple(Resume(step, _loss(train, step), _loss(train, step + 1)) for step in resumed),
    )


def _loss(train: Mapping[int, Mapping[str, float]], step: int) -> float | None:
    return train[step]["loss"] if step in train else None
