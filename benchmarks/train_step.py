#!/usr/bin/env python
"""One whole optimizer step of the trainer and of a peer, side by side: tokens/s, MFU, peak memory.

    python benchmarks/train_step.py --model bloom-1b7 --peer plain-compile
    python benchmarks/train_step.py --model bloom-560m --peer transformers --micro-batch-sizes 4
    python benchmarks/train_step.py --model bloom-quickstart --peer transformers --device cpu
    python benchmarks/train_step.py --model bloom-7b1 --peer plain-compile --micro-batch-sizes 1 --num-micro-batches 2 \
        --deepspeed-config benchmarks/pure_bf16.json parallel.zero_stage=2

The trainer's side is `pretrain_gpt.py` itself under DeepSpeed, on a corpus of random ids; the peers are in
benchmarks/peers/. Every side is a process of its own with the same shape, micro-batches and threads, and the sides
take turns --rounds times, so that a machine that slows down slows both. A step is everything between two batches:
forward and backward of all micro-batches, clipping, the optimizer. Figures are of the median step.

MFU is 6 N_matmul + 6 L s h (causal attention halved) operations a token, and the same with 12 L s h, over --peak-tflops
(989 on Hopper). On a CPU without --peak-tflops, over the speed of a large matrix product measured at the start.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "peers")]

PEERS = {"plain-compile": "plain_gpt.py", "transformers": "transformers_bloom.py"}
HOPPER_BF16_TFLOPS = 989.0


@dataclass(frozen=True)
class Result:
    """One side at one shape; `failure` in place of figures when it did not run."""

    side: str
    micro_batch_size: int
    seconds: tuple[float, ...] = ()
    peak_bytes: int = 0
    failure: str = ""


def main(arguments: list[str]) -> int:
    options = _options(arguments)
    with tempfile.TemporaryDirectory() as folder:
        return compare(options, Path(folder))


def compare(options: argparse.Namespace, folder: Path) -> int:
    """Run every side and print the table; 0 if the trainer ran at every micro-batch size."""
    from benchmarks.kernels import versions
    from megalm.config.parse import parse_command_line
    from megalm.errors import MegalmError

    preset = _preset(options.model)
    try:
        config = parse_command_line(["--config", str(preset), *_common_flags(options, folder), *options.overrides])
    except MegalmError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if options.peer and config.training.dtype == "fp16":
        sys.exit("the peers train in fp32 and bf16, as they scale no loss: leave out --peer or training.dtype=fp16")
    device = options.device if options.device != "auto" else _device()
    print(f"{options.model} on {device}: {config.model.num_layers} layers, hidden {config.model.hidden_size}, "
          f"{config.model.padded_vocab_size} rows, sequences of {config.data.seq_length}, "
          f"{options.num_micro_batches} micro-batches a step, {options.threads} thread(s)")  # fmt: skip
    peak_tflops = options.peak_tflops or (HOPPER_BF16_TFLOPS if device == "cuda" else _matmul_tflops(options.threads))
    results = []
    _write_corpus(folder / "random", config, options)
    for micro_batch_size in options.micro_batch_sizes or [config.training.micro_batch_size]:
        turns: dict[str, list[Result]] = {"megalm": [], **{peer: [] for peer in options.peer}}
        for _ in range(options.rounds):
            for side, found in turns.items():
                found.append(_run_side(side, preset, config, options, device, micro_batch_size, folder))
        results += [_joined(found) for found in turns.values()]
    _print_table(results, config, options, peak_tflops)
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        content = {"model": options.model, "device": _device_name(device), "date": time.strftime("%Y-%m-%d"),
                   "versions": versions(("torch", "triton", "deepspeed", "transformers")),
                   "peak_tflops": peak_tflops, "seq_length": config.data.seq_length,
                   "num_micro_batches": options.num_micro_batches, "overrides": options.overrides,
                   "deepspeed_config": options.deepspeed_config,
                   "results": [asdict(result) for result in results]}  # fmt: skip
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(result.seconds for result in results if result.side == "megalm") else 1


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="family-size, a file in configs/: bloom-560m, bloom-quickstart")
    parser.add_argument("--peer", nargs="*", choices=sorted(PEERS), default=[], help="who runs beside the trainer")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--micro-batch-sizes", nargs="+", type=int, help="default: the preset's")
    parser.add_argument("--num-micro-batches", type=int, default=8, help="micro-batches a step")
    parser.add_argument("--warmup-steps", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="steps measured in each round")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each side")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of every side")
    parser.add_argument("--peak-tflops", type=float, help="what MFU divides by")
    parser.add_argument("--json", help="file that receives all figures")
    parser.add_argument("--logs", help="folder that receives what every side printed, one file a side")
    parser.add_argument("--deepspeed-config", help="DeepSpeed JSON of the trainer")
    parser.add_argument("overrides", nargs="*", help="further SECTION.FIELD=VALUE for the trainer")
    options = parser.parse_args(arguments)
    for name, least in (("num_micro_batches", 1), ("warmup_steps", 1), ("steps", 1), ("rounds", 1), ("threads", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least {least}")
    if min(options.micro_batch_sizes or [1]) < 1:
        parser.error("--micro-batch-sizes must be at least 1")
    return options


def _preset(model: str) -> Path:
    family, _, size = model.partition("-")
    path = ROOT / "configs" / family / f"{size}.yaml"
    if not path.exists():
        found = sorted(f"{p.parent.name}-{p.stem}" for p in (ROOT / "configs").glob("*/*.yaml"))
        sys.exit(f"--model {model}: no {path.relative_to(ROOT)}; there are {', '.join(found)}")
    return path


def _common_flags(options: argparse.Namespace, folder: Path) -> list[str]:
    """What the trainer is told beside its preset: a null tokenizer over the preset's vocabulary, and no side work."""
    iterations = options.warmup_steps + options.steps
    deepspeed = (
        ["--deepspeed_config", str(Path(options.deepspeed_config).resolve())] if options.deepspeed_config else []
    )
    vocab_size = "4096" if options.model == "bloom-quickstart" else "250680" if "bloom" in options.model else "50257"
    return ["--tokenizer-type", "NullTokenizer", "--vocab-size", vocab_size, "--data-path", str(folder / "random"),
            "--train-iters", str(iterations), "--lr-warmup-iters", "1", "--eval-interval", "0", "--split", "100,0,0",
            "--log-interval", "1000000", *deepspeed]  # fmt: skip


def _write_corpus(prefix: Path, config: Any, options: argparse.Namespace) -> None:
    import numpy as np

    from megalm.data.indexed_writer import IndexedWriter

    samples = max(options.micro_batch_sizes or [config.training.micro_batch_size]) * options.num_micro_batches
    tokens = (config.data.seq_length + 1) * samples * (options.warmup_steps + options.steps + 1)
    vocab = config.model.vocab_size
    generator = np.random.default_rng(0)
    with IndexedWriter(prefix, np.uint16 if vocab < 65_500 else np.int32) as writer:
        for _ in range(16):
            writer.add_document(generator.integers(0, vocab, tokens // 16 + 1))


def _run_side(
    side: str, preset: Path, config: Any, options: argparse.Namespace, device: str, micro_batch_size: int, folder: Path
) -> Result:
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # every side has the same allocator
    if device == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    metrics = folder / "metrics.jsonl"
    if side == "megalm":
        metrics.unlink(missing_ok=True)
        command = [sys.executable, str(ROOT / "pretrain_gpt.py"), "--config", str(preset),
                   *_common_flags(options, folder), "--micro-batch-size", str(micro_batch_size),
                   "--global-batch-size", str(micro_batch_size * options.num_micro_batches),
                   "--metrics-path", str(metrics), *options.overrides]  # fmt: skip
    else:
        from stepping import Shape

        model = config.model
        shape = Shape(
            num_layers=model.num_layers, hidden_size=model.hidden_size, num_heads=model.num_heads,
            vocab_rows=model.padded_vocab_size, seq_length=config.data.seq_length, micro_batch_size=micro_batch_size,
            num_micro_batches=options.num_micro_batches, warmup_steps=options.warmup_steps, steps=options.steps,
            device=device, dtype=config.training.dtype, threads=options.threads,
        )  # fmt: skip
        command = [sys.executable, str(ROOT / "benchmarks" / "peers" / PEERS[side]), json.dumps(asdict(shape))]
    ended = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if options.logs:
        log = Path(options.logs) / f"{options.model}-{side}-{micro_batch_size}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(ended.stdout + ended.stderr, encoding="utf-8")
    if ended.returncode != 0:
        out_of_memory = "out of memory" in ended.stderr.lower()
        reason = "out of memory" if out_of_memory else ended.stderr.strip()[-2000:]
        return Result(side, micro_batch_size, failure=reason)
    if side != "megalm":
        found = json.loads(ended.stdout.strip().splitlines()[-1])
        return Result(found.get("side", side), micro_batch_size, tuple(found["seconds"]), found["peak_bytes"])
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"][options.warmup_steps :]
    peak = max(line.get("peak_memory_bytes") or 0 for line in steps)
    return Result(side, micro_batch_size, tuple(line["step_seconds"] for line in steps), peak)


def _joined(turns: list[Result]) -> Result:
    """One result of all rounds of a side; it is a failure if one of them was."""
    failures = [turn.failure or "no steps" for turn in turns if not turn.seconds]
    first = turns[0]
    if failures:
        of = f"{len(failures)} of {len(turns)} rounds failed: " if len(turns) > 1 else ""
        return Result(first.side, first.micro_batch_size, failure=of + failures[0])
    seconds = tuple(second for turn in turns for second in turn.seconds)
    return Result(first.side, first.micro_batch_size, seconds, max(turn.peak_bytes for turn in turns))


def _print_table(results: list[Result], config: Any, options: argparse.Namespace, peak_tflops: float) -> None:
    from megalm.models.flops import flops_per_token

    halved = flops_per_token(config.model, seq_length=config.data.seq_length)
    full = flops_per_token(config.model, seq_length=config.data.seq_length, causal=False)
    print(f"\n| side | micro-batch | ms a step | tokens/s | TFLOP/s | MFU of {peak_tflops:.3g} TFLOP/s "
          "| with full attention | peak GiB | trainer's tokens/s over it |\n|---|---|---|---|---|---|---|---|---|"
          )  # fmt: skip
    ours = {r.micro_batch_size: statistics.median(r.seconds) for r in results if r.side == "megalm" and r.seconds}
    for result in results:
        if not result.seconds:
            print(f"| {result.side} | {result.micro_batch_size} | {told(result.failure)} | | | | | | |")
            print(result.failure, file=sys.stderr)
            continue
        second = statistics.median(result.seconds)
        tokens = result.micro_batch_size * options.num_micro_batches * config.data.seq_length / second
        ratio = second / ours[result.micro_batch_size] if result.micro_batch_size in ours else float("nan")
        print(
            f"| {result.side} | {result.micro_batch_size} | {second * 1e3:.1f} | {tokens:,.0f} "
            f"| {tokens * halved / 1e12:.3g} | {tokens * halved / 1e12 / peak_tflops:.1%} "
            f"| {tokens * full / 1e12 / peak_tflops:.1%} | {result.peak_bytes / 2**30:.2f} | {ratio:.2f} |"
        )


def told(failure: str) -> str:
    """The line of what a process wrote that names its error."""
    lines = failure.splitlines() or ["no steps"]
    return next((line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)), lines[-1])


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {os.cpu_count()} cores"


def _matmul_tflops(threads: int) -> float:
    import torch

    from megalm.kernels.backend import choose

    torch.set_num_threads(threads)
    multiply = choose("linear", "auto", torch.device("cpu")).implementation.output
    a = torch.randn(1024, 1024)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        for _ in range(4):
            multiply(a, a, None)
        seconds.append((time.perf_counter() - started) / 4)
    return 2 * 1024**3 / min(seconds) / 1e12


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
