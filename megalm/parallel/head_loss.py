"""Head and cross-entropy in one: the logits of some tokens at a time, never of all.

Each chunk of tokens takes one product for its logits [c, v/t], which the gradient then overwrites, and two products for
the gradients of the hidden states and of the weight. Doing that in forward spares backward a fourth product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megalm.kernels.cross_entropy.protocol import VocabularyRows
from megalm.kernels.linear.protocol import LinearKernel
from megalm.parallel.collectives import all_gather_into
from megalm.parallel.embedding import local_ids
from megalm.parallel.gradient_sum import gradient_sum_of
from megalm.topology.group import Group

# Of logits and their temporaries. On a GPU 2,048 tokens of BLOOM's vocabulary, which is 980 MiB: products of that many
# rows fill 132 processors, and with cuBLAS's workspace of 32 MiB it stays below 1 GiB. From 16,384 tokens on, whose
# activations take more as well, chunks are twice as large, and the products 1 to 2 % faster (docs/log.md).
# On a CPU what its caches hold.
GPU_CHUNK_BYTES, TOKENS_OF_TWICE = 980 * 2**20, 16_384
CPU_CHUNK_BYTES = 24 * 2**20
# Fewer make the matrix products slower than a larger chunk makes the rest.
LEAST_TOKENS = 128


def head_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    *,
    tp: Group,
    rows: VocabularyRows,
    kernel: LinearKernel,
    z_loss: float = 0.0,
    chunk_bytes: int | None = None,
) -> Tensor:
    """The weighted sum over tokens of -log softmax(x weight^T)[label], and of z_loss * log_sum^2 if that is not 0.

    Gradients are computed in forward, once, so that backward can run once. fp16 is the exception: its gradients need
    the loss scale that only backward knows, so backward computes the logits again.

    The weight's gradient goes to its `GradientSum`, if it has one; autograd then gets none. A token of weight 0 whose
    logits are not finite makes the loss NaN all the same: no mask hides a broken model.

    x's gradient is this rank's part of a sum over tp: enter through `copy_to` or `gather_sequence`. Where several
    chunks add up to the weight's gradient, they add up in fp32 if that fits into chunk_bytes too, otherwise in the
    dtype of the weight, with one rounding a chunk (four for 8,192 tokens of BLOOM-1b7 on one GPU).

    Shapes: x [..., h], weight [v/t, h], labels [...] global ids, token_weights [...] fp32 -> scalar fp32.
    Units: nats, if the weights sum to 1.
    Communicates: per chunk, one all-gather over tp of three numbers a token.
    Raises: RuntimeError (a device assertion on GPUs) for a label outside the vocabulary; in a second backward.
    Source: Shoeybi et al. 2019, arXiv:1909.08053; z-loss: Chowdhery et al. 2022, sec. 5, arXiv:2204.02311.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    flat = x.reshape(-1, x.size(-1))  # [..., h] -> [N, h]
    weights = token_weights.reshape(-1).to(wide)
    if chunk_bytes is None:
        chunk_bytes = CPU_CHUNK_BYTES
        if x.device.type != "cpu":
            chunk_bytes = GPU_CHUNK_BYTES * (2 if flat.size(0) >= TOKENS_OF_TWICE else 1)
    task = _Task(tp, rows, kernel, z_loss, chunk_bytes)
    differentiates = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    total: Tensor = _HeadCrossEntropy.apply(flat, weight, labels.reshape(-1), weights, task, differentiates)
    return total


def chunk_size(num_tokens: int, *, bytes_per_token: int, chunk_bytes: int) -> int:
    """Tokens of a chunk: as many as fit, in chunks of about equal size, of which all but the last are multiples of 64.

    At least LEAST_TOKENS, however large the vocabulary.
    """
    most = max(LEAST_TOKENS, chunk_bytes // max(1, bytes_per_token))
    if most >= num_tokens:
        return max(1, num_tokens)
    most -= most % 64
    num_chunks = math.ceil(num_tokens / most)
    return math.ceil(num_tokens / num_chunks / 64) * 64


@dataclass(frozen=True)
class _Task:
    tp: Group
    rows: VocabularyRows
    kernel: LinearKernel
    z_loss: float
    chunk_bytes: int


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, task: _Task, differentiates: bool
    ) -> Tensor:
        ctx.task, ctx.gradients, ctx.total = task, None, gradient_sum_of(weight)
        recomputes = x.dtype == torch.float16
        gradients = _Gradients(x, weight, task) if differentiates and not recomputes else None
        losses, log_sums = _chunks(x, weight, labels, weights, task, gradients)
        if gradients is not None:
            ctx.gradients = gradients
        elif differentiates:
            ctx.save_for_backward(x, weight, labels, weights, log_sums)
        return (losses * weights).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        upstream = grads[0]
        gradients = ctx.gradients
        if gradients is None:
            if not ctx.saved_tensors:
                raise RuntimeError("the fused head computes its gradients once; run forward again before backward")
            x, weight, labels, weights, log_sums = ctx.saved_tensors
            gradients = _Gradients(x, weight, ctx.task)
            _chunks(x, weight, labels, weights * upstream, ctx.task, gradients, log_sums)
            assert gradients.factors is None, "rows with a known log_sum have no factors"
            return gradients.x, gradients.weight.to(weight.dtype), None, None, None, None
        ctx.gradients = None
        ctx.task.rows.scale_(gradients.x, upstream, gradients.factors)
        if ctx.total is not None:
            ctx.total.add(gradients.weight, factor=upstream)
            return gradients.x, None, None, None, None, None
        ctx.task.rows.scale_(gradients.weight, upstream)
        return gradients.x, gradients.weight.to(gradients.x.dtype), None, None, None, None


class _Gradients:
    """The gradients of hidden states and weight, which grow by one chunk after the other."""

    def __init__(self, x: Tensor, weight: Tensor, task: _Task) -> None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        in_fp32 = _sums_in_fp32(x, weight, task)
        self._kernel, self._rows, self._in_place = task.kernel, task.rows, _writes_in_place(task.kernel)
        self.x = torch.empty_like(x)
        self.factors: Tensor | None = None
        """What each row of x's gradient still has to be multiplied by, [N] fp32."""
        if in_fp32 or x.size(0) == 0:
            self.weight = torch.zeros_like(weight, dtype=wide)
        else:
            self.weight = torch.empty_like(weight)  # The first chunk fills it.

    def add(
        self, start: int, stop: int, logit_gradient: Tensor, x: Tensor, weight: Tensor, factors: Tensor | None
    ) -> None:
        """One chunk: logit_gradient [c, v/t], each row over its factor [c] if there are any, x [c, h]."""
        scaled = x if factors is None else self._rows.scaled(x, factors)
        if not self._in_place:
            self.x[start:stop] = self._kernel.input_gradient(logit_gradient, weight)
            product = self._kernel.weight_gradient(logit_gradient, scaled)
            self.weight = product if start == 0 and product.dtype == self.weight.dtype else self.weight.add_(product)
        else:
            torch.mm(logit_gradient, weight, out=self.x[start:stop])
            if self.weight.dtype != x.dtype:
                self.weight.add_(torch.mm(logit_gradient.t(), scaled))
            elif start == 0:
                torch.mm(logit_gradient.t(), scaled, out=self.weight)
            else:
                self.weight.addmm_(logit_gradient.t(), scaled)
        if factors is not None:
            if self.factors is None:
                self.factors = factors.new_empty(self.x.size(0))
            self.factors[start:stop] = factors


def _sums_in_fp32(x: Tensor, weight: Tensor, task: _Task) -> bool:
    size = _tokens_of_a_chunk(x, weight, task)
    used = size * weight.size(0) * task.rows.bytes_per_logit(x.dtype)
    # The sum lies beside one chunk's product, which the matrix product rounds to the dtype of its operands.
    fits = used + weight.numel() * (4 + weight.element_size()) <= task.chunk_bytes
    return size < x.size(0) and (fits or weight.device.type == "cpu")


def _writes_in_place(kernel: LinearKernel) -> bool:
    """Whether the products are torch's own, which can write into, and add to, memory that there is."""
    return kernel.name == "torch"


def _tokens_of_a_chunk(x: Tensor, weight: Tensor, task: _Task) -> int:
    bytes_per_token = weight.size(0) * task.rows.bytes_per_logit(x.dtype)
    return chunk_size(x.size(0), bytes_per_token=bytes_per_token, chunk_bytes=task.chunk_bytes)


def _chunks(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    task: _Task,
    gradients: _Gradients | None,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and log_sum [N] of every token, and the gradients, if asked for; `known` is log_sum from an earlier run."""
    local, elsewhere = local_ids(labels, weight.size(0) * task.tp.size, tp=task.tp)
    columns = local.masked_fill(elsewhere, -1)
    size = _tokens_of_a_chunk(x, weight, task)
    losses, log_sums = torch.zeros_like(weights), torch.zeros_like(weights) if known is None else known
    in_place = _writes_in_place(task.kernel)
    buffer = _logits_buffer(x, min(size, x.size(0)) if in_place else 0, weight.size(0))
    for start in range(0, x.size(0), size):
        part = slice(start, min(start + size, x.size(0)))
        # [c, h] -> [c, v/t]
        if in_place:
            logits = torch.mm(x[part], weight.t(), out=buffer[: part.stop - start])
        else:
            logits = task.kernel.output(x[part], weight, None)
        target = logits.gather(-1, local[part].unsqueeze(-1)).squeeze(-1).to(weights.dtype)
        target, factors = target.masked_fill_(elsewhere[part], 0.0), None
        if known is None and gradients is not None and task.tp.size == 1:
            log_sums[part], factors = task.rows.log_sum_and_gradient_(
                logits, columns[part], weights[part], z_loss=task.z_loss
            )
        else:
            if known is None:
                log_sums[part], target = _over_ranks(*task.rows.statistics(logits), target, task.tp)
            if gradients is not None:
                task.rows.gradient_(logits, columns[part], log_sums[part], weights[part], z_loss=task.z_loss)
        losses[part] = log_sums[part] - target + task.z_loss * log_sums[part].square()
        if gradients is not None:
            gradients.add(start, part.stop, logits, x[part], weight, factors)
    return losses, log_sums


def _logits_buffer(x: Tensor, num_tokens: int, num_columns: int) -> Tensor:
    """Memory for a chunk's logits [c, v/t].

    On a CPU rows do not start a multiple of 4 KB apart: the weight's gradient reads down columns, which would then all
    compete for the same few lines of the L1 cache (40 against 49 GFLOP/s with 4,096 columns, docs/log.md).
    """
    line, page = 64 // x.element_size(), 4096 // x.element_size()
    padding = line if x.device.type == "cpu" and num_columns % page == 0 else 0
    return x.new_empty((num_tokens, num_columns + padding))[:, :num_columns]


def _over_ranks(peak: Tensor, total: Tensor, target: Tensor, tp: Group) -> tuple[Tensor, Tensor]:
    """log_sum and target logit over the whole vocabulary. Shapes: [c] -> [c]."""
    if tp.size == 1:
        return peak + total.log(), target
    ours = torch.stack((peak, total, target))
    every = ours.new_empty((tp.size, *ours.shape))
    all_gather_into(every, ours.unsqueeze(0), group=tp.handle)
    peaks, totals, targets = every.unbind(1)  # [t, 3, c] -> 3 of [t, c]
    highest = peaks.amax(dim=0)
    return highest + (totals * (peaks - highest).exp()).sum(dim=0).log(), targets.sum(dim=0)
