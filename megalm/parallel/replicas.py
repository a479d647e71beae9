"""Whether what several ranks should hold alike is alike, bit for bit."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.parallel.collectives import all_gather_into
from megalm.parallel.shard import partition_dim
from megalm.topology.agree import exchange
from megalm.topology.group import SOLO, Group

_NUM_WORDS = 2**20
"""Words of 32 bits hashed at a time: their products take 8 MB."""
_MULTIPLIER = 0x9E3779B1


@dataclass(frozen=True)
class Copies:
    """Parameters that some ranks of a group hold alike."""

    axis: str
    group: Group
    names: tuple[str, ...]
    holders: tuple[int, ...]
    """Positions in the group."""


@dataclass(frozen=True, order=True)
class Drift:
    """Parameters whose copies differ."""

    axis: str
    ranks: tuple[int, ...]
    """Global ranks that should hold them alike."""
    odd: tuple[int, ...]
    """Those of them that differ from the majority; none where there is no majority."""
    names: tuple[str, ...]


def copies_of(
    parameters: Sequence[tuple[str, nn.Parameter]],
    *,
    tp: Group,
    dp: Group = SOLO,
    pp: Group = SOLO,
    shared_out: bool = False,
    tied: Collection[str] = (),
) -> list[Copies]:
    """What this rank should hold alike with others: over tp what is not cut; over dp everything, unless replicas share
    out every parameter as in ZeRO-3; over pp what is `tied` between the first and the last stage."""
    names = tuple(name for name, _ in parameters)
    whole = tuple(name for name, parameter in parameters if partition_dim(parameter) is None)
    found = [
        Copies("tp", tp, whole, tuple(range(tp.size))),
        Copies("dp", dp, () if shared_out else names, tuple(range(dp.size))),
        Copies("pp", pp, tuple(sorted(tied)), (0, pp.size - 1)),
    ]
    return [copies for copies in found if copies.group.size > 1 and copies.names]


def find_drift(
    tensors: Mapping[str, Tensor], copies: Sequence[Copies], *, world: Group, device: torch.device
) -> list[Drift]:
    """The copies that differ; the same list on every rank. `tensors` holds those of this rank by name.

    `device` is where the groups communicate; it is read once, at the end.
    Communicates: an all-gather of 8 bytes for each name over each of the groups, one all-reduce of 8 bytes over the
    world; where copies differ, one all-gather of small objects over the world.
    """
    if world.size == 1:
        return []
    wanted = {name for one in copies for name in one.names}
    sums = {name: bit_checksum(tensor).to(device) for name, tensor in tensors.items() if name in wanted}
    absent = torch.zeros((), dtype=torch.int64, device=device)  # of what a stage in the middle does not hold
    tables, num_unequal = [], absent.clone()
    for one in copies:
        ours = torch.stack([sums.get(name, absent) for name in one.names])
        table = ours.new_empty((one.group.size * len(one.names),))
        all_gather_into(table, ours, group=one.group.handle)
        table = torch.stack([table.view(one.group.size, -1)[holder] for holder in one.holders])
        num_unequal += (table != table[0]).sum()
        tables.append(table)
    torch.distributed.all_reduce(num_unequal, group=world.handle)
    if not num_unequal.item():
        return []
    own = [drift for one, table in zip(copies, tables, strict=True) for drift in _drifts(one, table.t().tolist())]
    return sorted({drift for drifts in exchange(own, world) for drift in drifts})


def _drifts(copies: Copies, checksums: list[list[int]]) -> list[Drift]:
    """`checksums` holds those of all holders for each name."""
    ranks = tuple(copies.group.ranks[holder] for holder in copies.holders)
    names: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, values in zip(copies.names, checksums, strict=True):
        value, count = Counter(values).most_common(1)[0]
        if count == len(values):
            continue
        has_majority = 2 * count > len(values)
        odd = [rank for rank, other in zip(ranks, values, strict=True) if other != value] if has_majority else []
        names[tuple(odd)].append(name)
    return [Drift(copies.axis, ranks, odd, tuple(found)) for odd, found in names.items()]


def bit_checksum(tensor: Tensor) -> Tensor:
    """A 64-bit checksum, as an int64 scalar, that any single changed bit changes.

    Words of 32 bits are summed modulo 2^64 with an odd factor for each position: a change of one word changes its term,
    as an odd factor is invertible, and exchanged words change it too, as neighbours have different factors. The factors
    repeat after a million words, whose sum is multiplied before the next ones are added.
    """
    data = tensor.contiguous().view(-1).view(torch.uint8)
    num_words = min(_NUM_WORDS, -(-data.numel() // 4))
    factors = torch.arange(num_words, dtype=torch.int64, device=data.device) * (2 * _MULTIPLIER) + 1
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for part in data.split(4 * _NUM_WORDS):
        if part.numel() % 4 or part.storage_offset() % 4:  # A copy is aligned.
            part = F.pad(part, (0, -part.numel() % 4))
        words = part.view(torch.int32)
        total = total * _MULTIPLIER + (words * factors[: words.numel()]).sum()
    return total
