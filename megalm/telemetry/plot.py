"""The picture of a run: training and validation loss over steps."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalm.errors import ConfigError, DataError
from megalm.telemetry.metric_log import read_metric_log

_TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20)
_TRAIN_COLOUR, _ENTROPY_COLOUR, _RESUME_COLOUR = "#4c78a8", "#777777", "#909090"
_VALID_COLOURS = ("#e45756", "#54a24b", "#b279a2", "#f58518", "#72b7b2", "#9d755d")


@dataclass
class Curve:
    """What a metrics file says about the loss. A step that was logged twice counts as it was logged last."""

    train: dict[int, float] = field(default_factory=dict)
    """Loss by step, nats per token."""
    valid: dict[str, dict[int, float]] = field(default_factory=dict)
    """Loss by step for every validation set."""
    resumed_at: list[int] = field(default_factory=list)
    """Steps that a run continued from."""


def read_curve(metrics_path: str | Path) -> Curve:
    """The losses of a metrics file, without those that are not finite.

    Raises: DataError if the file is missing, damaged or without a single loss.
    """
    curve = Curve()
    for record in read_metric_log(metrics_path):
        if record["kind"] == "resume":
            curve.resumed_at.append(record["step"])
        elif record.get("loss") is not None:
            losses = curve.train if record["kind"] == "train" else curve.valid.setdefault(record["name"], {})
            losses[record["step"]] = record["loss"]
    if not curve.train and not curve.valid:
        raise DataError(
            f"{metrics_path} holds no loss to draw\n  train at least one step, or name another metrics file"
        )
    return curve


def smooth(losses: list[float], *, window: int) -> list[float]:
    """Means over a window around each step.

    At the start, where losses fall steeply, the window shrinks on both sides alike; at the end it loses its right side.
    """
    total = [0.0]
    for loss in losses:
        total.append(total[-1] + loss)
    result = []
    for at in range(len(losses)):
        reach = min(window // 2, at)
        first, past = at - reach, min(at + reach + 1, len(losses))
        result.append((total[past] - total[first]) / (past - first))
    return result


def plot_curve(metrics_path: str | Path, out_png: str | Path, *, unigram_entropy: float | None = None) -> None:
    """Draw training and validation loss of a metrics file, and the unigram entropy as the line to be below.

    The picture appears whole or not at all.

    Units: nats per token.
    Raises: DataError if there is no loss to draw; ConfigError if matplotlib is missing or `out_png` cannot be written.
    """
    curve = read_curve(metrics_path)
    figure = _draw(curve, unigram_entropy)
    path = Path(out_png)
    beside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(beside, format="png", dpi=150)
        os.replace(beside, path)
    except OSError as failure:
        raise ConfigError(
            f"the picture {path} cannot be written: {failure.strerror}\n  name a file in a writable folder"
        ) from failure


def _draw(curve: Curve, unigram_entropy: float | None) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as failure:
        raise ConfigError(f"drawing a curve needs matplotlib: {failure}\n  pip install 'megalm[tracking]'") from failure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_train(axes, curve.train)
    for (name, losses), colour in zip(curve.valid.items(), _VALID_COLOURS * len(curve.valid), strict=False):
        _draw_valid(axes, name, losses, colour)
    if unigram_entropy is not None:
        label = f"unigram entropy of the validation tokens, {unigram_entropy:.3f}"
        axes.axhline(unigram_entropy, color=_ENTROPY_COLOUR, linestyle="-.", linewidth=1.2, label=label)
    for number, step in enumerate(sorted(set(curve.resumed_at))):
        label = "resumed from a checkpoint" if number == 0 else "_nolegend_"
        axes.axvline(step, color=_RESUME_COLOUR, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1.5, label=label)
    _dress(axes, curve, unigram_entropy)
    return figure


def _draw_train(axes: Any, train: dict[int, float]) -> None:
    if not train:
        return
    steps = sorted(train)
    losses = [train[step] for step in steps]
    window = max(1, len(losses) // 50)
    many = window > 1
    label = "_nolegend_" if many else "training"
    axes.plot(
        steps, losses, color=_TRAIN_COLOUR, alpha=0.3 if many else 1.0, linewidth=0.8 if many else 1.6, label=label
    )
    if many:
        label = f"training, mean of {2 * (window // 2) + 1} steps"
        axes.plot(steps, smooth(losses, window=window), color=_TRAIN_COLOUR, linewidth=1.8, label=label)


def _draw_valid(axes: Any, name: str, losses: dict[int, float], colour: str) -> None:
    steps = sorted(losses)
    values = [losses[step] for step in steps]
    title = {"valid": "validation", "test": "test"}.get(name, f"validation, {name}")
    label = f"{title}, last {values[-1]:.3f}"
    axes.plot(steps, values, color=colour, marker="o", markersize=4, linewidth=1.4, label=label, zorder=3)


def _dress(axes: Any, curve: Curve, unigram_entropy: float | None) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    losses = [*curve.train.values(), *(loss for valid in curve.valid.values() for loss in valid.values())]
    shown = [*losses, *([] if unigram_entropy is None else [unigram_entropy])]
    least, most = min(shown), max(shown)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    if least > 0:
        # The early fall is steep and the late one slow: equal ratios of loss get equal room.
        low, high = least / 1.04, most * 1.04
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        ticks = [tick for tick in _TICKS if low <= tick <= high]
        if len(ticks) >= 2:
            axes.yaxis.set_major_locator(FixedLocator(ticks))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    steps = [*curve.train, *(step for valid in curve.valid.values() for step in valid)]
    margin = max(1.0, 0.01 * max(steps))
    axes.set_xlim(min(0, math.floor(min(steps))), max(steps) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(facecolor="white", framealpha=0.9, edgecolor="none", fontsize=9)
