"""How bf16 gradients reach the fp32 sums that DeepSpeed's BF16_Optimizer keeps, in few passes and few kernels.

DeepSpeed 0.19 casts every gradient to fp32 in memory and then adds it: 18 bytes a parameter and micro-batch in place of
10, and two kernels for each of the many vectors of a model. Here linear layers and the vocabulary's table add their
gradients to the sums themselves, any other matrix is added in one kernel, all vectors of a group together, and the
update clips as it reads. Over replicas DeepSpeed would round the sums to bf16, add up all of them on every rank, and
round back, with one replica too. Here each rank gets the part that it updates with, in fp32: as many bytes on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from megalm.kernels.adamw.oracle import TorchAdamW
from megalm.kernels.adamw.protocol import AdamWKernel
from megalm.kernels.gradient_sum.protocol import GradientSumKernel
from megalm.parallel.collectives import all_gather_into, reduce_scatter_into
from megalm.parallel.gradient_sum import GradientSum, adds_gradients, give_gradient_sum
from megalm.topology.group import SOLO, Group
from megalm.train.optimizer import AdamW, is_tied_copy

MOST_IN_A_NORM = 2**28
"""Elements of a tensor whose norm is measured at once: kernels of several tensors count in 32 bits."""


class GradientSums:
    """Takes the place of the methods of a BF16_Optimizer that add gradients up; `immediate_grad_update` calls them."""

    def __init__(
        self,
        owner: Any,
        kernel: GradientSumKernel,
        *,
        replicas: Group = SOLO,
        counts: Callable[[nn.Parameter], bool] = lambda _: True,
    ) -> None:
        """`replicas` share the update; the norm is of the parameters that `counts` names."""
        self._owner = owner
        self._kernel = kernel
        self._replicas = replicas
        self._waiting: dict[int, dict[int, Tensor]] = {}
        """By group: gradients of vectors, by the vector's place, until those of all vectors of the group are there."""
        self._own: list[Tensor] = []
        """Of each group's sums, what this rank updates with."""
        self._counted: list[Tensor] = []
        """Of those, the parameters that the norm is of."""
        self._not_counted: list[Tensor] = []
        """Of those, the others, which must be finite all the same."""
        self._elsewhere: list[Tensor] = []
        """Of each group's sums, what other replicas update with."""
        adding = _adding_to_aligned_sums(owner)
        for group, parameters in enumerate(owner.bf16_groups):
            if parameters and all(parameter.dim() < 2 for parameter in parameters):
                self._waiting[group] = {}
            for index, parameter in enumerate(parameters):
                total = self._total(group, index)
                parameter._hp_grad = total  # where PipelineEngine finds the gradients of tied weights
                if adding and adds_gradients(parameter):
                    # Changes of `.data` are its own; all other views of DeepSpeed's buffer count theirs together.
                    give_gradient_sum(parameter, GradientSum(total.data.view(parameter.shape), kernel))
            flat = owner.fp32_groups_gradients_flat[group]
            size = flat.numel() // replicas.size
            own = range(replicas.rank * size, (replicas.rank + 1) * size)
            self._own.append(flat[own.start : own.stop])
            self._elsewhere += [part for part in (flat[: own.start], flat[own.stop :]) if part.numel()]
            for run in _runs(parameters, counts, own):
                self._counted += flat[run.start : run.stop].split(MOST_IN_A_NORM)
            for run in _runs(parameters, lambda parameter: not (counts(parameter) or is_tied_copy(parameter)), own):
                self._not_counted += flat[run.start : run.stop].split(MOST_IN_A_NORM)

    def add(self, parameter: nn.Parameter, group: int, index: int, clear_lp_grads: bool) -> None:
        """BF16_Optimizer._update_hp_grad: the gradient of one parameter has been computed."""
        gradient = parameter.grad
        if gradient is None:
            return
        waiting = self._waiting.get(group)
        if waiting is None or clear_lp_grads:
            self._kernel.add_(self._total(group, index), gradient)
            if clear_lp_grads:
                gradient.zero_()
            return
        if index in waiting:  # A second backward before the others' first.
            self._add_one_by_one(group)
        waiting[index] = gradient
        if len(waiting) == len(self._owner.bf16_groups[group]):
            self._add_together(group)

    def add_waiting(self) -> None:
        """Add what still waits: somebody is about to read the sums."""
        for group in self._waiting:
            self._add_one_by_one(group)

    def average(self) -> None:
        """Average over the replicas, in fp32, the part of the sums that this rank updates with; the rest is left.

        Communicates: one reduce-scatter of each group of parameters.
        """
        self.add_waiting()
        if self._replicas.size > 1:
            for flat, own in zip(self._owner.fp32_groups_gradients_flat, self._own, strict=True):
                total = torch.empty_like(own)
                reduce_scatter_into(total, flat, group=self._replicas.handle)
                torch.div(total, self._replicas.size, out=own)

    def norms(self) -> Tensor:
        """Numbers whose norm is that of the averaged sums that count here, on all replicas together; not finite where
        any sum here is not.

        Communicates: one all-reduce of a scalar over the replicas.
        """
        norms = torch.stack(torch._foreach_norm(self._counted, 2.0)) if self._counted else self._own[0].new_zeros(1)
        if self._not_counted:  # They add 0, or NaN.
            norms = torch.cat((norms, 0.0 * torch.stack(torch._foreach_norm(self._not_counted, 2.0))))
        if self._replicas.size > 1:
            norms = norms.square().sum(0, keepdim=True)
            torch.distributed.all_reduce(norms, group=self._replicas.handle)
            norms = norms.sqrt()
        return norms

    def clear_elsewhere(self) -> None:
        """Clear what other replicas update with; the update clears this one's part."""
        if self._elsewhere:
            torch._foreach_zero_(self._elsewhere)

    def forget_waiting(self) -> None:
        """Leave out what still waits: it was never computed."""
        for waiting in self._waiting.values():
            waiting.clear()

    def _add_together(self, group: int) -> None:
        waiting = self._waiting[group]
        flat = torch.cat([waiting[index].reshape(-1) for index in sorted(waiting)])
        self._kernel.add_(self._owner.fp32_groups_gradients_flat[group][: flat.numel()], flat)
        waiting.clear()

    def _add_one_by_one(self, group: int) -> None:
        for index, gradient in self._waiting[group].items():
            self._kernel.add_(self._total(group, index), gradient)
        self._waiting[group].clear()

    def _total(self, group: int, index: int) -> Tensor:
        total: Tensor = self._owner.fp32_groups_gradients[group][index]
        return total


def _adding_to_aligned_sums(owner: Any) -> bool:
    """Whether all sums that users of parameters add to by themselves begin at a multiple of 16 bytes.

    Compiled code copies an input that does not where it was compiled for one that does, and would add to the copy. In a
    flat buffer that takes matrices of odd sizes.
    """
    return all(
        total.data_ptr() % 16 == 0
        for parameters, totals in zip(owner.bf16_groups, owner.fp32_groups_gradients, strict=True)
        for parameter, total in zip(parameters, totals, strict=True)
        if adds_gradients(parameter)
    )


def _runs(parameters: list[nn.Parameter], counts: Callable[[nn.Parameter], bool], within: range) -> list[range]:
    """Where the parameters that count lie, one behind the other, inside `within`; neighbours in one."""
    found: list[range] = []
    offset = 0
    for parameter in parameters:
        start, stop = max(offset, within.start), min(offset + parameter.numel(), within.stop)
        offset += parameter.numel()
        if start >= stop or not counts(parameter):
            continue
        if found and found[-1].stop == start:
            start = found.pop().start
        found.append(range(start, stop))
    return found


def take_over_sums(
    owner: Any,
    optimizer: torch.optim.Optimizer,
    kernel: GradientSumKernel,
    *,
    adamw: AdamWKernel | None = None,
    replicas: Group = SOLO,
    counts: Callable[[nn.Parameter], bool] = lambda _: True,
) -> GradientSums:
    """Have `GradientSums` add up and measure a BF16_Optimizer's gradients, and `optimizer`, inside it, clip them and
    write the 16-bit weights, by `adamw`."""
    sums = GradientSums(owner, kernel, replicas=replicas, counts=counts)
    read, read_for_norm = owner.get_grads_for_reduction, owner.get_grads_for_norm

    def get_grads_for_reduction() -> Any:
        sums.add_waiting()
        return read()

    def get_grads_for_norm(for_clipping: bool = False) -> Any:
        if for_clipping:
            # DeepSpeed leaves out what nobody has told it of. The sum of such a parameter is 0.
            owner.fp32_groups_has_gradients = [[True] * len(group) for group in owner.bf16_groups]
            return read_for_norm(for_clipping)
        # DeepSpeed would take the norm of one tensor after the other; that of all their norms is the same.
        return [sums.norms()], {}

    def zero_grad(set_to_none: bool = True) -> None:
        owner.clear_lp_grads(set_to_none)  # `step` has cleared the sums already.

    owner._update_hp_grad = sums.add
    owner.zero_grad = zero_grad
    owner.get_grads_for_reduction = get_grads_for_reduction
    owner.get_grads_for_norm = get_grads_for_norm
    if isinstance(optimizer, AdamW):
        optimizer.norm_from_engine = lambda: owner._global_grad_norm
        _write_weights_in_update(owner, optimizer, adamw or TorchAdamW(), sums=sums, replicas=replicas)
    return sums


def _write_weights_in_update(
    owner: Any, optimizer: AdamW, kernel: AdamWKernel, *, sums: GradientSums, replicas: Group
) -> None:
    """Have the update write this replica's 16-bit weights and clear its sums, and leave a BF16_Optimizer those of the
    other replicas, and what it does where there was no update."""
    copy_and_gather, clear = owner.update_lp_params, owner.clear_hp_grads

    def update_lp_params() -> None:
        if not optimizer.wrote_weights:  # A checkpoint was loaded.
            copy_and_gather()
        elif replicas.size > 1:
            for flat, own in zip(owner.bf16_groups_flat, optimizer.weights, strict=True):
                all_gather_into(flat, own, group=replicas.handle)

    def clear_hp_grads() -> None:
        if not optimizer.wrote_weights:  # The update was left out.
            clear()
            return
        sums.clear_elsewhere()
        optimizer.wrote_weights = False

    optimizer.kernel = kernel
    optimizer.weights = [partitions[replicas.rank] for partitions in owner.bf16_partitioned_groups]
    owner.update_lp_params, owner.clear_hp_grads = update_lp_params, clear_hp_grads
