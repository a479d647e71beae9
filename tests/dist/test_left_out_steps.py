"""--skip-train-iteration-range: the steps and their samples count, and nothing of them is read or trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megalm.checkpoint.reshape import reshape_checkpoint
from tests.support.ranks import run_ranks
from tests.support.tiny_run import Collector, train_tiny, write_corpus

pytestmark = pytest.mark.dist


def _samples_read(flags: list[str]) -> tuple[list[int], list[list[int]], dict[str, Any]]:
    """Trained steps, the first token ids of every micro-batch that was read, and the final state."""
    from megalm.config.parse import parse_command_line
    from megalm.train.build import running
    from megalm.train.prepare import prepare
    from megalm.train.loop import train
    from tests.support.tiny_run import MODEL_FLAGS, TRAINING_FLAGS

    with running(prepare(parse_command_line([*MODEL_FLAGS, *TRAINING_FLAGS, *flags]))) as run:
        collector = Collector()
        run.sinks = [*run.sinks, collector]
        read: list[list[int]] = []
        make = run.batches_from

        def recorded(consumed: int) -> Any:
            for batch in make(consumed):
                read.append(batch.tokens[:, :4].flatten().tolist())
                yield batch

        run.batches_from = recorded
        run.batches = recorded(run.state.consumed_samples)
        train(run)
        return [m.step for m in collector.steps], read, run.state.to_json()


def test_left_out_steps_count_and_their_samples_are_not_read(tmp_path: Path) -> None:
    corpus = ["--data-path", write_corpus(tmp_path)]
    ((all_steps, all_read, whole),) = run_ranks(_samples_read, 1, corpus)
    flags = [*corpus, "--skip-train-iteration-range", "3-5", "9-9"]
    ((steps, read, state),) = run_ranks(_samples_read, 1, flags)
    assert all_steps == list(range(1, 21))
    assert steps == [step for step in all_steps if step not in (3, 4, 5, 9)]
    per_step = len(all_read) // 20
    expected = [batch for step in steps for batch in all_read[(step - 1) * per_step : step * per_step]]
    assert read == expected
    assert (state["step"], state["consumed_samples"]) == (whole["step"], whole["consumed_samples"])


def test_leaving_steps_out_survives_a_restart(tmp_path: Path) -> None:
    flags = ["--data-path", write_corpus(tmp_path), "--skip-train-iteration-range", "3-5", "9-9"]
    ((steps, _, state),) = run_ranks(_samples_read, 1, flags)
    saving = [*flags, "--save", str(tmp_path / "run")]
    ((first, _, _),) = run_ranks(_samples_read, 1, [*saving, "--exit-interval", "4"])
    ((second, _, resumed),) = run_ranks(_samples_read, 1, [*saving, "--load", str(tmp_path / "run")])
    assert first + second == steps
    assert resumed == state


@pytest.mark.parametrize("stage", ["0", "1"])
def test_a_checkpoint_before_the_first_update_continues_and_is_reshaped(stage: str, tmp_path: Path) -> None:
    flags = ["--data-path", write_corpus(tmp_path), "--skip-train-iteration-range", "1-2", "--zero-stage", stage]
    (unbroken,) = run_ranks(train_tiny, 1, flags)
    saving = ["--save", str(tmp_path / "run"), "--train-iters", "2", "--lr-decay-iters", "20"]
    run_ranks(train_tiny, 1, [*flags, *saving])
    reshape_checkpoint(tmp_path / "run" / "global_step2", tmp_path / "tp2", tp_size=2, pp_size=1)
    for folder in ("run", "tp2"):
        (continued,) = run_ranks(train_tiny, 1, [*flags, "--lr-decay-iters", "20", "--load", str(tmp_path / folder)])
        assert continued.losses == unbroken.losses


class _Validations(Collector):
    """Keeps the steps at which something was evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.evaluated: list[int] = []

    def log_validation(self, step: int, consumed_samples: int, name: str, loss: float) -> None:
        self.evaluated.append(step)


def _evaluated(flags: list[str]) -> tuple[list[int], str]:
    """Steps at which the validation set was evaluated, and what was printed."""
    import contextlib
    import io

    from megalm.config.parse import parse_command_line
    from megalm.train.build import running
    from megalm.train.prepare import prepare
    from megalm.train.loop import train
    from tests.support.tiny_run import MODEL_FLAGS, TRAINING_FLAGS

    said = io.StringIO()
    with (
        contextlib.redirect_stdout(said),
        running(prepare(parse_command_line([*MODEL_FLAGS, *TRAINING_FLAGS, *flags, "--log-level", "info"]))) as run,
    ):
        found = _Validations()
        run.sinks = [found]
        train(run)
    return found.evaluated, said.getvalue()


def test_a_run_whose_last_steps_are_left_out_is_evaluated_and_complete(tmp_path: Path) -> None:
    flags = ["--data-path", write_corpus(tmp_path), "--split", "80,20,0", "--eval-iters", "1", "--eval-interval", "100"]
    last = ["--skip-train-iteration-range", "18-20", "--exit-interval", "20"]
    ((evaluated, said),) = run_ranks(_evaluated, 1, [*flags, *last])
    assert evaluated == [20]
    assert "stopped after step 20: training is complete" in said
