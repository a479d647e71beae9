"""Where each rank sits on the pipeline, data and tensor axes."""

from __future__ import annotations

from dataclasses import dataclass

from megalm.errors import TopologyError


@dataclass(frozen=True)
class Layout:
    """Sizes of the three axes, and the arithmetic between a global rank and its coordinates.

    Ranks run over tensor fastest, then data, then pipeline: DeepSpeed's PipeModelDataParallelTopology, which a test
    holds equal to this. Tensor peers are neighbours because they communicate most.
    """

    tp: int
    pp: int
    dp: int

    @classmethod
    def of_world(cls, world_size: int, *, tp: int, pp: int) -> Layout:
        """The layout in which the data axis takes what tp and pp leave of the world.

        Raises: TopologyError if tp * pp does not divide world_size; nothing is clamped.
        """
        if tp < 1 or pp < 1 or world_size % (tp * pp) != 0:
            fitting = [size for size in range(1, world_size + 1) if world_size % size == 0]
            raise TopologyError(
                f"parallel.tp * parallel.pp = {tp} * {pp} = {tp * pp} must divide the {world_size} processes\n"
                "  the number of processes is set by the launcher (--num_gpus, --nproc-per-node, the hostfile)\n"
                f"  products that fit: {', '.join(map(str, fitting))}"
            )
        return cls(tp=tp, pp=pp, dp=world_size // (tp * pp))

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tp * self.pp * self.dp

    def rank(self, *, tp: int, pp: int, dp: int) -> int:
        """Global rank at these coordinates."""
        return (pp * self.dp + dp) * self.tp + tp

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(tp, pp, dp) of a global rank."""
        return rank % self.tp, rank // (self.tp * self.dp), rank // self.tp % self.dp

    def tp_groups(self) -> list[tuple[int, ...]]:
        """Ranks that share every layer's weights, one tuple a group."""
        return [
            tuple(self.rank(tp=t, pp=p, dp=d) for t in range(self.tp)) for p in range(self.pp) for d in range(self.dp)
        ]

    def pp_groups(self) -> list[tuple[int, ...]]:
        """Ranks of one pipeline, first stage first."""
        return [
            tuple(self.rank(tp=t, pp=p, dp=d) for p in range(self.pp)) for d in range(self.dp) for t in range(self.tp)
        ]

    def dp_groups(self) -> list[tuple[int, ...]]:
        """Ranks that hold the same parameters and read different samples."""
        return [
            tuple(self.rank(tp=t, pp=p, dp=d) for d in range(self.dp)) for p in range(self.pp) for t in range(self.tp)
        ]

    def model_groups(self) -> list[tuple[int, ...]]:
        """Ranks that together hold one whole model."""
        return [
            tuple(self.rank(tp=t, pp=p, dp=d) for p in range(self.pp) for t in range(self.tp)) for d in range(self.dp)
        ]
