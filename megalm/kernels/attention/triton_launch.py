"""Launches of the Triton attention kernels: block sizes, tensor descriptors, grids."""

from __future__ import annotations

import contextlib
import functools
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megalm.kernels.attention import triton_backward, triton_forward
from megalm.kernels.triton_language import ceil_div, next_power_of_two

NORM_BLOCK = 128
"""Keys whose largest norm is one number of `attention_key_norms`."""

BITS_OF_16, BITS_OF_32 = 16, 24
"""Keys with weights that sum to less than 2^-bits of a row's largest weight are left out, by the size of the type."""

L2_BYTES = 32 << 20
"""What heads that run at once may read again and again: a Hopper GPU's L2 cache holds 50 MB."""


@dataclass(frozen=True)
class Blocks:
    """How one kernel is cut: queries and keys of a step, warps of a program, steps in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Cut:
    """The blocks of the three kernels."""

    forward: Blocks
    query_gradient: Blocks
    key_value_gradient: Blocks

    def __post_init__(self) -> None:
        by_query, by_key, rows = (self.forward, self.query_gradient), self.key_value_gradient, self.forward.queries
        # A block beside the diagonal has no causal mask; log-sum-exps are stored in whole blocks of the forward pass.
        whole = all(x.queries % x.keys == 0 for x in by_query) and by_key.keys % by_key.queries == 0
        # What the gradient of queries leaves for that of keys, it leaves in whole blocks as well.
        left = self.query_gradient.queries
        if not whole or rows % left or rows % by_key.queries or left % by_key.queries:
            raise ValueError(f"{self}: blocks must divide one another")


# Fixed rather than timed at run time: another cut sums in another order, and runs must repeat to the last bit.
# The fastest of those timed on a Hopper GPU (docs/log.md): one warpgroup a program and two or three programs on a
# multiprocessor, so that one's exponentials hide behind another's products; and small blocks, which find more keys out
# of sight. Random bits take registers: dropout has its own blocks.
_HALF_64 = Cut(Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3))
_HALF_128 = Cut(Blocks(64, 64, 4, 3), Blocks(64, 32, 4, 2), Blocks(64, 64, 4, 2))
_HALF_64_DROPOUT = Cut(Blocks(64, 32, 4, 3), Blocks(64, 32, 4, 3), Blocks(64, 64, 4, 2))
_HALF_128_DROPOUT = Cut(Blocks(64, 32, 4, 3), Blocks(64, 32, 4, 3), Blocks(32, 64, 4, 3))
_GROUPED = Blocks(32, 64, 4, 2)
_FP32 = Cut(Blocks(64, 32, 4, 2), Blocks(64, 32, 4, 1), Blocks(32, 32, 4, 1))


@dataclass(frozen=True)
class Extras:
    """What may be added to plain causal attention.

    Shapes: slopes [n] fp32, starts [b, s] int32, seed [1] int64 on the device of q.
    """

    slopes: Tensor | None = None
    starts: Tensor | None = None
    seed: Tensor | None = None
    dropout: float = 0.0

    @property
    def threshold(self) -> int:
        """Weights whose 31 random bits are below it are dropped."""
        return 0 if self.seed is None else min(int(self.dropout * 2**31), 2**31 - 1)

    @property
    def keep(self) -> float:
        """Fraction of the weights that is kept."""
        return 1.0 - self.threshold / 2**31

    def flags(self) -> dict[str, bool]:
        """What the kernels are specialised for."""
        present = self.slopes, self.starts, self.seed
        return dict(zip(("ALIBI", "STARTS", "DROPOUT"), (x is not None for x in present), strict=True))


def padded_head_size(head_size: int) -> int:
    """The power of two that holds a head, at least the 16 that a matrix product takes."""
    return max(16, next_power_of_two(head_size))


@functools.cache
def head_parts(head_size: int) -> tuple[int, int]:
    """The columns that a head is held in, a power of two and the rest's or 0: (64, 16) for 80, (128, 0) for 112."""
    padded = padded_head_size(head_size)
    if head_size == padded or padded == 16:
        return padded, 0
    rest = padded_head_size(head_size - padded // 2)
    return (padded // 2, rest) if padded // 2 + rest < padded else (padded, 0)


def cut_for(head_size: int, dtype: torch.dtype, *, dropout: bool = False, grouped: bool = False) -> Cut:
    """The blocks for heads of this size and type, `grouped` where several heads of queries share keys.

    Neither that nor dropout changes the queries of the forward pass, which the statistics are made for.
    """
    if dtype.itemsize > 2:
        return _FP32
    if head_parts(head_size)[0] <= 64:
        cut = _HALF_64_DROPOUT if dropout else _HALF_64
    else:
        cut = _HALF_128_DROPOUT if dropout else _HALF_128
    # The loop over the heads of a group takes registers, which larger blocks of queries would spill.
    return replace(cut, key_value_gradient=_GROUPED) if grouped else cut


def empty_statistics(q: Tensor) -> tuple[Tensor, Tensor]:
    """What the forward pass leaves for the backward pass besides its outputs.

    Shapes: q [b, n, s, d] -> lse [b, n, s in whole blocks] fp32 in base 2, first_key [b, n, blocks of queries] int32.
    """
    b, n, s, d = q.shape
    rows = cut_for(d, q.dtype).forward.queries
    blocks = ceil_div(s, rows)
    return q.new_empty(b, n, blocks * rows, dtype=torch.float32), q.new_empty(b, n, blocks, dtype=torch.int32)


def launch_forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, extras: Extras) -> tuple[Tensor, Tensor]:
    """Fill `out`; returns `empty_statistics`, filled. Shapes: q, out [b, n, s, d], k, v [b, n/g, s, d]."""
    b, n, s, d = q.shape
    blocks = cut_for(d, q.dtype, dropout=extras.seed is not None).forward
    lse, first_key = empty_statistics(q)
    if q.numel() == 0:
        return lse, first_key
    q, k, v = aligned(q), aligned(k), aligned(v)
    with _on(q.device):
        norms = _key_norms(k) if extras.slopes is not None else None
        triton_forward.attention_forward[(b * n * first_key.size(2),)](
            *_descriptors(q, blocks.queries), *_descriptors(k, blocks.keys), *_descriptors(v, blocks.keys),
            out, lse, first_key, extras.slopes, extras.starts, norms, extras.seed, *out.stride()[:3],
            n, s, 0 if norms is None else norms.size(2), _heads_at_once(k) * (n // k.size(1)),
            _scale(d) * math.log2(math.e), extras.threshold, extras.keep,
            GROUP=n // k.size(1), BITS=BITS_OF_16 if q.dtype.itemsize == 2 else BITS_OF_32,
            **_constants(q, blocks), **extras.flags(), **_options(blocks),
        )  # fmt: skip
    return lse, first_key


def launch_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    first_key: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    extras: Extras,
    *,
    sums: Tensor | None = None,
) -> None:
    """Fill the gradients of q, k and v, and `sums`, which `empty_sums` made, with their sums over blocks of positions.

    Shapes: as `launch_forward`; do as out, gradients as q, k, v.
    """
    b, n, s, d = q.shape
    if q.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return
    dq, dk, dv = gradients
    do, q, k, v, out = (aligned(x) for x in (do, q, k, v, out))
    group = n // k.size(1)
    cut = cut_for(d, q.dtype, dropout=extras.seed is not None, grouped=group > 1)
    delta = torch.empty_like(lse)
    shifted_lse = lse if extras.slopes is None else torch.empty_like(lse)
    shared = {"GROUP": group, "BOUND_BLOCK": cut.forward.queries, **extras.flags()}
    optional = extras.slopes, extras.starts, extras.seed
    shared["SUMS"] = sums is not None
    num_sums = 0 if sums is None else sums.size(1)
    counts = s, first_key.size(2), num_sums
    at_once, numbers = _heads_at_once(k), (_scale(d), extras.threshold, extras.keep)
    with _on(q.device):
        blocks = cut.query_gradient
        triton_backward.attention_query_gradient[(b * n * ceil_div(s, blocks.queries),)](
            *_descriptors(q, blocks.queries), *_descriptors(k, blocks.keys), *_descriptors(v, blocks.keys),
            *_descriptors(do, blocks.queries), *_descriptors(out, blocks.queries),
            dq, lse, shifted_lse, delta, sums, first_key,
            *optional, *dq.stride()[:3], n, *counts, at_once * group, *numbers,
            SHIFT_BLOCK=cut.key_value_gradient.queries,
            **shared, **_constants(q, blocks), **_options(blocks),
        )  # fmt: skip
        blocks = cut.key_value_gradient
        triton_backward.attention_key_value_gradient[(b * n // group * ceil_div(s, blocks.keys),)](
            *_descriptors(q, blocks.queries), *_descriptors(k, blocks.keys), *_descriptors(v, blocks.keys),
            *_descriptors(do, blocks.queries), dk, dv, lse, shifted_lse, delta, sums, first_key,
            *optional, *dk.stride()[:3], *dv.stride()[:3], n // group, *counts, at_once, *numbers,
            **shared, **_constants(q, blocks), **_options(blocks),
        )  # fmt: skip


def empty_sums(q: Tensor, *, dropout: bool) -> Tensor:
    """Where `launch_backward` puts sums over positions of dq, dk and dv, a block of positions apart.

    Shapes: q [b, n, s, d] -> [b, blocks, n, 3, d] fp32.
    """
    b, n, s, d = q.shape
    cut = cut_for(d, q.dtype, dropout=dropout)
    sizes = cut.query_gradient.queries, cut.key_value_gradient.keys
    # Where the two kernels' blocks differ, one of them leaves some places out.
    make = q.new_empty if sizes[0] == sizes[1] and q.numel() else q.new_zeros
    return make((b, ceil_div(s, min(sizes)), n, 3, d), dtype=torch.float32)


def aligned(x: Tensor) -> Tensor:
    """`x`, or a copy where the tensor memory accelerator could not read it: it asks for strides of 16 bytes."""
    unit = 16 // x.element_size()
    usable = x.stride(-1) == 1 and x.data_ptr() % 16 == 0
    if usable and all(stride > 0 and stride % unit == 0 for stride in x.stride()[:-1]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _heads_at_once(k: Tensor) -> int:
    """Heads of keys whose keys and values, or as many queries and gradients, take L2_BYTES."""
    return max(1, L2_BYTES // (2 * k.size(2) * k.size(3) * k.element_size()))


def _key_norms(k: Tensor) -> Tensor:
    b, n, s, d = k.shape
    norms = torch.empty(b, n, ceil_div(s, NORM_BLOCK), dtype=torch.float32, device=k.device)
    triton_forward.attention_key_norms[(b * n, norms.size(2))](
        k, norms, *k.stride()[:3], n, s, HEAD_SIZE=d, D=padded_head_size(d), BLOCK=NORM_BLOCK, num_warps=8
    )
    return norms


def _descriptors(x: Tensor, rows: int) -> list[Any]:
    """How blocks of `rows` positions of one head are read: one for each of `head_parts`, None for an empty one."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    shape, strides = list(x.shape), list(x.stride())
    parts = head_parts(x.size(-1))
    return [TensorDescriptor(x, shape, strides, [1, 1, rows, width]) if width else None for width in parts]


def _constants(q: Tensor, blocks: Blocks) -> dict[str, Any]:
    head_size = q.size(-1)
    main, rest = head_parts(head_size)
    return {
        "HEAD_SIZE": head_size,
        "D": main,
        "R": rest,
        "BLOCK_Q": blocks.queries,
        "BLOCK_K": blocks.keys,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }


def _options(blocks: Blocks) -> dict[str, int]:
    return {"num_warps": blocks.warps, "num_stages": blocks.stages}


def _scale(head_size: int) -> float:
    return 1.0 / math.sqrt(head_size)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
