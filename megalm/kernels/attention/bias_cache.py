"""The causal ALiBi bias, which depends on slopes, length and dtype alone, built once for all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megalm.kernels.alibi import alibi_bias
from megalm.kernels.attention.masks import causal_mask

MOST_ENTRIES = 256


@dataclass(frozen=True, eq=False)
class _Entry:
    slopes: Tensor
    version: int
    bias: Tensor  # [n, s, s]


class CausalAlibiCache:
    """slope * (j - i), and -inf where j > i, for the slopes that it is asked about.

    Layers that bring the same tensor are served by identity, without a look at its values; a layer that brings a copy
    shares the bias after one comparison. Shorter lengths are corners of the longest one seen.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[int, torch.dtype], _Entry] = {}

    def get(self, slopes: Tensor, num_positions: int, dtype: torch.dtype) -> Tensor:
        """Shapes: slopes [n] -> [n, s, s] of `dtype`, on the device of `slopes`."""
        key = (id(slopes), dtype)  # The entry holds the tensor, so its id is not given away.
        entry = self._entries.get(key)
        if entry is None or entry.version != _version(slopes) or entry.bias.size(-1) < num_positions:
            bias = self._bias_of_a_copy(slopes, num_positions, dtype)
            if bias is None:
                bias = _build(slopes, num_positions, dtype)
            if len(self._entries) >= MOST_ENTRIES:
                self._entries.clear()
            entry = self._entries[key] = _Entry(slopes, _version(slopes), bias)
        return entry.bias[:, :num_positions, :num_positions]

    def _bias_of_a_copy(self, slopes: Tensor, num_positions: int, dtype: torch.dtype) -> Tensor | None:
        for entry in self._entries.values():
            fits = entry.bias.dtype == dtype and entry.bias.size(-1) >= num_positions
            usable = entry.version == _version(entry.slopes) and entry.slopes.device == slopes.device
            if fits and usable and torch.equal(entry.slopes, slopes):
                return entry.bias
        return None


def _build(slopes: Tensor, num_positions: int, dtype: torch.dtype) -> Tensor:
    # A bias born in inference mode could not serve training afterwards.
    with torch.inference_mode(False), torch.no_grad():
        bias = alibi_bias(slopes, num_positions)
        return bias.masked_fill_(causal_mask(num_positions, slopes.device), float("-inf")).to(dtype)


def _version(slopes: Tensor) -> int:
    return 0 if slopes.is_inference() else slopes._version
