"""What each rank runs for `test_parallel_layers`: a column-parallel layer's backward, with all it does written down."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.kernels.linear.torch_native import TorchLinear
from megalm.parallel import collectives
from megalm.parallel.linear import ColumnParallelLinear
from megalm.topology.group import Group


class RecordedLinear(TorchLinear):
    """torch's products, which say when they are computed."""

    name = "recorded"

    def __init__(self, events: list[str]) -> None:
        self._events = events

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        self._events.append("input gradient")
        return super().input_gradient(grad, weight)

    def weight_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        self._events.append("weight gradient")
        return super().weight_gradient(grad, x)


class RecordedWork:
    """A collective under way, which says when somebody waits for it."""

    def __init__(self, work: Any, name: str, events: list[str]) -> None:
        self._work, self._name, self._events = work, name, events

    def wait(self) -> None:
        self._events.append(f"{self._name} is waited for")
        self._work.wait()


def backward_events(tp: Group, *, sequence_parallel: bool) -> list[str]:
    """What backward does, in order; collectives that are not asynchronous show as such."""
    events: list[str] = []

    def recorded(function: Any, name: str) -> Any:
        def call(*arguments: Any, async_op: bool = False, **named: Any) -> Any:
            events.append(f"{name} starts" if async_op else f"{name} blocks")
            work = function(*arguments, async_op=async_op, **named)
            return RecordedWork(work, name, events) if async_op else work

        return call

    layer = ColumnParallelLinear(
        8, 4 * tp.size, tp=tp, sequence_parallel=sequence_parallel, kernel=RecordedLinear(events)
    )
    torch.nn.init.ones_(layer.weight)
    torch.nn.init.zeros_(layer.added_bias())
    x = torch.ones(4, 2, 8, requires_grad=True)
    y = layer(x)
    with (
        mock.patch.object(dist, "all_reduce", recorded(dist.all_reduce, "all-reduce")),
        mock.patch.object(collectives, "all_gather_into", recorded(collectives.all_gather_into, "all-gather")),
        mock.patch.object(
            collectives, "reduce_scatter_into", recorded(collectives.reduce_scatter_into, "reduce-scatter")
        ),
    ):
        y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 4.0 * tp.size)), x.grad
    return events
