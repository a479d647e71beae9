"""Draw the loss curve of a run: `python tools/plot_run.py runs/x/metrics.jsonl loss.png`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalm.program import program
from megalm.telemetry.plot import plot_curve


@program
def main(arguments: list[str]) -> int:
    """Draw the picture and return the exit code."""
    parser = argparse.ArgumentParser(description="Draw training and validation loss of a metrics file.")
    parser.add_argument("metrics", help="JSON-lines file that a run wrote, <save>/metrics.jsonl")
    parser.add_argument("picture", help="PNG to write")
    parser.add_argument("--unigram-entropy", type=float, metavar="NATS", help="entropy of the validation tokens")
    options = parser.parse_args(arguments)
    plot_curve(options.metrics, options.picture, unigram_entropy=options.unigram_entropy)
    print(f"wrote {options.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
