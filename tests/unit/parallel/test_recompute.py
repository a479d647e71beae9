"""Recomputation gives the gradients of the first run, dropout masks included."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.parallel.random import RngStreams
from megalm.parallel.recompute import recompute
from megalm.topology.group import SOLO


@pytest.fixture(autouse=True)
def _keep_the_default_stream() -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def _grads(*, again: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient, and the next random number, of two layers that draw from both streams."""
    streams = RngStreams(3, tp=SOLO, pp=SOLO, dp=SOLO)
    x = torch.linspace(-1, 1, 64).requires_grad_()

    def layer(value: Tensor) -> Tensor:
        with streams.tensor_parallel():
            value = F.dropout(value.sin(), 0.5)
        return F.dropout(value.cos(), 0.5)

    y = x
    for _ in range(2):
        y = recompute(layer, y, streams=streams) if again else layer(y)
    y.sum().backward()
    assert x.grad is not None
    with streams.tensor_parallel():
        after = torch.rand(2)
    return y.detach(), x.grad, torch.cat([torch.rand(2), after])


def test_output_gradient_and_streams_equal_those_without_recomputation() -> None:
    for recomputed, kept in zip(_grads(again=True), _grads(again=False), strict=True):
        assert torch.equal(recomputed, kept)


def test_activations_are_not_kept() -> None:
    runs = []

    def layer(value: Tensor) -> Tensor:
        runs.append(1)
        return value.sin()

    x = torch.ones(3, requires_grad=True)
    y = recompute(layer, x, draws=False)
    assert len(runs) == 1
    y.sum().backward()
    assert len(runs) == 2
