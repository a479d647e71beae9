"""What every peer of benchmarks/train_step.py does around its model: read the shape, time whole steps, report."""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """What is trained and how much of it is one step."""

    num_layers: int
    hidden_size: int
    num_heads: int
    vocab_rows: int
    seq_length: int
    micro_batch_size: int
    num_micro_batches: int
    warmup_steps: int
    steps: int
    device: str
    dtype: str
    threads: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32


def read_shape() -> Shape:
    """The shape that train_step.py passes as JSON; sets threads and matrix precision as it asks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shape")
    shape = Shape(**json.loads(parser.parse_args().shape))
    torch.set_num_threads(shape.threads)
    torch.manual_seed(0)
    return shape


def random_batches(shape: Shape) -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels [b, s] of every micro-batch of one step, on the device."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(shape.num_micro_batches):
        ids = torch.randint(
            shape.vocab_rows, (shape.micro_batch_size, shape.seq_length + 1), generator=generator, dtype=torch.int64
        ).to(shape.device)
        batches.append((ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
    return batches


def train(
    shape: Shape,
    parameters: list[torch.nn.Parameter],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    *,
    fused: bool,
    side: str | None = None,
) -> None:
    """AdamW steps of several micro-batches with gradients clipped to norm 1; prints the result as one JSON line.

    `side` names what ran where that is not what was asked for.
    """
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
    batches = random_batches(shape)
    synchronize = torch.cuda.synchronize if shape.device == "cuda" else lambda: None
    seconds = []
    for _ in range(shape.warmup_steps + shape.steps):
        synchronize()
        started = time.perf_counter()
        total = torch.zeros((), device=shape.device)
        for tokens, labels in batches:
            loss = loss_of(tokens, labels) / shape.num_micro_batches
            loss.backward()
            total += loss.detach().float()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last_loss = total.item()
        synchronize()
        seconds.append(time.perf_counter() - started)
    if shape.device == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated()
    else:
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {"seconds": seconds[shape.warmup_steps :], "peak_bytes": peak_bytes, "loss": last_loss}
    print(json.dumps(result if side is None else {**result, "side": side}))
