"""Random-number streams: equal over tensor-parallel ranks where masks must agree, different where they must not."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megalm.topology.group import Group


def derived_seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed that depends on `seed` and on every part of `purpose`, and on nothing else."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


class RngStreams:
    """The default stream and the tensor-parallel stream of this rank.

    Constructing one seeds the default generators of the CPU and of `device`. The default stream is the same over tp
    and differs over pp and dp: dropout of replicated activations draws from it. The tensor-parallel stream differs over
    tp as well: dropout of attention weights (other heads on each rank) and of sequence-parallel activations (other
    positions) draws from it, inside `with streams.tensor_parallel():`.
    """

    def __init__(self, seed: int, *, tp: Group, pp: Group, dp: Group, device: torch.device | None = None) -> None:
        device = device or torch.device("cpu")
        self._device = device
        default = derived_seed(seed, "default", pp.rank, dp.rank)
        torch.default_generator.manual_seed(default)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(default)
        tensor = torch.Generator(device).manual_seed(derived_seed(seed, "tensor", pp.rank, dp.rank, tp.rank))
        self._tensor_state = tensor.get_state()

    @contextlib.contextmanager
    def tensor_parallel(self) -> Iterator[None]:
        """Draw from the stream that differs over tp, and leave the default stream where it was."""
        default = self._get()
        self._set(self._tensor_state)
        try:
            yield
        finally:
            self._tensor_state = self._get()
            self._set(default)

    def tensor_parallel_state(self) -> Tensor:
        """Where the tensor-parallel stream stands, for `replay`."""
        return self._tensor_state

    @contextlib.contextmanager
    def replay(self, state: Tensor) -> Iterator[None]:
        """Let the tensor-parallel stream start from `state` again, then go on from where it was."""
        present = self._tensor_state
        self._tensor_state = state
        try:
            yield
        finally:
            self._tensor_state = present

    def state_dict(self) -> dict[str, Any]:
        """Every generator's state as tensors, for a checkpoint of this rank."""
        state: dict[str, Any] = {"cpu": torch.get_rng_state(), "tensor_parallel": self._tensor_state.clone()}
        if self._device.type == "cuda":
            state["device"] = self._get()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue every stream where `state_dict` left it."""
        torch.set_rng_state(state["cpu"])
        self._tensor_state = state["tensor_parallel"].clone()
        if self._device.type == "cuda":
            self._set(state["device"])

    def _get(self) -> Tensor:
        return torch.get_rng_state() if self._device.type == "cpu" else torch.cuda.get_rng_state(self._device)

    def _set(self, state: Tensor) -> None:
        if self._device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, self._device)
