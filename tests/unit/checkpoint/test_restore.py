"""What a rank reads of the optimizer states that other tensor-parallel sizes have written."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from megalm.checkpoint.optimizer_files import MASTER, MOMENTS, Pieces
from megalm.checkpoint.restore import Restorer
from megalm.checkpoint.source import open_checkpoint
from megalm.checkpoint.split import shard
from megalm.models.gpt.weights import weight_table
from megalm.topology.group import Group
from tests.support.bigscience import write_bigscience
from tests.support.checkpoints import bloom_config


@pytest.mark.parametrize("tp_size", [1, 4])
def test_a_rank_reads_the_rows_that_it_keeps_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tp_size: int
) -> None:
    """Of BLOOM-176B a stage has 176 GB of them, and one of its 64 ranks keeps 2.8."""
    truth = write_bigscience(tmp_path / "global_step7", bloom_config())
    source = open_checkpoint(tmp_path / "global_step7")
    files = source.optimizer()
    touched: list[int] = []
    take = Pieces.range

    def counted(pieces: Pieces, start: int, stop: int) -> torch.Tensor:
        touched.append(stop - start)
        return take(pieces, start, stop)

    monkeypatch.setattr(Pieces, "range", counted)
    numbers = random.Random(tp_size)
    cut = [weight for weight in weight_table(source.shape) if weight.partition_dim is not None]
    assert {weight.partition_dim for weight in cut} == {0, 1}
    for rank in range(tp_size):
        tp = Group(rank=rank, size=tp_size, handle=None, ranks=tuple(range(tp_size)))
        restorer = Restorer(None, source.layers, files, tp=tp, seed=1)
        for weight in cut:
            row = weight.numel // weight.shape[0]
            local = weight.numel // tp_size
            start, stop = sorted(numbers.sample(range(local + 1), 2))
            for key in (MASTER, *MOMENTS):
                touched.clear()
                part = restorer._owned_of_others_shards(files, weight, key, range(start, stop))
                whole = shard(weight, truth[weight.name][key], tp_rank=rank, tp_size=tp_size)
                assert torch.equal(part, whole.reshape(-1)[start:stop]), (weight.name, key)
                wider = tp_size if weight.partition_dim == 1 else 1
                assert sum(touched) <= (stop - start) * wider + 2 * row
