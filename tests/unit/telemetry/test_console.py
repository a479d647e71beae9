"""What a person sees, and who prints it."""

from __future__ import annotations

import io
import sys

import pytest

from megalm.telemetry.console import Console
from megalm.telemetry.metrics import ConsoleSink
from tests.support.steps import step_metrics


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(written: str) -> list[str]:
    """The lines that a terminal shows after these bytes: a carriage return with erasure starts the line again."""
    return [line.split("\r\x1b[K")[-1] for line in written.split("\n")]


def test_rank_zero_prints_prefixed_lines_and_others_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for rank_zero in (True, False):
        console = Console(rank_zero, "debug")
        console.debug("a")
        console.info("b\nc")
        console.warning("d")
        console.error("e")
        console.progress("f", keep=True)
        out, err = capsys.readouterr()
        assert out == ("[megalm] a\n[megalm] b\n[megalm] c\n[megalm] f\n" if rank_zero else "")
        assert err == ("[megalm] warning: d\n[megalm] error: e\n" if rank_zero else "")


def test_level_hides_what_is_less_severe(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(True, "warning")
    console.info("hidden")
    console.progress("hidden", keep=True)
    console.warning("shown")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "[megalm] warning: shown\n")
    with pytest.raises(ValueError, match="'loud' must be one of debug, info"):
        Console(True, "loud")


def test_progress_line_has_every_figure_with_its_unit(capsys: pytest.CaptureFixture[str]) -> None:
    ConsoleSink(Console(True), log_interval=10).log_step(step_metrics(40))
    assert capsys.readouterr().out == (
        "[megalm] step    40/  600 | loss 6.1234 | lr 3.00e-03 | grad norm 0.81 | "
        "5.1k tok/s | 0.02 TFLOP/s | ETA 1:23\n"
    )


def test_log_keeps_first_interval_last_and_skipped_steps(capsys: pytest.CaptureFixture[str]) -> None:
    sink = ConsoleSink(Console(True), log_interval=10)
    for step in range(1, 24):
        sink.log_step(step_metrics(step, total_steps=23, skipped=step == 17))
    steps = [int(line.split()[2].rstrip("/")) for line in capsys.readouterr().out.splitlines()]
    assert steps == [1, 10, 17, 20, 23]


def test_terminal_redraws_one_line_and_messages_do_not_mix_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    console = Console(True)
    sink = ConsoleSink(console, log_interval=10)
    for step in range(7, 13):
        sink.log_step(step_metrics(step))
        if step == 11:
            console.info("saved")
    shown = screen(terminal.getvalue())
    assert [line.split(" | ")[0] for line in shown] == [
        "[megalm] step     7/  600",
        "[megalm] step    10/  600",
        "[megalm] saved",
        "[megalm] step    12/  600",
    ]


def test_live_line_is_cut_to_the_width_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    Console(True).progress("x" * 100, keep=False)
    assert len(screen(terminal.getvalue())[-1]) == 39
