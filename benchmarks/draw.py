#!/usr/bin/env python
"""The results of benchmarks/all.sh as one picture and as tables.

python benchmarks/draw.py FOLDER [--picture performance.png] [--table performance.md]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.train_step import told

COLOURS = {"megalm": "#4c78a8", "plain-compile": "#f58518", "transformers": "#e45756"}
OTHERS = ("#54a24b", "#b279a2", "#72b7b2", "#9d755d", "#bab0ac", "#eeca3b")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args(arguments)
    steps = [_read(path) for path in sorted(options.folder.glob("step-*.json"))]
    kernels_path = options.folder / "kernels.json"
    kernels = _read(kernels_path) if kernels_path.exists() else None
    if not steps and kernels is None:
        print(f"{options.folder} holds no results; run benchmarks/all.sh {options.folder}", file=sys.stderr)
        return 1
    text = "\n".join([*(step_table(found) for found in steps), *([kernel_table(kernels)] if kernels else [])])
    print(text)
    if options.table:
        options.table.parent.mkdir(parents=True, exist_ok=True)
        options.table.write_text(text)
    if options.picture:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        draw(steps, kernels, options.picture)
        print(f"drew {options.picture}")
    return 0


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        sys.exit(f"{path} is no result of a benchmark ({error}); run it again")
    return found


def step_table(found: dict[str, Any]) -> str:
    """Tokens per second of every side and the trainer's speed over it, a row for each micro-batch."""
    more = " ".join(found.get("overrides", ()))
    lines = [f"{found['model']}{' with ' + more if more else ''}: {_where(found)}", ""]
    lines += ["| side | micro-batch | tokens/s | peak GiB | trainer's speed over it |", "|---|---|---|---|---|"]
    speeds = _speeds(found)
    for result in found["results"]:
        side, size = result["side"], result["micro_batch_size"]
        if not result["seconds"]:
            lines.append(f"| {side} | {size} | {told(result['failure'])} | | |")
            continue
        ours = speeds.get(("megalm", size))
        ratio = f"{ours / speeds[side, size]:.2f}" if ours else ""
        lines.append(f"| {side} | {size} | {speeds[side, size]:,.0f} | {result['peak_bytes'] / 2**30:.2f} | {ratio} |")
    return "\n".join(lines) + "\n"


def kernel_table(found: dict[str, Any]) -> str:
    """One row for each operation, shape and side, as benchmarks/kernels.py found them."""
    lines = [f"Kernels: {_where(found)}", "", "| operation | shape | side | ms | rate |", "|---|---|---|---|---|"]
    for row in found["rows"]:
        cells = (row["operation"], row["shape"], row["side"], _milliseconds(row), row.get("rate", ""))
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def draw(steps: list[dict[str, Any]], kernels: dict[str, Any] | None, path: Path) -> None:
    """Bars: tokens per second of whole steps, then milliseconds of every kernel beside its peers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [(row["operation"], row["shape"]) for row in kernels["rows"] if row.get("milliseconds")] if kernels else []
    operations = [one for one in dict.fromkeys(timed) if timed.count(one) > 1]  # a side alone is no comparison
    columns = 3
    rows = -(-(len(steps) + len(operations)) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(15, 3.2 * rows), squeeze=False)
    panels = iter(axes.flat)
    for found in steps:
        _draw_steps(next(panels), found)
    for operation, shape in operations:
        assert kernels is not None
        chosen = [row for row in kernels["rows"] if (row["operation"], row["shape"]) == (operation, shape)]
        _draw_kernel(next(panels), f"{operation}, {shape}", chosen)
    for panel in panels:
        panel.axis("off")
    figure.suptitle(_where((steps or [kernels])[0]), fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / (3.2 * rows)))  # room for the title
    figure.savefig(path, dpi=110)


def _draw_steps(panel: Any, found: dict[str, Any]) -> None:
    speeds = _speeds(found)
    sides = list(dict.fromkeys(side for side, _ in speeds))
    sizes = sorted({size for _, size in speeds})
    for at, side in enumerate(sides):
        heights = [speeds.get((side, size), 0.0) for size in sizes]
        places = [index + (at - len(sides) / 2) * 0.8 / len(sides) for index in range(len(sizes))]
        panel.bar(places, heights, 0.8 / len(sides), align="edge", label=side, color=COLOURS.get(side))
    panel.set_xticks(range(len(sizes)), [f"micro-batch {size}" for size in sizes])
    panel.set_ylabel("tokens/s")
    panel.set_title(found["model"], fontsize=10)
    panel.set_ylim(top=1.25 * max([0.0, *speeds.values()]) or 1.0)  # room for the legend
    panel.legend(fontsize=8)


def _draw_kernel(panel: Any, title: str, rows: list[dict[str, Any]]) -> None:
    rows = [row for row in rows if row.get("milliseconds")]
    for at, row in enumerate(rows):
        ours = row["side"].startswith("megalm")
        panel.barh(at, row["milliseconds"], color=COLOURS["megalm"] if ours else OTHERS[at % len(OTHERS)])
    panel.set_yticks(range(len(rows)), [row["side"] for row in rows], fontsize=8)
    panel.invert_yaxis()
    panel.set_xlabel("ms, forward and backward", fontsize=8)
    panel.set_title(title, fontsize=9)


def _speeds(found: dict[str, Any]) -> dict[tuple[str, int], float]:
    """Tokens per second of the median step by side and micro-batch."""
    tokens = found["num_micro_batches"] * found["seq_length"]
    return {
        (result["side"], result["micro_batch_size"]): result["micro_batch_size"]
        * tokens
        / statistics.median(result["seconds"])
        for result in found["results"]
        if result["seconds"]
    }


def _milliseconds(row: dict[str, Any]) -> str:
    return f"{row['milliseconds']:.3f}" if row.get("milliseconds") else row.get("failure", "")


def _where(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items())
    return f"{found['device']}; {versions}; {found['date']}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
