"""How many samples a run draws of each split: sample maps depend on it, so that every tool must ask for the same."""

from __future__ import annotations

from collections.abc import Iterator

from megalm.config.root import Config
from megalm.data.build import Datasets, build_datasets
from megalm.train.schedule import BatchSize


def sample_counts(config: Config, *, dp_size: int) -> dict[str, int]:
    """Samples of training, validation and test, as `build_datasets` takes them."""
    training = config.training
    batch_size = BatchSize.from_config(training, dp_size=dp_size)
    total = training.train_samples or batch_size.samples_for(training.train_iters or 0)
    evaluated = training.eval_iters * batch_size.final if training.eval_interval or training.eval_only else 0
    return {"train": total + batch_size.final, "valid": evaluated, "test": evaluated}


def open_datasets(config: Config, *, dp_size: int) -> Datasets:
    """The sources of a run, as training opens them."""
    return build_datasets(config.data, num_samples=sample_counts(config, dp_size=dp_size), seed=config.training.seed)


def samples_of_steps(config: Config, first: int, last: int, *, dp_size: int) -> Iterator[tuple[int, range]]:
    """(step, its sample numbers) of steps `first` to `last`, counted from 1, through any ramp-up of the batch."""
    batch_size = BatchSize.from_config(config.training, dp_size=dp_size)
    consumed = batch_size.samples_for(first - 1)
    for step in range(first, last + 1):
        size = batch_size.at(consumed)
        yield step, range(consumed, consumed + size)
        consumed += size
