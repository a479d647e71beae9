"""A rank that fails alone says so, although leaving NCCL's groups takes all ranks."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from megalm.errors import DataError
from tests.support.ranks import run_ranks
from tests.support.tiny_run import MODEL_FLAGS, TRAINING_FLAGS, write_corpus

pytestmark = pytest.mark.dist


def fail_alone(flags: list[str]) -> float:
    """End a run with an error where no group can be left, as the other ranks wait in a collective; seconds it took."""
    import torch.distributed

    from megalm.config.parse import parse_command_line
    from megalm.topology import start
    from megalm.train import build
    from megalm.train.prepare import prepare

    torch.distributed.destroy_process_group = lambda *_: threading.Event().wait()
    for module in (start, build):
        vars(module)["SECONDS_TO_PART"] = 0.5
    failed = 0.0
    try:
        with build.running(prepare(parse_command_line([*MODEL_FLAGS, *TRAINING_FLAGS, *flags]))):
            failed = time.monotonic()
            raise DataError("a sample that cannot be read")
    except DataError:
        return time.monotonic() - failed


def test_an_error_of_one_rank_comes_out_while_the_others_wait_for_it(tmp_path: Path) -> None:
    (seconds,) = run_ranks(fail_alone, 1, ["--data-path", write_corpus(tmp_path)], timeout=60.0)
    assert seconds < 30.0
