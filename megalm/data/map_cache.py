"""Sample maps and orders of blends, kept in the cache.

The name of a map holds a digest of everything that it depends on, the lengths of the sequences included, so that a
changed corpus can never meet an old map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megalm.data.array_cache import Entry, cached_arrays
from megalm.data.blend import Dealing, deal
from megalm.data.indexed import fingerprint
from megalm.data.order import Order
from megalm.data.sample_map import SampleMap, build_sample_map

MAP_PARTS = ("documents", "samples", "shuffle")
DEALING_PARTS = ("choices", "numbers")
LARGE_DEALING = 1 << 26
"""Samples times corpora from which on the order of a blend is stored: below, computing it takes a moment."""


def cache_folder(prefix: str, cache_path: str | None) -> Path:
    """Where the maps of a corpus lie: in the folder that was asked for, else beside it."""
    return Path(cache_path) if cache_path is not None else Path(prefix).parent / "sample_maps"


def cached_sample_map(
    prefix: str,
    name: str,
    lengths: npt.NDArray[np.int32],
    split_range: tuple[int, int],
    *,
    num_samples: int,
    seq_length: int,
    seed: int,
    order: Order,
    cache_path: str | None = None,
    content: str | None = None,
    log: Callable[[str], None] | None = None,
) -> SampleMap:
    """The sample map of one split of a corpus; `content` is the fingerprint of `lengths`, if the caller has it.

    A cache folder that was asked for must be writable if it lacks the map; beside a corpus that is read-only the map
    stays in memory. Raises: DataError if the folder that was asked for cannot be written.
    """

    def build() -> dict[str, npt.NDArray[np.int64]]:
        built = build_sample_map(
            lengths, split_range, num_samples=num_samples, seq_length=seq_length, seed=seed, order=order
        )
        return {part: getattr(built, part) for part in MAP_PARTS}

    key = {
        "fingerprint": content or fingerprint(lengths),
        "split_range": list(split_range),
        "num_samples": num_samples,
        "seq_length": seq_length,
        "seed": seed,
        "order": order.name,
    }
    entry = Entry(cache_folder(prefix, cache_path), "sample map", f"{Path(prefix).name}-{name}", key, MAP_PARTS)
    return SampleMap(**cached_arrays(entry, build, must_store=cache_path is not None, log=log))


def cached_dealing(
    weights: Sequence[float],
    num_samples: int,
    *,
    prefix: str,
    name: str,
    cache_path: str | None = None,
    log: Callable[[str], None] | None = None,
) -> Dealing:
    """`deal` of normalised weights, from the cache where it is large; `prefix` is the first corpus of the blend.

    Raises: DataError if a folder that was asked for cannot be written.
    """
    if num_samples * len(weights) < LARGE_DEALING:
        return deal(weights, num_samples)

    def build() -> dict[str, npt.NDArray[np.int64]]:
        dealt = deal(weights, num_samples)
        return {part: getattr(dealt, part) for part in DEALING_PARTS}

    key = {"weights": list(weights), "num_samples": num_samples}
    entry = Entry(cache_folder(prefix, cache_path), "blend", f"{name}-{len(weights)}-corpora", key, DEALING_PARTS)
    return Dealing(**cached_arrays(entry, build, must_store=cache_path is not None, log=log))
