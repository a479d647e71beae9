"""What a run reads: its corpora, the batches of training, and those of its evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from megalm.checkpoint.run_tokenizer import tokenizer_facts
from megalm.data.batches import Batch
from megalm.data.build import Datasets
from megalm.data.loader import batch_iterator
from megalm.data.source import SampleSource
from megalm.errors import DataError
from megalm.topology.topology import Topology
from megalm.train.evaluation import Evaluator
from megalm.train.prepare import Plan
from megalm.train.samples import datasets_of_run


def open_datasets(plan: Plan, *, verifies: bool, log: Callable[[str], None]) -> Datasets:
    """Corpora and sample maps of every split; does not communicate. A rank of each host `verifies`."""
    datasets = datasets_of_run(
        plan.config,
        dp_size=plan.dp_size,
        vocab_size=plan.config.model.padded_vocab_size,
        tokenizer=tokenizer_facts(plan.tokenizer),
        verifies=verifies,
        log=log,
    )
    if datasets.train is None and not plan.config.training.eval_only:
        raise DataError(
            f"data.split = {plan.config.data.split!r} leaves no sequence to train on\n"
            "  give training a larger share with --split, or a larger corpus"
        )
    return datasets


def evaluator(plan: Plan, topology: Topology, sources: Mapping[str, SampleSource]) -> Evaluator:
    training = plan.config.training
    final = plan.config.global_batch_size(dp_size=topology.dp.size)
    return Evaluator(
        sources={
            name: partial(feed, plan, topology, source, consumed_samples=0, evaluating=True)
            for name, source in sources.items()
        },
        num_micro_batches=training.eval_iters * final // (training.micro_batch_size * topology.dp.size),
    )


def feed(
    plan: Plan, topology: Topology, source: SampleSource | None, *, consumed_samples: int, evaluating: bool = False
) -> Iterator[Batch]:
    """This rank's micro-batches; stages in the middle of the pipeline read nothing."""
    if source is None or not topology.reads_data:
        return iter(())
    data, training = plan.config.data, plan.config.training
    workers = data.num_workers
    if evaluating and data.valid_num_workers is not None:
        workers = data.valid_num_workers
    return batch_iterator(
        source,
        consumed_samples=consumed_samples,
        micro_batch_size=training.micro_batch_size,
        dp_rank=topology.dp.rank,
        dp_size=topology.dp.size,
        num_workers=workers,
        masked_eod_id=plan.end_of_document if data.eod_mask_loss else None,
        pinned_for=topology.device,
    )
