#!/usr/bin/env python
"""Predict which layouts of a run fit into the memory of GPUs, and how long a step takes in each.

Takes the flags of pretrain_gpt.py beside its own, and shows the layout that they ask for first:

    python tools/plan.py --num-gpus 64 --gpu h100 --config configs/bloom/7b1.yaml --global-batch-size 512

bf16 with fp32 masters and ZeRO-1. docs/launch.md says how predictions compare with what was measured.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalm.config.parse import parse_command_line
from megalm.config.root import Config
from megalm.errors import ConfigError
from megalm.models.flops import flops_per_token, parameter_count
from megalm.planning.gpus import GIB, GPUS, NETWORK_SHARE, Gpu
from megalm.planning.job import Job, Spreading
from megalm.planning.search import USABLE, Plan, plan_of, plans
from megalm.program import program
from megalm.topology.layout import Layout

HEAD = " tp  pp   dp micro-batch  recompute     GiB  s a step  TFLOP/s    MFU"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--num-gpus", type=int, required=True, help="GPUs of the run")
    result.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="their kind (h100)")
    result.add_argument("--gpus-per-host", type=int, default=8, help="GPUs that NVLink connects (8)")
    result.add_argument(
        "--network-gbits", type=float, help="Gb/s between hosts, for each GPU (A100: 200, Hopper: 400, an adapter each)"
    )
    result.add_argument("--tokens", type=float, help="tokens of the run, to tell the days")
    result.add_argument("--top", type=int, default=8, help="layouts shown (8)")
    return result


@program
def main(arguments: list[str]) -> int:
    """Plan; returns the exit code."""
    options, flags = parser().parse_known_args(arguments)
    for name in ("num_gpus", "gpus_per_host", "top"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    for name in ("network_gbits", "tokens"):
        value = getattr(options, name)
        if value is not None and not 0.0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} {value:g} must be a number above 0")
    config = _config(flags)
    gpu = GPUS[options.gpu]
    if options.network_gbits is not None:
        gpu = replace(gpu, network_rate=options.network_gbits / 8.0 * 1e9 * NETWORK_SHARE)
    per_host = min(options.gpus_per_host, options.num_gpus)
    mine = _asked_for(config, options.num_gpus)
    job = Job(config.model, config.data.seq_length, config.global_batch_size(dp_size=mine.layout.dp))
    num_parameters = parameter_count(config.model, seq_length=job.seq_length)
    print(
        f"{num_parameters:,} parameters, {job.global_batch_size:,} samples of {job.seq_length:,} tokens a step, "
        f"{options.num_gpus:,} {options.gpu} in hosts of {per_host}\n\n{HEAD}"
    )
    if mine.num_micro_batches(job) * mine.layout.dp * mine.micro_batch_size == job.global_batch_size:
        asked = plan_of(job, mine, gpu, gpus_per_host=per_host)
        print(f"{_line(job, asked, gpu)}  as asked{'' if asked.fits(gpu) else ': DOES NOT FIT'}")
    else:
        print(f"  as asked, tp {mine.layout.tp} x pp {mine.layout.pp}: {_misfit(job, mine)}")
    found = plans(job, gpu, num_gpus=options.num_gpus, gpus_per_host=per_host)
    for plan in found[: options.top]:
        print(_line(job, plan, gpu))
    if not found:
        print(
            f"\nno layout of {options.num_gpus} x {options.gpu} holds this model: more GPUs, or ZeRO-3 with offloading",
            file=sys.stderr,
        )
        return 1
    print("\n" + "\n".join(_of_the_first(job, found[0], options.tokens)))
    return 0


def _config(flags: list[str]) -> Config:
    """Raises: ConfigError for flags that pretrain_gpt.py does not take, and for what is not planned."""
    config = parse_command_line(flags, otherwise=_unasked)
    if config.training.dtype != "bf16" or config.parallel.zero_stage > 1:
        raise ConfigError(
            f"training.dtype = {config.training.dtype}, parallel.zero_stage = {config.parallel.zero_stage}: plans are "
            "for bf16 with ZeRO-0 or 1\n  pass --bf16 --zero-stage 1"
        )
    if config.model.vocab_size is None and config.model.pad_vocab_size_to is None:
        raise ConfigError("nothing says how large the vocabulary is\n  pass --vocab-size")
    return config


def _unasked(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a run needs and a plan does not."""
    found: dict[str, Any] = {
        "data.data_path": ("none",),
        "data.tokenizer_path": "none",
        "data.seq_length": 2048,
        "training.lr": 1.0,
        "training.micro_batch_size": 1,
        "training.dtype": "bf16",
    }
    return found if "training.train_samples" in given else {**found, "training.train_iters": 1}


def _asked_for(config: Config, num_gpus: int) -> Spreading:
    """Raises: TopologyError if the flags' layout is none of so many GPUs."""
    parallel, size = config.parallel, config.training.micro_batch_size
    layout = Layout.of_world(num_gpus, tp=parallel.tp, pp=parallel.pp)
    counts_ends = "embedding" in parallel.pipeline_partition and parallel.pp > 1
    return Spreading(layout, size, parallel.recompute, parallel.sequence_parallel and parallel.tp > 1, counts_ends)


def _misfit(job: Job, spreading: Spreading) -> str:
    size, replicas = spreading.micro_batch_size, spreading.layout.dp
    together, batch = size * replicas, job.global_batch_size
    below = batch // together * together
    fitting = " or ".join(str(multiple) for multiple in (below, below + together) if multiple)
    return f"{batch} samples are no multiple of micro-batch {size} * {replicas} replicas, {fitting} would be"


def _line(job: Job, plan: Plan, gpu: Gpu) -> str:
    spreading, seconds = plan.spreading, plan.parts.total
    layout = spreading.layout
    flops = flops_per_token(job.model, seq_length=job.seq_length) * job.global_batch_size * job.seq_length
    rate = flops / seconds / layout.world_size
    return (
        f"{layout.tp:>3} {layout.pp:>3} {layout.dp:>4} {spreading.micro_batch_size:>11}  {spreading.recompute:<10} "
        f"{plan.most_bytes / GIB:>6.1f} {seconds:>9.2f} {rate / 1e12:>8.0f} {rate / gpu.peak_flops:>6.1%}"
    )


def _of_the_first(job: Job, plan: Plan, tokens: float | None) -> Iterator[str]:
    """Where the time of a step goes, and the flags."""
    total = plan.parts.total
    shares = sorted(vars(plan.parts).items(), key=lambda part: -part[1])
    named = ", ".join(
        f"{name.replace('_', ' ')} {seconds / total:.0%}" for name, seconds in shares if seconds > 0.005 * total
    )
    yield f"the first: {named}"
    if tokens is not None:
        steps = tokens / (job.global_batch_size * job.seq_length)
        yield f"{tokens:,.0f} tokens: {steps:,.0f} steps, {steps * total / 86400:,.1f} days without a pause"
    spreading, layout = plan.spreading, plan.spreading.layout
    flags = [f"--tensor-model-parallel-size {layout.tp}", f"--pipeline-model-parallel-size {layout.pp}"]
    flags += [f"--micro-batch-size {spreading.micro_batch_size}", f"--global-batch-size {job.global_batch_size}"]
    flags += ["--sequence-parallel"] if spreading.sequence_parallel else []
    flags += [f"parallel.recompute={spreading.recompute}"]
    flags += ["--pp-partition-method 'type:transformer|embedding'"] if spreading.counts_ends else []
    yield " ".join(flags)
    yield f"GiB are torch's, of the rank that takes most; at most {USABLE:.0%} of a GPU's are planned with"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
