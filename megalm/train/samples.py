"""How many samples a run draws of each split: sample maps depend on it, so that every tool must ask for the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from megalm.checkpoint.roll_backs import RollBack
from megalm.config.root import Config
from megalm.config.step_ranges import parse_step_ranges
from megalm.data.build import Datasets, build_datasets
from megalm.data.order_digest import order_digest
from megalm.data.same_tokenizer import TokenizerFacts
from megalm.data.source import SampleSource
from megalm.errors import ConfigError, DataError, listed
from megalm.train.schedule import BatchSize
from megalm.train.state import TrainState

TRAINING_SET = "the training set"


def sample_counts(config: Config, *, dp_size: int) -> dict[str, int]:
    """Samples of training, validation and test, as `build_datasets` takes them."""
    training = config.training
    batch_size = BatchSize.from_config(training, dp_size=dp_size)
    # What the steps of the run read, and no more: the order of samples depends on the number, and equals another
    # trainer's for the number that it asked for, train_samples or train_iters * global_batch_size.
    steps = batch_size.steps_of(training)
    evaluated = training.eval_iters * batch_size.final if training.eval_interval or training.eval_only else 0
    return {"train": batch_size.samples_for(steps), "valid": evaluated, "test": evaluated}


def datasets_of_run(
    config: Config,
    *,
    dp_size: int,
    vocab_size: int | None = None,
    tokenizer: TokenizerFacts | None = None,
    verifies: bool = True,
    log: Callable[[str], None] | None = None,
) -> Datasets:
    """The sources of a run, as training and the tools open them; all but `dp_size` as for `build_datasets`."""
    return build_datasets(
        config.data,
        num_samples=sample_counts(config, dp_size=dp_size),
        seed=config.training.seed,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        verifies=verifies,
        log=log,
    )


def sample_orders(datasets: Datasets) -> dict[str, str]:
    """`order_digest` of every set, by what messages call it."""
    sets = {} if datasets.train is None else {TRAINING_SET: datasets.train}
    for kind, named in (("validation set", datasets.valid), ("test set", datasets.test)):
        sets.update({f"the {kind} {name}": source for name, source in named.items()})
    return {name: order_digest(source) for name, source in sets.items()}


def check_same_samples(orders: Sequence[Mapping[str, str]]) -> None:
    """Whether every rank would read the same samples, by the `sample_orders` of all of them.

    Hosts may have corpora of their own. Where those differ the first stage would read tokens of one text and the last
    one labels of another, and no loss would tell.
    Raises: DataError, the same on every rank.
    """
    first = orders[0]
    others = [rank for rank, found in enumerate(orders) if found != first]
    if not others:
        return
    other = orders[others[0]]
    differing = [name for name in {**first, **other} if first.get(name) != other.get(name)]
    raise DataError(
        f"rank{'s' if len(others) > 1 else ''} {listed(others)} would read other samples than rank 0: "
        f"{listed(differing, 3)} of documents of other lengths\n"
        "  the corpora on their hosts are not those of the first one: copy .bin and .idx again, or name a folder that "
        "all hosts share"
    )


def check_samples_left(config: Config, source: SampleSource, state: TrainState, *, dp_size: int) -> None:
    """Whether the samples last to the end of a run that goes on from `state`, perhaps with another batch than before.

    Raises: ConfigError if they do not: the run would end in the middle, at a step that no sample is left for.
    """
    training = config.training
    batch_size = BatchSize.from_config(training, dp_size=dp_size)
    steps = batch_size.steps_of(training, step=state.step, consumed=state.consumed_samples)
    last = batch_size.samples_for(steps, consumed=state.consumed_samples)
    if last > len(source):
        raise ConfigError(
            f"the run would read {last:,} samples, of which {state.consumed_samples:,} are read already, and has "
            f"{len(source):,}\n"
            f"  training.global_batch_size = {batch_size.final}, and the checkpoint was trained with another\n"
            "  give the batch that it was trained with, or --train-samples with --override-lr-scheduler"
        )


def total_steps(config: Config, *, dp_size: int) -> int:
    """Steps of the whole run."""
    return BatchSize.from_config(config.training, dp_size=dp_size).steps_of(config.training)


def samples_of_steps(
    config: Config, first: int, last: int, *, dp_size: int, roll_backs: Sequence[RollBack] = ()
) -> Iterator[tuple[int, range]]:
    """(step, its sample numbers) of steps `first` to `last`, counted from 1, through any ramp-up of the batch.

    A step that --skip-train-iteration-range or one of `roll_backs` leaves out reads none of its samples: its range is
    empty.
    """
    batch_size = BatchSize.from_config(config.training, dp_size=dp_size)
    taken_back = (range(roll_back.first, roll_back.last + 1) for roll_back in roll_backs)
    left_out = (*parse_step_ranges(config.training.skip_train_iteration_range), *taken_back)
    consumed = batch_size.samples_for(first - 1)
    for step in range(first, last + 1):
        size = batch_size.at(consumed)
        is_left_out = any(step in steps for steps in left_out)
        yield step, range(consumed, consumed if is_left_out else consumed + size)
        consumed += size
