"""Ends a run whose copies of parameters have drifted apart, before a checkpoint has them.

Tensor-parallel ranks each hold every LayerNorm, replicas all parameters, the first and the last stage the tied
embedding. They stay equal because each computes the same, and nothing brings them together again when one does not:
a GPU that errs, or a bit that flips.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from megalm.checkpoint import layout
from megalm.checkpoint.restore import named_parameters
from megalm.config.root import Config
from megalm.errors import ReplicaError, listed
from megalm.parallel.replicas import Drift, copies_of, find_drift
from megalm.topology.agree import exchange
from megalm.topology.group import Group
from megalm.topology.topology import Topology

TIED = "word_embeddings.weight"
MOST_LINES = 16
MOST_NAMES = 8


class ReplicaCheck:
    """Compares what trains: in 16 bits the weights, of whose fp32 masters each replica keeps a part of its own."""

    def __init__(self, module: nn.Module, config: Config, topology: Topology) -> None:
        """`module` is this rank's part of the model, in its engine."""
        self._topology = topology
        self._interval = config.training.check_replicas_interval
        self._parameters = [(weight.name, parameter) for weight, parameter in named_parameters(module)]
        self._copies = copies_of(
            self._parameters,
            tp=topology.tp,
            dp=topology.dp,
            pp=topology.pp,
            shared_out=config.parallel.zero_stage == 3,
            tied=(TIED,) if config.model.tie_embeddings else (),
        )
        self.passed: list[int] = []
        """The first and the last step after which all copies were equal."""

    def is_due(self, step: int) -> bool:
        """Whether so many steps have passed."""
        return self._interval > 0 and step % self._interval == 0

    def find(self, step: int) -> list[Drift]:
        """What differs after a step, the same on every rank; nothing where the check is off.

        Communicates: as `find_drift` does, unless the same step was found equal before.
        """
        if self._interval <= 0 or step in self.passed[-1:]:
            return []
        top = self._topology
        tensors = {name: _held(parameter, top.dp) for name, parameter in self._parameters}
        drifts = find_drift(tensors, self._copies, world=top.world, device=top.device)
        if not drifts:
            self.passed = [*self.passed[:1], step]
        return drifts

    def error(self, drifts: Sequence[Drift], *, step: int, saved_step: int, config: Config) -> ReplicaError:
        """What the run ends with. `saved_step` is that of the newest checkpoint in --save, -1 without one.

        Communicates: one all-gather of small objects over the world.
        """
        hosts = exchange(socket.gethostname(), self._topology.world)
        num_names = len({name for drift in drifts for name in drift.names})
        said = (
            f"ranks that should hold equal copies differ in {num_names} parameter{'s' if num_names > 1 else ''} after "
            f"step {step}; --check-replicas-interval {self._interval} ends the run"
        )
        lines = [
            f"  over {drift.axis}, {_who(drift, hosts)}: {listed(drift.names, MOST_NAMES)}"
            for drift in drifts[:MOST_LINES]
        ]
        if len(drifts) > MOST_LINES:
            lines.append(f"  and {len(drifts) - MOST_LINES} more groups of ranks")
        return ReplicaError(
            "\n".join([said, *lines, f"  nothing was saved of this; {self._way_back(saved_step, config)}"])
        )

    def _way_back(self, saved_step: int, config: Config) -> str:
        output = config.output
        if output.save is not None and self.passed and saved_step >= self.passed[0]:
            folder = Path(output.save) / layout.step_folder(saved_step)
            return f"go on with --load {folder}, saved when all were equal, without the host that errs"
        if output.load is not None:
            return f"go on from what the run began with, --load {output.load}, without the host that errs"
        return "there is no checkpoint to go back to"


def _held(parameter: nn.Parameter, dp: Group) -> Tensor:
    """What this rank has of a parameter: under ZeRO-3 its part, without the padding of the last one."""
    part: Tensor | None = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter.detach()
    left = parameter.ds_numel - dp.rank * part.numel()  # type: ignore[attr-defined]
    return part.detach().view(-1)[: max(0, min(left, part.numel()))]


def _who(drift: Drift, hosts: Sequence[str]) -> str:
    if not drift.odd:
        return f"{_ranks(drift.ranks, hosts)} differ"
    others = [rank for rank in drift.ranks if rank not in drift.odd]
    return f"{_ranks(drift.odd, hosts)} from {_ranks(others, hosts)}"


def _ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    return listed([f"rank {rank} ({hosts[rank]})" for rank in ranks])
