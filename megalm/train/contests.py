"""Kernels that a run tries on its GPU before it takes them, and what its folder remembers of that.

What is measured may come out otherwise after a restart, and a run that goes on must compute as it did: it finds the
verdict of its start beside its checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint.durable import make_folder, replace_text, writing_to
from megalm.checkpoint.layout import KERNELS, parse_step
from megalm.config.checks import gelu_linear_needs
from megalm.config.root import Config
from megalm.kernels import trial
from megalm.kernels.adamw.protocol import AdamWKernel
from megalm.kernels.backend import CHALLENGERS, Verdict, obstacle_of
from megalm.kernels.bias_gelu.protocol import BiasGeluKernel

HOPPER = (9, 0)
"""Compute capability. Before it, products with the GELU inside are reported to be slower (karpathy/llm.c pull request
653)."""
_KEYS = {"on", "is_better", "reason"}


class Contests:
    """The contests of one rank. `dtype` is that of activations."""

    def __init__(self, config: Config, device: torch.device, *, dtype: torch.dtype) -> None:
        self._config, self._device, self._dtype = config, device, dtype
        self._recorded = _recorded(config.output.load)
        self._verdicts: dict[str, tuple[str, Verdict]] = {}
        """Where it was tried, and how it went, of operations."""

    def gelu_linear(self) -> Callable[[BiasGeluKernel], Verdict] | None:
        """Whether the GELU is to be inside the MLP's products; None where there is nothing to try."""
        config, name = self._config, CHALLENGERS["gelu_linear"]
        if not self._is_open("gelu_linear") or not all(holds for _, holds, _ in gelu_linear_needs(config, name)):
            return None
        model = config.model
        sizes = {
            "num_tokens": config.training.micro_batch_size * config.data.seq_length,
            "hidden_size": model.hidden_size,
            "ffn_size": model.ffn_size,
        }

        def contest(bias_gelu: BiasGeluKernel) -> Verdict:
            trying = partial(trial.gelu_inside, name, bias_gelu, device=self._device, dtype=self._dtype, **sizes)
            return self._verdict("gelu_linear", trying, f"{self._dtype}, {' x '.join(map(str, sizes.values()))}")

        return contest

    def adamw(self) -> Callable[[], Verdict] | None:
        """Whether the update is to be in one pass; None where there is nothing to try."""
        if not self._is_open("adamw"):
            return None
        from megalm.kernels.adamw.triton_adamw import TritonAdamW

        kernel: AdamWKernel = TritonAdamW()
        return lambda: self._verdict("adamw", partial(trial.update, kernel, device=self._device), "")

    def record(self, names: Mapping[str, str]) -> None:
        """Keep how it went where the run saves, after all ranks agreed on the implementations `names`.

        Raises: CheckpointError if it cannot be written.
        """
        tried = {operation: found for operation, found in self._verdicts.items() if operation in names}
        if self._config.output.save is None or self._config.training.eval_only or not tried:
            return
        folder = Path(self._config.output.save)
        known = _recorded(folder) | {
            operation: {"on": on, "is_better": names[operation] == CHALLENGERS[operation], "reason": verdict.reason}
            for operation, (on, verdict) in tried.items()
        }
        with writing_to(folder / KERNELS):
            make_folder(folder)
            replace_text(folder / KERNELS, json.dumps(known, indent=1) + "\n")

    def _is_open(self, operation: str) -> bool:
        return (
            self._config.get(f"output.{operation}") == "auto"
            and obstacle_of(operation, CHALLENGERS[operation], self._device) is None
            and torch.cuda.get_device_capability(self._device) >= HOPPER
        )

    def _verdict(self, operation: str, contest: Callable[[], Verdict], sizes: str) -> Verdict:
        on = f"{torch.cuda.get_device_name(self._device)}, torch {torch.__version__}, {sizes}"
        known = self._recorded.get(operation)
        if known is not None and known["on"] == on:
            verdict = Verdict(known["is_better"], known["reason"])
        else:
            verdict = trial.in_a_process(contest, device=self._device)
        self._verdicts[operation] = (on, verdict)
        return verdict


def _recorded(folder: str | Path | None) -> dict[str, dict[str, Any]]:
    """What a run has kept in its folder, or beside the step's folder that is named; nothing where it cannot be read."""
    if folder is None:
        return {}
    path = Path(folder)
    place = path if parse_step(path.name) is None else path.parent
    try:
        found = json.loads((place / KERNELS).read_text(encoding="utf-8"))
        return {name: found[name] for name in CHALLENGERS if name in found and found[name].keys() >= _KEYS}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
