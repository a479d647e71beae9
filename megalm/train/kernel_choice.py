"""The same kernels on all ranks, whatever each of them found when it tried its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

from megalm.kernels.backend import RUNS_EVERYWHERE, Choice
from megalm.telemetry.console import Console
from megalm.topology.agree import exchange, together
from megalm.topology.topology import Topology

Kernels = TypeVar("Kernels")
Names = Mapping[str, str]
"""Operations, and the implementation that is asked for: a name, or `auto`."""
Choose = Callable[[Names], tuple[Kernels, dict[str, Choice]]]


def choose_on_all_ranks(
    requested: Names, choose: Choose[Kernels], *, topology: Topology, console: Console
) -> tuple[Kernels, dict[str, str]]:
    """What `choose` makes of `requested` and the names it took, the same on every rank; the log gets a line for each.

    `auto` may find other things on one rank than on the rest: another processor, or a GPU on which a kernel failed its
    check. Ranks that share a layer would then disagree about its collectives, and replicas about its rounding, so all
    take what runs everywhere.

    Communicates: two all-gathers of small objects over the world.
    Raises: KernelError, the same on every rank, if a kernel is asked for by name and cannot run on one of them.
    """
    kernels, choices = together(topology, partial(choose, requested))
    mine = {operation: (choice.name, choice.reason) for operation, choice in choices.items()}
    of_ranks = exchange(mine, topology.world)
    agreed = {operation: _agreed(operation, [found[operation] for found in of_ranks], console) for operation in mine}
    names = {operation: name for operation, (name, _) in agreed.items()}
    if any(name != mine[operation][0] for operation, name in names.items()):
        kernels, _ = choose(names)
    for operation, (name, reason) in agreed.items():
        console.info(f"{operation}: {name} ({reason})")
    return kernels, names


def _agreed(operation: str, of_ranks: list[tuple[str, str]], console: Console) -> tuple[str, str]:
    """The name that all ranks take, and why, from the names and reasons that they found."""
    name, reason = of_ranks[0]
    others = [rank for rank, (found, _) in enumerate(of_ranks) if found != name]
    if not others:
        return name, reason
    other, why = of_ranks[others[0]]
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    console.warning(f"{operation}: {name} on rank 0 ({reason}), but {other} on rank {others[0]} ({why}){more}")
    return RUNS_EVERYWHERE[operation], "it runs on all ranks"
