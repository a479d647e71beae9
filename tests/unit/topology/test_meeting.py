"""Ranks that come, late or never, to a real store, as threads of one process."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from megalm.errors import HangError, TopologyError
from megalm.topology import meeting
from megalm.topology.meeting import Meeting
from megalm.topology.ports import free_port


def come(
    port: int,
    ranks: list[int],
    *,
    world_size: int,
    limit_seconds: float,
    warnings: list[str] | None = None,
    serves: bool = True,
) -> list[Any]:
    """Boards, or what was raised, of those of the ranks that come."""

    def one(rank: int) -> Any:
        own = Meeting(
            "127.0.0.1", port, rank=rank, world_size=world_size, serves=serves and rank == 0, prefix="meeting"
        )
        try:
            return own.board(limit_seconds=limit_seconds, warn=([] if warnings is None else warnings).append)
        except (HangError, TopologyError) as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(one, ranks))


def test_all_that_come_have_one_board() -> None:
    boards = come(free_port(), [2, 0, 1], world_size=3, limit_seconds=20.0)
    assert boards[0].put("mark/2", "here")
    assert [board.read(["mark/2"]) for board in boards] == [{"mark/2": "here"}] * 3


def test_ranks_that_do_not_come_are_named_by_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "SECONDS_BEFORE_WARNING", 0.2)
    warnings: list[str] = []
    port = free_port()
    errors = come(port, [0, 2], world_size=4, limit_seconds=0.6, warnings=warnings)
    for error in errors:
        assert isinstance(error, HangError)
        assert (error.exit_code, error.is_of_one_rank) == (8, False)
        assert str(error).startswith("ranks 1, 3 of 4 have not come within 0.01 minutes; here are 2 on ")
        assert socket.gethostname() in str(error)
        assert f"127.0.0.1:{port}" in str(error)
    assert [warning[:37] for warning in warnings] == ["ranks 1, 3 of 4 have not come yet, af"]


def test_without_the_rank_that_serves_each_speaks_for_itself() -> None:
    (error,) = come(free_port(), [1], world_size=2, limit_seconds=0.5)
    assert isinstance(error, HangError)
    assert error.is_of_one_rank
    assert str(error).startswith("rank 1 of 2 finds nobody at 127.0.0.1:")


def test_a_port_that_another_program_has_is_no_hang() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        (error,) = come(taken.getsockname()[1], [0], world_size=2, limit_seconds=0.5)
    assert isinstance(error, TopologyError)
    assert "rank 0 cannot serve the other ranks at port" in str(error)
