"""The named orders in which samples can be dealt: each is that of one existing trainer, so that its runs can go on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megalm.data.split import bounds_by_rounding, bounds_by_shift
from megalm.errors import DataError

SURPLUS = 1.005
"""A blended corpus is asked for 0.5 % more samples than its share, since the deficit order is not exactly the share."""


@dataclass(frozen=True)
class Order:
    """The three rules in which the sample orders of the existing trainers differ."""

    name: str
    final_epoch_share: float
    """A last epoch with fewer than this share of an epoch's samples is shuffled apart from the others."""
    share: Callable[[int, float], int]
    """(samples of the blend, normalised weight) -> samples asked of one corpus."""
    bounds: Callable[[str, int], list[tuple[int, int]]]
    """(split text, sequences) -> [begin, end) of training, validation and test."""


BIGSCIENCE = Order("bigscience", 0.95, lambda total, weight: int(math.ceil(total * weight * SURPLUS)), bounds_by_shift)
MEGATRON_CORE = Order(
    "megatron-core", 0.80, lambda total, weight: int(math.ceil(math.ceil(total * weight) * SURPLUS)), bounds_by_rounding
)
ORDERS = {order.name: order for order in (BIGSCIENCE, MEGATRON_CORE)}


def order_named(name: str) -> Order:
    """The order called `name`."""
    if name not in ORDERS:
        raise DataError(f"sample order {name!r} does not exist\n  orders that do: {', '.join(ORDERS)}")
    return ORDERS[name]
