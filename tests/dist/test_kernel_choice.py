"""Ranks that find different kernels take one that runs on all of them, and the log says so."""

from __future__ import annotations

import contextlib
import io

import pytest

from megalm.errors import KernelError
from megalm.kernels.backend import Choice
from megalm.telemetry.console import Console
from megalm.topology.start import Launch, start, stop
from megalm.train.kernel_choice import Names, choose_on_all_ranks
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist

Outcome = tuple[str, dict[str, str], str]


def _choose(requested: dict[str, str], found_by_rank: list[str]) -> Outcome:
    """Implementation, names and the log on this rank, where `auto` finds `found_by_rank` for attention."""
    topology = start(Launch.from_environment(), tp=1, pp=1)

    def choose(names: Names) -> tuple[str, dict[str, Choice]]:
        rank = topology.world.rank
        choices = {operation: Choice(name, name, "asked for by name") for operation, name in names.items()}
        if names["attention"] == "flex" and rank == 1:
            raise KernelError("output.attention = 'flex' cannot run here")
        if names["attention"] == "auto":
            choices["attention"] = Choice(found_by_rank[rank], found_by_rank[rank], f"best of rank {rank}")
        return "+".join(choice.implementation for choice in choices.values()), choices

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            console = Console(topology.world.is_first)
            kernels, names = choose_on_all_ranks(requested, choose, topology=topology, console=console)
    except KernelError as error:
        return str(error), {}, ""
    finally:
        stop()
    return kernels, names, said.getvalue()


def test_ranks_that_find_the_same_keep_it() -> None:
    outcomes: list[Outcome] = run_ranks(_choose, 2, {"attention": "auto", "linear": "onednn"}, ["triton", "triton"])
    assert [kernels for kernels, _, _ in outcomes] == ["triton+onednn"] * 2
    assert outcomes[0][2].splitlines() == [
        "[megalm] attention: triton (best of rank 0)",
        "[megalm] linear: onednn (asked for by name)",
    ]


def test_ranks_that_find_different_kernels_take_what_runs_on_all() -> None:
    outcomes: list[Outcome] = run_ranks(_choose, 3, {"attention": "auto", "linear": "fp8"}, ["triton", "sdpa", "sdpa"])
    assert [kernels for kernels, _, _ in outcomes] == ["sdpa+fp8"] * 3
    assert [names["attention"] for _, names, _ in outcomes] == ["sdpa"] * 3
    assert outcomes[0][2].splitlines() == [
        "[megalm] warning: attention: triton on rank 0 (best of rank 0), but sdpa on rank 1 (best of rank 1) and 1 more",
        "[megalm] attention: sdpa (it runs on all ranks)",
        "[megalm] linear: fp8 (asked for by name)",
    ]


def test_a_kernel_that_one_rank_lacks_is_the_same_error_on_all() -> None:
    outcomes: list[Outcome] = run_ranks(_choose, 2, {"attention": "flex"}, [])
    assert [said for said, _, _ in outcomes] == ["output.attention = 'flex' cannot run here"] * 2
