"""Whether what every rank of a group should hold alike is alike, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megalm.parallel.collectives import all_gather_into
from megalm.parallel.shard import partition_dim
from megalm.topology.group import Group

# Elements hashed at a time: bounds the memory of the int64 products to 64 MB.
_CHUNK = 2**22
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def replica_difference(
    parameters: Iterable[tuple[str, nn.Parameter]], group: Group, *, include_sharded: bool = False
) -> list[str]:
    """Names of the parameters whose bits differ between ranks of `group`; the same list on every rank.

    Over tensor-parallel ranks, parameters that are cut differ by design and are left out; over data-parallel ranks they
    are replicas too, and `include_sharded` compares them. Every rank must pass the same names in the same order.
    Communicates: one all-gather of 8 bytes for each parameter over `group`.
    """
    replicated = [pair for pair in parameters if include_sharded or partition_dim(pair[1]) is None]
    if group.size == 1 or not replicated:
        return []
    ours = torch.stack([bit_checksum(parameter.detach()) for _, parameter in replicated])
    everyone = ours.new_empty((group.size * len(replicated),))
    all_gather_into(everyone, ours, group=group.handle)
    equal = (everyone.view(group.size, -1) == ours).all(dim=0).tolist()
    return [name for (name, _), same in zip(replicated, equal, strict=True) if not same]


def bit_checksum(tensor: Tensor) -> Tensor:
    """A 64-bit checksum, as an int64 scalar, that any single changed bit changes.

    Bits are summed modulo 2^64 with an odd factor for each position: a change of one element changes its term, as an
    odd factor is invertible, and exchanged elements change it too, as neighbours have different factors.
    """
    bits = tensor.contiguous().view(-1).view(_INTEGER[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        factors = torch.arange(start, start + part.numel(), dtype=torch.int64, device=tensor.device)
        total += (part * (factors * 0x9E3779B1 * 2 + 1)).sum()
    return total
