"""Draw the loss curve of a run: `python tools/plot_run.py runs/x/metrics.jsonl loss.png`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalm.errors import MegalmError
from megalm.telemetry.plot import plot_curve


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw training and validation loss of a metrics file.")
    parser.add_argument("metrics", help="JSON-lines file that a run wrote, <save>/metrics.jsonl")
    parser.add_argument("picture", help="PNG to write")
    parser.add_argument("--unigram-entropy", type=float, metavar="NATS", help="entropy of the validation tokens")
    arguments = parser.parse_args()
    try:
        plot_curve(arguments.metrics, arguments.picture, unigram_entropy=arguments.unigram_entropy)
    except MegalmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {arguments.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
