"""Activations thrown away in forward and computed again in backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch.utils.checkpoint import checkpoint

from megalm.parallel.random import RngStreams


def recompute(
    function: Callable[..., Any], *arguments: Any, draws: bool = True, streams: RngStreams | None = None
) -> Any:
    """function(*arguments), of which backward keeps the arguments alone.

    The second run draws the random numbers of the first again, from the default stream and from the tensor-parallel one
    of `streams`. With draws=False no state is saved, for functions that draw nothing.
    Source: Chen et al. 2016, arXiv:1604.06174.
    """
    if not draws or streams is None:
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=draws)
    state = streams.tensor_parallel_state()

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return contextlib.nullcontext(), streams.replay(state)

    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=True, context_fn=contexts)
