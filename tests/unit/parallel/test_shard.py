"""Which part of a tensor one rank holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megalm.errors import ConfigError
from megalm.parallel.shard import mark_replicated, mark_sharded, partition_dim, shard_size
from megalm.topology.group import Group


def test_shard_size_is_the_quotient() -> None:
    assert shard_size(12, Group(1, 4, None, (0, 1, 2, 3)), what="num_heads") == 3


def test_size_that_does_not_divide_is_refused_with_the_sizes_that_do() -> None:
    with pytest.raises(ConfigError, match=r"num_heads = 28 .* size 8\n.*1, 2, 4, 7, 14, 28"):
        shard_size(28, Group(0, 8, None, tuple(range(8))), what="num_heads")


def test_marks_are_the_attributes_that_deepspeed_reads() -> None:
    sharded = mark_sharded(nn.Parameter(torch.empty(2, 2)), dim=1)
    replicated = mark_replicated(nn.Parameter(torch.empty(2)))
    assert sharded.tensor_model_parallel is True  # type: ignore[attr-defined]
    assert replicated.tensor_model_parallel is False  # type: ignore[attr-defined]
    assert (partition_dim(sharded), partition_dim(replicated)) == (1, None)
