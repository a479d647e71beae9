"""A trained model in one process, out of a checkpoint of any layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megalm.checkpoint.identity import stored_model
from megalm.checkpoint.source import open_checkpoint
from megalm.models.gpt.build import plan_gpt
from megalm.models.gpt.model import GPT
from megalm.models.gpt.weights import named_in_model


def load_model(
    checkpoint: Path,
    *,
    dtype: torch.dtype = torch.float32,
    rounded_to: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GPT:
    """The model of a checkpoint on the CPU, in evaluation mode. Needs no torch.distributed.

    With `rounded_to`, weights go through that dtype on their way, as an export in it makes them. `progress` receives
    the bytes of each weight, and those of all in fp32.
    Raises: CheckpointError if the checkpoint is damaged.
    """
    source = open_checkpoint(checkpoint)
    model = GPT(plan_gpt(stored_model(source.manifest, path=checkpoint))).eval()
    parameters = dict(named_in_model(model, model.plan.shape))
    num_elements = sum(parameter.numel() for parameter in parameters.values())
    with torch.no_grad():
        for weight, tensor in source.layers.iterate():
            parameters[weight.name].copy_(tensor.to(rounded_to) if rounded_to is not None else tensor)
            if progress is not None:
                progress(4 * weight.numel, 4 * num_elements)
    model.requires_grad_(False)
    return model.to(dtype)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0


@torch.no_grad()
def continue_tokens(
    logits: Callable[[Tensor], Tensor],
    tokens: list[int],
    *,
    num_new: int,
    vocab_size: int,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    max_length: int | None = None,
    stop_id: int | None = None,
) -> list[int]:
    """`tokens` and up to `num_new` more, each chosen from `logits` [1, s, v] of all before it.

    Only the last `max_length` tokens are seen, where positions are learned. Rows past `vocab_size` are padding and
    never chosen.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    result = list(tokens)
    for _ in range(num_new):
        seen = result if max_length is None else result[-max_length:]
        last = logits(torch.tensor([seen]))[0, -1, :vocab_size]
        last = last.to(torch.promote_types(last.dtype, torch.float32))
        result.append(_choose(last, sampling, generator))
        if result[-1] == stop_id:
            break
    return result


def _choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    if sampling.top_k is not None:
        smallest = logits.topk(min(sampling.top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
