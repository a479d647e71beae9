"""Linear layers whose weight is cut over tensor-parallel ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.parallel.collectives import copy_to, gather_from, gather_sequence, reduce_from, reduce_scatter_sequence
from megalm.parallel.replicated import sum_gradient_over
from megalm.parallel.shard import mark_replicated, mark_sharded, shard_size
from megalm.topology.group import Group


class ColumnParallelLinear(nn.Module):
    """y = x A^T + b with A's output features cut over `tp`; with a group of one, nn.Linear.

    The constructor allocates; `parallel.initialise` fills. With `skip_bias_add` the caller adds `added_bias()` itself,
    fused with what follows.

    Shapes: x [s, b, in] ([s/t, b, in] with sequence_parallel) -> [s, b, out/t] ([s, b, out] with gather_output).
    Communicates: an all-reduce of x's gradient over tp; with sequence_parallel, an all-gather of x and a
        reduce-scatter of its gradient.
    Raises: ConfigError if tp.size does not divide out_size.
    Source: Shoeybi et al. 2019, arXiv:1909.08053; sequence parallelism: Korthikanti et al. 2022, arXiv:2205.05198.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        tp: Group,
        bias: bool = True,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        skip_bias_add: bool = False,
    ) -> None:
        super().__init__()
        local = shard_size(out_size, tp, what="out_size of a column-parallel layer")
        self.tp = tp
        self.gather_output = gather_output
        self.sequence_parallel = sequence_parallel
        self.skip_bias_add = skip_bias_add
        self.weight = mark_sharded(nn.Parameter(torch.empty(local, in_size)), dim=0)
        self.bias = mark_sharded(nn.Parameter(torch.empty(local)), dim=0) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = gather_sequence(x, self.tp) if self.sequence_parallel else copy_to(x, self.tp)
        y = F.linear(x, self.weight, None if self.skip_bias_add else self.bias)  # [s, b, in] -> [s, b, out/t]
        return gather_from(y, self.tp) if self.gather_output else y

    def added_bias(self) -> Tensor:
        """The bias [out/t] that a caller adds after `skip_bias_add`."""
        assert self.bias is not None, "the layer was made with bias=False"
        return self.bias


class RowParallelLinear(nn.Module):
    """y = x A^T + b with A's input features cut over `tp`; with a group of one, nn.Linear.

    The bias is replicated and added once, after the sum. With `skip_bias_add` the caller adds `added_bias()` itself.

    Shapes: x [s, b, in/t] -> [s, b, out] ([s/t, b, out] with sequence_parallel).
    Communicates: an all-reduce of the output over tp; with sequence_parallel, a reduce-scatter of the output, an
        all-gather of its gradient and an all-reduce of the bias's gradient.
    Raises: ConfigError if tp.size does not divide in_size.
    Source: Shoeybi et al. 2019, arXiv:1909.08053; sequence parallelism: Korthikanti et al. 2022, arXiv:2205.05198.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        tp: Group,
        bias: bool = True,
        sequence_parallel: bool = False,
        skip_bias_add: bool = False,
    ) -> None:
        super().__init__()
        local = shard_size(in_size, tp, what="in_size of a row-parallel layer")
        self.tp = tp
        self.sequence_parallel = sequence_parallel
        self.skip_bias_add = skip_bias_add
        self.weight = mark_sharded(nn.Parameter(torch.empty(out_size, local)), dim=1)
        self.bias = mark_replicated(nn.Parameter(torch.empty(out_size))) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)  # [s, b, in/t] -> partial sums [s, b, out]
        y = reduce_scatter_sequence(y, self.tp) if self.sequence_parallel else reduce_from(y, self.tp)
        return y if self.skip_bias_add or self.bias is None else y + self.added_bias()

    def added_bias(self) -> Tensor:
        """The bias [out] that a caller adds after `skip_bias_add`; its gradient is whole in either mode."""
        assert self.bias is not None, "the layer was made with bias=False"
        return sum_gradient_over(self.tp, self.bias)[0] if self.sequence_parallel else self.bias
