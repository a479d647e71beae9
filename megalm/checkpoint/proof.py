"""An export held against the trainer's own model: logits on real tokens, and a greedy continuation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megalm.checkpoint.pretrained import load_pretrained
from megalm.checkpoint.standalone import continue_tokens, load_model
from megalm.errors import CheckpointError

LOGIT_TOLERANCE = 1e-5
"""Absolute, of a logit or an activation, in fp64: there, two orders of summation differ by far less in any model. In
fp32 they differ by 1e-3 in some, which would hide a small mistake or refuse a right export."""


class Widened(TorchFunctionMode):
    """Lets transformers compute in fp64 where it asks for fp32 by name, as in Bloom's softmax."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        wide = any(isinstance(value, torch.Tensor) and value.dtype == torch.float64 for value in args)
        if wide and given.get("dtype") is torch.float32:
            given["dtype"] = torch.float64
        return func(*args, **given)


@dataclass(frozen=True)
class Proof:
    """What the comparison found."""

    num_tokens: int
    largest_difference: float
    """Of a logit, absolute."""
    largest_logit: float
    num_prompt: int
    ours: list[int]
    theirs: list[int]
    """The prompt and its greedy continuation by transformers."""

    def __str__(self) -> str:
        return (
            f"logits of {self.num_tokens} tokens equal transformers' to {self.largest_difference:.1e} (the largest is "
            f"{self.largest_logit:.1f}), and so does a greedy continuation of {len(self.ours) - self.num_prompt} tokens"
        )


@torch.no_grad()
def prove_export(
    folder: Path,
    checkpoint: Path,
    *,
    tokens: torch.Tensor,
    num_new: int = 20,
    vocab_size: int,
    dtype: torch.dtype,
) -> Proof:
    """Compare transformers' model of `folder` with megalm's of `checkpoint`, both in fp64.

    `tokens` [b, s] are real ones; the first of them are continued greedily. `dtype` is the export's, to which
    megalm's weights are rounded as well.
    Raises: CheckpointError if keys are missing or left over, logits differ by more than LOGIT_TOLERANCE, or the
    continuations are not the same.
    """
    theirs = load_pretrained(folder, dtype=torch.float64)
    ours = load_model(checkpoint, rounded_to=dtype, dtype=torch.float64)
    largest_difference = largest = 0.0
    for sample in tokens:
        with Widened():
            expected, actual = ours(sample[None]), theirs(sample[None]).logits
        if not torch.isfinite(expected).all():
            raise CheckpointError(
                f"the trainer's own logits are not finite with its weights in {str(dtype).removeprefix('torch.')}\n"
                "  nothing was published; another --dtype holds larger numbers, or the run has diverged"
            )
        difference = (expected - actual).abs().max().item()
        if not difference <= LOGIT_TOLERANCE:  # nor is NaN
            raise CheckpointError(
                f"the export's logits differ from the trainer's by {difference:.3e} in fp64, more than "
                f"{LOGIT_TOLERANCE:.0e}\n  nothing was published; this is a defect of the export"
            )
        largest_difference = max(largest_difference, difference)
        largest = max(largest, expected.abs().max().item())
    prompt = tokens[0, : max(1, tokens.size(1) // 2)].tolist()
    length = ours.plan.shape.num_positions
    num_new = num_new if length is None else min(num_new, length - len(prompt))
    with Widened():
        own = continue_tokens(ours, prompt, num_new=num_new, vocab_size=vocab_size)
        other = continue_tokens(lambda seen: theirs(seen).logits, prompt, num_new=num_new, vocab_size=vocab_size)
    if own != other:
        new = slice(len(prompt), None)
        raise CheckpointError(f"greedy continuations differ: {own[new]} by the trainer, {other[new]} by transformers")
    return Proof(tokens.numel(), largest_difference, largest, len(prompt), own, other)
