"""One outcome on all ranks: either everybody goes on, or everybody stops with the same error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed

from megalm.errors import MegalmError
from megalm.topology.topology import Topology

Result = TypeVar("Result")


def together(topology: Topology, action: Callable[[], Result]) -> Result:
    """Run `action` on every rank; if it fails for the user's reasons on some rank, raise that error on all of them.

    Without this, the ranks that succeed would wait for the failed one until the timeout. `action` itself must not
    communicate, since a rank that fails early would leave the others inside it.

    Communicates: one gather of an object over the world.
    Raises: the MegalmError of the first rank that failed; other exceptions pass as they are, being defects.
    """
    failure: MegalmError | None = None
    result: Result | None = None
    try:
        result = action()
    except MegalmError as error:
        failure = error
    if topology.world.size > 1:
        failures: list[MegalmError | None] = [None] * topology.world.size
        torch.distributed.all_gather_object(failures, failure, group=topology.world.handle)
        failure = next((error for error in failures if error is not None), None)
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]  # no failure anywhere: result is this rank's
