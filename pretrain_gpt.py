#!/usr/bin/env python
"""Pre-train a GPT-family language model: the whole program.

    launch/deepspeed.sh --num_gpus 4 pretrain_gpt.py --config configs/debug/tiny.yaml ...    several processes
    python pretrain_gpt.py --config configs/debug/tiny.yaml ...                              one process

To follow one batch to the loss: `running` (megalm/train/build.py) makes the iterator of batches and the model, `train`
(megalm/train/loop.py) hands one to the other, and models/gpt/pipeline.py lists the layers between tokens and loss.
"""

from __future__ import annotations

import sys
import traceback

from megalm.config.parse import HelpRequested, parse_command_line  # neither torch nor DeepSpeed: --help answers at once
from megalm.errors import MegalmError
from megalm.topology.start import leave, name_device_to_deepspeed, report_failure, report_interruption


def main(arguments: list[str]) -> int:
    """Run the program; returns its exit code, as listed in docs/exit-codes.md."""
    try:
        config = parse_command_line(arguments)
    except HelpRequested as request:
        print(request.text)
        return 0

    name_device_to_deepspeed()  # before the next line imports it
    from megalm.train.build import running
    from megalm.train.dry_run import report
    from megalm.train.loop import evaluate_once, train
    from megalm.train.prepare import prepare

    plan = prepare(config)  # the tokenizer, and every check that one process can make alone
    if config.dry_run:
        if plan.launch.rank == 0:
            print(report(plan))
        return 0
    with running(plan) as run:  # join the other processes, load the checkpoint, open the data
        return evaluate_once(run) if config.training.eval_only else train(run)


if __name__ == "__main__":
    try:
        exit_code = main(sys.argv[1:])
    except MegalmError as error:
        exit_code = report_failure(error)
    except KeyboardInterrupt:  # while starting or evaluating alone; training finishes its step, saves and stops
        exit_code = report_interruption()
    except Exception:  # a defect; the interpreter's own end may wait for ranks that wait for this one
        traceback.print_exc()
        exit_code = 1
    leave(exit_code)
