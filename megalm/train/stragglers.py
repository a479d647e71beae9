"""Names ranks that are slower than others with the same work.

All ranks of a run take equally long for a step, as each waits for the slowest. What tells them apart is each rank's own
time: the step without what it waited for others, and on a CPU for a core. Own times are compared every so many steps,
among the ranks of a pipeline stage; that of a rank alone in its stage, with what it took before.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from megalm.parallel.collectives import all_gather_into
from megalm.topology.agree import exchange
from megalm.topology.topology import Topology
from megalm.topology.waits import WaitClock

SHARE = 0.1
"""Of a step: what a rank must take longer to be named."""
FLOOR_SECONDS = 0.01
"""The same, at least."""
WINDOWS = 3
"""How many in a row must agree that a rank is slow, or is not any longer."""
REMEMBERED = 20


@dataclass(frozen=True)
class OwnTime:
    """What one rank takes for a step by itself: its least computing in a window, and the mean of its waits for data.

    What else a host does makes some steps slow, now on this rank and now on that one; a slow rank is so in all of them.
    """

    seconds: float
    data_seconds: float
    """Of these."""
    step_seconds: float
    """Of the whole step."""


@dataclass
class _Standing:
    """What is known of one rank."""

    past: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    """Own seconds for each sample of a step, in windows in which it was not slow."""
    in_a_row: int = 0
    """Windows that contradict what was told last."""
    since: int = 0
    """First step of those."""
    told: float | None = None
    """By how many seconds it was said to be slow, None while it is not."""


class Comparison:
    """From the own times of all ranks, window after window, to what is worth telling."""

    def __init__(self, stages: Sequence[int], name: Callable[[int], str]) -> None:
        """`stages` holds each rank's pipeline stage; `name` is what a rank is called."""
        self._stages = stages
        self._name = name
        self._ranks = [_Standing() for _ in stages]

    def look(self, times: Sequence[OwnTime], *, first: int, last: int, num_samples: int) -> list[str]:
        """Lines about the window of these steps, of which each took so many samples."""
        step_seconds = statistics.median(time.step_seconds for time in times)
        growth = [
            time.seconds - statistics.median(rank.past) * num_samples if rank.past else 0.0
            for time, rank in zip(times, self._ranks, strict=True)
        ]
        lines = []
        excesses = self._excesses(times, growth)
        for number, (time, rank) in enumerate(zip(times, self._ranks, strict=True)):
            excess = excesses[number]
            is_slow = excess > max(SHARE * step_seconds, FLOOR_SECONDS)
            if not is_slow:
                rank.past.append(time.seconds / num_samples)
            told = rank.told
            changed = is_slow != (told is not None) or (told is not None and not told / 2 < excess < told * 2)
            if not changed:
                rank.in_a_row = 0
                continue
            rank.since = rank.since if rank.in_a_row else first
            rank.in_a_row += 1
            if rank.in_a_row >= WINDOWS:
                rank.in_a_row = 0
                rank.told = excess if is_slow else None
                lines.append(self._line(number, time, excess, is_slow, f"since step {rank.since}, told after {last}"))
        return lines

    def _excesses(self, times: Sequence[OwnTime], growth: Sequence[float]) -> list[float]:
        """Seconds that each rank takes longer than its peers; without any, than before, beyond what all do."""
        stages: dict[int, list[int]] = defaultdict(list)
        for number, stage in enumerate(self._stages):
            stages[stage].append(number)
        of_all = medians_of_others(growth)
        excesses = [own - max(0.0, others) for own, others in zip(growth, of_all, strict=True)]
        for peers in stages.values():
            if len(peers) > 1:
                own = [times[peer].seconds for peer in peers]
                for peer, seconds, others in zip(peers, own, medians_of_others(own), strict=True):
                    excesses[peer] = seconds - others
        return excesses

    def _line(self, number: int, time: OwnTime, excess: float, is_slow: bool, when: str) -> str:
        alone = self._stages.count(self._stages[number]) == 1
        than = "than it did before" if alone else "than the others of its stage"
        if not is_slow:
            return f"{self._name(number)} takes no longer {than} any more, {when}"
        data = f", {1000 * time.data_seconds:.0f} ms of each waiting for data" if time.data_seconds > excess / 2 else ""
        share = 100 * excess / time.step_seconds
        return (
            f"{self._name(number)} takes {1000 * excess:.0f} ms a step longer {than}, {share:.0f} % of it{data}; {when}"
        )


def medians_of_others(values: Sequence[float]) -> list[float]:
    """The median of all values but one, for each of them. One sort serves the thousands of ranks of a large run."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    ranked = [values[index] for index in order]
    count = len(values) - 1
    low, high = (count - 1) // 2, count // 2
    medians = [0.0] * len(values)
    for place, index in enumerate(order):
        # What lies behind the one that is left out moves up.
        medians[index] = (ranked[low + (low >= place)] + ranked[high + (high >= place)]) / 2
    return medians


class Stragglers:
    """One rank's part of the comparison."""

    def __init__(self, topology: Topology, *, interval: int) -> None:
        """`interval` steps are a window; 0 compares nothing.

        Communicates: one all-gather of small objects over the world, unless it compares nothing.
        """
        self._topology = topology
        self._interval = interval if topology.world.size > 1 else 0
        self._clock = WaitClock()
        # A GPU computes and waits by itself, behind the host's back: there, waits for data are all that is compared.
        self._sees_waits = topology.device.type == "cpu"
        self._steps: list[tuple[float, float, float]] = []
        self._is_warm = False
        if self._interval:
            hosts = exchange(socket.gethostname(), topology.world)

            def name(rank: int) -> str:
                tp, pp, dp = topology.layout.coordinates(rank)
                return f"rank {rank} (tp {tp}, pp {pp}, dp {dp}, on {hosts[rank]})"

            stages = [topology.layout.coordinates(rank)[1] for rank in range(topology.world.size)]
            self._comparison = Comparison(stages, name)

    def counting(self) -> contextlib.AbstractContextManager[None]:
        """Count waits while the body runs, if they are needed."""
        return self._clock.counting() if self._interval and self._sees_waits else contextlib.nullcontext()

    @property
    def waited_seconds(self) -> float:
        """What this rank has waited for others so far."""
        return self._clock.seconds

    def add(self, *, step_seconds: float, waited_seconds: float, data_seconds: float) -> None:
        """One step of this rank."""
        if self._interval:
            computed = step_seconds - waited_seconds - data_seconds if self._sees_waits else 0.0
            self._steps.append((step_seconds, computed, data_seconds))

    def look(self, step: int, *, num_samples: int) -> list[str]:
        """What is worth telling after a step, which took so many samples; the same on every rank.

        Communicates: once in an interval, one all-gather of 24 bytes over the world.
        """
        if not self._interval or len(self._steps) < self._interval:
            return []
        whole, computed, data = zip(*self._steps, strict=True)
        self._steps.clear()
        if not self._is_warm:  # The first steps compile, connect and fill caches.
            self._is_warm = True
            return []
        waited_for_data = statistics.fmean(data)
        own = (min(computed) + waited_for_data, waited_for_data, statistics.fmean(whole))
        ours = torch.tensor(own, dtype=torch.float64, device=self._topology.device)
        everyone = ours.new_empty((3 * self._topology.world.size,))
        all_gather_into(everyone, ours, group=self._topology.world.handle)
        times = [OwnTime(*row) for row in everyone.view(-1, 3).tolist()]
        return self._comparison.look(times, first=step - len(whole) + 1, last=step, num_samples=num_samples)
