"""What the loader draws from: a numbered sequence of samples."""

from __future__ import annotations

from typing import Any, Protocol

import numpy.typing as npt


class SampleSource(Protocol):
    """Samples 0 to len - 1, each seq_length + 1 token ids as int64; reading one never changes another."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> npt.NDArray[Any]: ...
