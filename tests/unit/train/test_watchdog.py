"""When a watchdog ends a run, and what it says, by a clock and a board of the test's own."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from megalm.train import watchdog
from megalm.train.watchdog import EXIT_HUNG, WAITING, Watchdog


class Memory:
    """A board that all watchdogs of a test share; silent while its process is stopped."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.is_silent = False

    def put(self, key: str, text: str) -> bool | None:
        if not self.is_silent:
            self.texts[key] = text
        return None if self.is_silent else True

    def read(self, keys: Sequence[str]) -> dict[str, str] | None:
        return None if self.is_silent else {key: self.texts[key] for key in keys if key in self.texts}

    def claim(self, key: str, text: str) -> str | None:
        return None if self.is_silent else self.texts.setdefault(key, text)


class Busy(Memory):
    """A board that answers so many keys in five seconds, as the store does that thousands of ranks ask."""

    def __init__(self, num_keys: int) -> None:
        super().__init__()
        self.most = self.left = num_keys

    def read(self, keys: Sequence[str]) -> dict[str, str] | None:
        if len(keys) > self.left:
            return None
        self.left -= len(keys)
        return super().read(keys)


class Left(Exception):
    """Stands for the end of the process."""


class Fleet:
    """Watchdogs with a limit of 60 seconds and one clock."""

    def __init__(self, world_size: int, folder: Path, *, board: Memory | None = None) -> None:
        self.now, self.bytes = 0.0, [0] * world_size
        self.board = board or Memory()
        self.dogs = [
            Watchdog(
                rank=rank, world_size=world_size, limit_seconds=60.0, folder=folder, board=self.board,
                leave=self._leave, clock=lambda: self.now, num_bytes=lambda rank=rank: self.bytes[rank],
            )
            for rank in range(world_size)
        ]  # fmt: skip
        for dog in self.dogs:
            dog.at("training", 1)

    def _leave(self, code: int) -> None:
        assert code == EXIT_HUNG
        raise Left

    def pass_time(self, seconds: int, ranks: Sequence[int]) -> list[int]:
        """Let time pass, with a look of the watchdogs of `ranks` at every fifth second; the ranks that left."""
        left: list[int] = []
        for _ in range(seconds // 5):
            self.now += 5.0
            for rank in [rank for rank in ranks if rank not in left]:
                try:
                    self.dogs[rank].look()
                except Left:
                    left.append(rank)
        return left


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "MOST_SECONDS_FOR_STACKS", 0.0)
    monkeypatch.setattr(watchdog, "_hold_interpreter", lambda _: None)


def test_one_rank_that_waits_is_named_with_what_it_waits_for(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet(3, tmp_path)
    monkeypatch.setattr(watchdog, "MOST_SECONDS_FOR_STACKS", 10.0)
    joined: list[int] = []
    monkeypatch.setattr(watchdog.time, "sleep", lambda _: joined.extend(fleet.pass_time(5, [1, 2])))
    fleet.dogs[0].at("training", 7)
    fleet.dogs[1].at(WAITING, 7)
    fleet.dogs[2].at("training", 7)
    assert fleet.pass_time(75, [0, 1, 2]) == []
    assert fleet.pass_time(5, [0]) == [0]
    assert joined[:2] == [1, 2]
    said = capsys.readouterr().err
    assert said.count("no rank has got any further for 1 minutes") == 1
    assert "step 7 is ended with exit code 8" in said
    assert re.search(r"  rank 1: waiting for data, step 7, in \w+ \(\w+.py:\d+\)\n", said)
    assert re.search(r"  ranks? .*2: training, step 7, in \w+ \(\w+.py:\d+\)\n", said)
    for rank in range(3):
        text = (tmp_path / "step7" / f"rank_{rank}.txt").read_text()
        assert text.startswith(f"rank {rank}: {'waiting for data' if rank == 1 else 'training'}, step 7, in ")
        assert "in look" in text


def test_a_rank_that_waits_for_one_that_moves_on_goes_on_waiting(tmp_path: Path) -> None:
    fleet = Fleet(2, tmp_path)
    for save in range(40):
        fleet.dogs[1].at("saving", save)
        assert fleet.pass_time(55, [0, 1]) == []
    # The other one stops too.
    assert fleet.pass_time(20, [0, 1]) == [0, 1]


def test_many_ranks_that_wait_ask_the_store_for_few_words_each_and_go_on_waiting(tmp_path: Path) -> None:
    board = Busy(num_keys=64 * 8)
    fleet = Fleet(64, tmp_path, board=board)
    for _ in range(60):
        board.left = board.most
        fleet.bytes[63] += 2 * 2**20  # It saves, and the others wait for it.
        assert fleet.pass_time(5, range(64)) == []
    for _ in range(16):  # It waits too, in vain.
        board.left = board.most
        left = fleet.pass_time(5, range(64))
        if left:
            break
    assert left == list(range(64))


@pytest.mark.parametrize("moves_on", [True, False])
def test_what_all_have_told_is_read_by_another_where_the_rank_that_read_it_stops(
    tmp_path: Path, moves_on: bool
) -> None:
    fleet = Fleet(4, tmp_path)
    fleet.pass_time(40, range(4))
    assert fleet.board.texts["digest"].startswith("0 ")
    for _ in range(60):  # 0 is stopped, or waits no longer; 3 saves.
        fleet.bytes[3] += 2 * 2**20
        fleet.bytes[0] += 2 * 2**20 * moves_on
        assert fleet.pass_time(5, range(0 if moves_on else 1, 4)) == []
    assert fleet.board.texts["digest"][0] in "12"
    assert sorted(fleet.pass_time(100, [1, 2, 3])) == [1, 2, 3]


def test_megabytes_that_are_written_are_progress_and_a_trickle_adds_up(tmp_path: Path) -> None:
    fleet = Fleet(2, tmp_path)
    for _ in range(40):
        fleet.bytes[0] += 100_000
        assert fleet.pass_time(5, [0, 1]) == []
    assert fleet.now == 200.0
    assert sorted(fleet.pass_time(100, [0, 1])) == [0, 1]


def test_a_rank_that_was_stopped_is_named_by_the_others(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fleet = Fleet(3, tmp_path)
    for dog in fleet.dogs:
        dog.at("training", 3)
    fleet.pass_time(5, [0, 1, 2])
    assert fleet.pass_time(80, [0, 1]) == [0, 1]
    said = capsys.readouterr().err
    assert "  ranks 1, 2 do not answer; the last they told was training, step 3\n" in said
    assert not (tmp_path / "step3" / "rank_2.txt").exists()


def test_many_ranks_that_do_not_answer_take_a_line_for_each_thing_they_did(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fleet = Fleet(40, tmp_path)
    fleet.dogs[39].at("saving", 3)
    fleet.pass_time(5, range(40))
    assert fleet.pass_time(80, [0]) == [0]
    said = capsys.readouterr().err
    assert "  ranks 1, 2, " in said
    assert " and 22 more do not answer; the last they told was training, step 1\n" in said
    assert "  rank 39 does not answer; the last it told was saving, step 3\n" in said
    assert said.count("not answer") == 2


def test_where_the_store_does_not_answer_every_rank_speaks_for_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fleet = Fleet(3, tmp_path)
    fleet.pass_time(5, [0, 1, 2])
    fleet.board.is_silent = True
    assert fleet.pass_time(65, [1, 2]) == []
    assert fleet.pass_time(15, [1, 2]) == [1, 2]
    said = capsys.readouterr().err
    for rank in (1, 2):
        assert f"  rank {rank} says: the process at which ranks meet, rank 0 or its launcher, does not answer" in said


def test_all_that_were_stopped_together_go_on(tmp_path: Path) -> None:
    fleet = Fleet(2, tmp_path)
    fleet.pass_time(40, [0, 1])
    fleet.now += 3600.0  # Ctrl-Z, and later `fg`.
    assert fleet.pass_time(40, [0, 1]) == []
    for dog in fleet.dogs:
        dog.at("training", 9)
    assert fleet.pass_time(55, [0, 1]) == []


def test_without_a_folder_stacks_go_to_standard_error(capfd: pytest.CaptureFixture) -> None:
    fleet = Fleet(1, Path("/proc/nothing/can/be/made/here"))
    assert fleet.pass_time(100, [0]) == [0]
    said = capfd.readouterr().err
    assert "in look" in said
    assert "stacks of those that answer: above" in said


def test_a_part_of_the_start_has_hours_and_its_own_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fleet = Fleet(2, tmp_path)
    for part in ("opening the corpora", "loading"):  # Each has them anew.
        for dog in fleet.dogs:
            dog.starts(part)
        assert fleet.pass_time(7000, [0, 1]) == []
    assert sorted(fleet.pass_time(2000, [0, 1])) == [0, 1]
    said = capsys.readouterr().err
    assert (
        "for 120 minutes, the limit of parts of a start or end, and of compiling; the start is ended with exit code 8"
        in said
    )
    assert "  rank 0: loading, in " in said
    assert "what takes longer needs a --hang-timeout-minutes of more than 120\n" in said
    assert (tmp_path / "start" / "rank_1.txt").read_text().startswith("rank 1: loading, in ")


def test_a_longer_limit_than_that_of_a_part_holds_for_parts_too(tmp_path: Path) -> None:
    dog = Watchdog(rank=0, world_size=1, limit_seconds=4 * 3600.0, folder=tmp_path, board=None)
    dog.starts("loading")
    assert dog._mark.limit_seconds == 4 * 3600.0


def test_who_trains_already_waits_for_who_still_loads_and_no_longer_than_that(tmp_path: Path) -> None:
    fleet = Fleet(2, tmp_path)
    fleet.dogs[0].starts("loading")
    assert fleet.pass_time(7000, [0, 1]) == []
    fleet.bytes[0] += 2 * 2**20  # It reads on.
    assert fleet.pass_time(7000, [0, 1]) == []
    fleet.dogs[0].at("training", 1)  # The part is over, and its limit with it.
    assert fleet.pass_time(55, [0, 1]) == []
    assert sorted(fleet.pass_time(40, [0, 1])) == [0, 1]


def test_a_rank_stopped_while_it_loads_is_named_by_one_that_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fleet = Fleet(2, tmp_path)
    fleet.dogs[0].starts("loading")
    fleet.pass_time(5, [0, 1])
    assert fleet.pass_time(7000, [1]) == []
    assert fleet.pass_time(500, [1]) == [1]
    said = capsys.readouterr().err
    assert "for 120 minutes" in said
    assert "  rank 0 does not answer; the last it told was loading\n" in said


def test_at_the_end_each_rank_is_watched_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fleet = Fleet(2, tmp_path)
    fleet.pass_time(5, [0, 1])
    texts = dict(fleet.board.texts)
    fleet.dogs[1].ends("leaving the other ranks")
    for step in range(200):  # The other one's progress is none of its own.
        fleet.dogs[0].at("training", step)
        left = fleet.pass_time(45, [0, 1])
        if left:
            break
    assert (left, 7200.0 < fleet.now < 9000.0) == ([1], True)
    said = capsys.readouterr().err
    assert "the end is ended with exit code 8" in said
    assert "  rank 1: leaving the other ranks, in " in said
    assert "rank 0" not in said
    assert fleet.board.texts["mark/1"] == texts["mark/1"]
    assert (tmp_path / "end" / "rank_1.txt").exists()


def test_compiling_has_hours_within_a_step_and_none_after(tmp_path: Path) -> None:
    fleet = Fleet(2, tmp_path)
    fleet.dogs[0].compiles()
    assert fleet.dogs[0]._mark.words == "compiling, step 1"
    assert fleet.pass_time(7000, [0, 1]) == []
    fleet.dogs[0].has_compiled()
    assert fleet.dogs[0]._mark.words == "training, step 1"
    assert fleet.pass_time(55, [0, 1]) == []
    assert sorted(fleet.pass_time(40, [0, 1])) == [0, 1]


def test_torch_gives_collectives_longer_than_the_watchdog() -> None:
    dog = Watchdog(rank=0, world_size=2, limit_seconds=600.0, folder=None, board=None)
    assert dog.minutes_of_collectives(starting=False) == 30.0
    assert dog.minutes_of_collectives(starting=True) == 250.0
    dog = Watchdog(rank=0, world_size=2, limit_seconds=0.0, folder=None, board=None)
    assert dog.minutes_of_collectives(starting=True) is None


def test_a_folder_that_hangs_does_not_hold_the_report(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "SECONDS_TO_WRITE", 0.2)
    fleet = Fleet(1, tmp_path)
    (tmp_path / "step1").mkdir()
    os.mkfifo(tmp_path / "step1" / "rank_0.txt")  # Nobody reads it, so that it cannot be opened.
    assert fleet.pass_time(100, [0]) == [0]
    said = capfd.readouterr().err
    assert "in look" in said
    assert "stacks of those that answer: above" in said
    with (tmp_path / "step1" / "rank_0.txt").open("rb") as fifo:  # Lets the writer end.
        assert fifo.read()


def test_batches_pass_and_say_when_they_are_waited_for(tmp_path: Path) -> None:
    (dog,) = Fleet(1, tmp_path).dogs

    def source() -> object:
        for number in range(2):
            assert dog._mark.words == "waiting for data, step 4"
            yield number

    for number, got in enumerate(dog.batches(source(), "training", 4)):
        assert got == number
        assert dog._mark.words == "training, step 4"


def test_a_limit_of_zero_watches_nothing(tmp_path: Path) -> None:
    dog = Watchdog(rank=0, world_size=1, limit_seconds=0.0, folder=tmp_path, board=None)
    with dog.watching():
        assert dog._over.wait(0.2) is False
    assert not any(tmp_path.iterdir())


def test_it_counts_what_this_process_reads(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a" * 3_000_000)
    before = watchdog.bytes_moved()
    with ThreadPoolExecutor(1) as threads:
        threads.submit((tmp_path / "a").read_bytes).result()
        assert 3_000_000 <= watchdog.bytes_moved() - before < 3_100_000


def test_its_own_looks_are_no_progress() -> None:
    before = watchdog.bytes_moved()
    for _ in range(200):
        watchdog.bytes_moved()
    assert watchdog.bytes_moved() - before < 10_000


def test_what_others_ask_of_the_store_in_this_process_is_no_progress() -> None:
    """Of 32 ranks that wait, their questions alone come to megabytes within the limit."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    other = dist.TCPStore(
        "127.0.0.1", store.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5)
    )
    other.set("mark/0", "a" * 100_000)
    before = watchdog.bytes_moved()
    for _ in range(100):
        other.set("mark/0", "a" * 100_000)
        other.get("mark/0")
    assert watchdog.bytes_moved() - before < 1_000_000
