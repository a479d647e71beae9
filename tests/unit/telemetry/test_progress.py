"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from megalm.telemetry.progress import duration, perplexity, progress_line, rate, teraflops, validation_line
from tests.support.steps import step_metrics


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0:00"),
        (7.4, "0:07"),
        (83, "1:23"),
        (3723, "1:02:03"),
        (183845, "2d 03:04:05"),
        (-3, "0:00"),
        (math.inf, "unknown"),
        (math.nan, "unknown"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    "value, text", [(912, "912"), (5123, "5.1k"), (48_400, "48.4k"), (1.23e6, "1.2M"), (3e9, "3.0G")]
)
def test_rates(value: float, text: str) -> None:
    assert rate(value) == text


@pytest.mark.parametrize("value, text", [(0.00432, "0.0043"), (0.0213, "0.02"), (3.14159, "3.14"), (412.34, "412.3")])
def test_teraflops(value: float, text: str) -> None:
    assert teraflops(value) == text


def test_fp16_step_shows_its_scale_and_that_it_was_skipped() -> None:
    line = progress_line(step_metrics(3, loss_scale=65536.0, skipped=True, grad_norm=None, loss=math.nan))
    assert "| loss nan |" in line
    assert "| loss scale 65536 | update skipped |" in line
    assert "grad norm" not in line


def test_validation_line_gives_loss_and_perplexity() -> None:
    assert validation_line(40, "valid", math.log(400)) == "step    40       | valid loss 5.9915 | perplexity 400"
    assert perplexity(1000.0) == math.exp(20)
    assert math.isnan(perplexity(math.nan))
