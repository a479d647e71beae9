"""How the programs in tools/ end."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.errors import DataError
from megalm.program import program

ROOT = Path(__file__).resolve().parents[2]

MANY_LINES = """
import sys
from megalm.program import program

@program
def main(arguments):
    for number in range(100_000):
        print(number)
    return 0

sys.exit(main([]))
"""


def test_an_error_is_a_paragraph_and_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    @program
    def main(arguments: list[str]) -> int:
        raise DataError(f"{arguments[0]} is missing")

    assert main(["corpus"]) == 3
    assert capsys.readouterr().err == "DataError: corpus is missing\n"


def test_an_interruption_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    @program
    def main(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    assert main([]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_a_defect_keeps_its_traceback() -> None:
    @program
    def main(arguments: list[str]) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main([])


def test_a_reader_who_leaves_ends_the_program_quietly() -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", MANY_LINES], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stderr is not None
    assert writer.stdout.readline() == "0\n"
    writer.stdout.close()
    said = writer.stderr.read()
    assert (writer.wait(timeout=60), said) == (141, "")


@pytest.mark.parametrize("tool", sorted(path.stem for path in (ROOT / "tools").glob("*.py")))
def test_every_tool_ends_so(tool: str) -> None:
    module = importlib.import_module(f"tools.{tool}")
    assert module.main.__wrapped__.__code__.co_name == "main"
