"""Initial weights that do not depend on the layout.

Each weight is drawn whole from generators seeded by (run seed, the weight's name, block of rows), and a rank keeps its
part. So any tp, pp, dp starts from the same model, and a rank holds at most one block of rows a thread beside its own
part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalm.parallel.random import derived_seed
from megalm.parallel.shard import partition_dim
from megalm.topology.group import Group

# Elements drawn at a time: 16 MB of fp32. Part of the definition of the weights, as it decides what each seed draws.
BLOCK_ELEMENTS = 2**22


@dataclass(frozen=True)
class Normal:
    """Independent values of mean 0."""

    std: float


@dataclass(frozen=True)
class Constant:
    """One value everywhere."""

    value: float


Rule = Normal | Constant


def initialise(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    seed: int,
    tp: Group,
    rule: Callable[[str], Rule],
    num_threads: int = 1,
) -> None:
    """Fill each parameter, given with its layout-independent name, as `rule(name)` says.

    Values are drawn in fp32 on the CPU whatever the parameter's dtype and device, and whatever the number of threads
    that draw them.
    """
    with ThreadPoolExecutor(num_threads) as threads:
        for name, parameter in parameters:
            chosen = rule(name)
            with torch.no_grad():
                if isinstance(chosen, Constant):
                    parameter.fill_(chosen.value)
                else:
                    _draw(name, parameter, seed=seed, tp=tp, std=chosen.std, threads=threads)


def _draw(name: str, parameter: nn.Parameter, *, seed: int, tp: Group, std: float, threads: ThreadPoolExecutor) -> None:
    dim = partition_dim(parameter)
    ours = parameter.detach().view(parameter.size(0), -1)
    rows, columns = ours.shape
    first_row = tp.rank * rows if dim == 0 else 0
    num_columns = columns * tp.size if dim == 1 else columns
    wanted = range(first_row, first_row + rows)
    total_rows = rows * tp.size if dim == 0 else rows

    def fill(block: int) -> None:
        low, kept = _rows_of_block(name, block, wanted, total=(total_rows, num_columns), seed=seed, std=std)
        if dim == 1:
            kept = kept.narrow(1, tp.rank * columns, columns)
        ours[low - first_row : low - first_row + kept.size(0)].copy_(kept)

    for _ in threads.map(fill, _blocks_of(wanted, num_columns)):
        pass


def drawn_rows(
    name: str, wanted: range, *, total: tuple[int, int], seed: int, std: float
) -> Iterator[tuple[int, Tensor]]:
    """The initial values of some rows of a weight whose shape is `total`: (first row, values), a block at a time."""
    for block in _blocks_of(wanted, total[1]):
        yield _rows_of_block(name, block, wanted, total=total, seed=seed, std=std)


def _blocks_of(wanted: range, num_columns: int) -> range:
    rows = _rows_at_a_time(num_columns)
    return range(wanted.start // rows, (wanted.stop - 1) // rows + 1)


def _rows_of_block(
    name: str, block: int, wanted: range, *, total: tuple[int, int], seed: int, std: float
) -> tuple[int, Tensor]:
    """The rows of one block that are wanted, and the first one's number."""
    total_rows, num_columns = total
    rows = _rows_at_a_time(num_columns)
    start = block * rows
    drawn = _block(min(rows, total_rows - start), num_columns, derived_seed(seed, name, block), std)
    low, high = max(start, wanted.start), min(start + drawn.size(0), wanted.stop)
    return low, drawn[low - start : high - start]


def _rows_at_a_time(num_columns: int) -> int:
    return max(1, BLOCK_ELEMENTS // num_columns)


def _block(rows: int, columns: int, seed: int, std: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(rows, columns, dtype=torch.float32).normal_(0.0, std, generator=generator)
