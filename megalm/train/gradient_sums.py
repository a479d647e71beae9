"""How bf16 gradients reach the fp32 sums that DeepSpeed's BF16_Optimizer keeps, in few passes and few kernels.

DeepSpeed 0.19 casts every gradient to fp32 in memory and then adds it: 18 bytes a parameter and micro-batch in place of
10, and two kernels for each of the many vectors of a model. Here linear layers and the vocabulary's table add their
gradients to the sums themselves, any other matrix is added in one kernel, all vectors of a group together, and the
update clips as it reads. Over replicas DeepSpeed would round the sums to bf16 and back, with one replica too; here they
are summed in fp32, where they lie.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from megalm.kernels.gradient_sum.protocol import GradientSumKernel
from megalm.parallel.gradient_sum import GradientSum, adds_gradients, give_gradient_sum
from megalm.topology.group import Group
from megalm.train.optimizer import AdamW


class GradientSums:
    """Takes the place of the methods of a BF16_Optimizer that add gradients up; `immediate_grad_update` calls them."""

    def __init__(self, owner: Any, kernel: GradientSumKernel) -> None:
        self._owner = owner
        self._kernel = kernel
        self._waiting: dict[int, dict[int, Tensor]] = {}
        """By group: gradients of vectors, by the vector's place, until those of all vectors of the group are there."""
        for group, parameters in enumerate(owner.bf16_groups):
            if parameters and all(parameter.dim() < 2 for parameter in parameters):
                self._waiting[group] = {}
            for index, parameter in enumerate(parameters):
                total = self._total(group, index)
                parameter._hp_grad = total  # where PipelineEngine finds the gradients of tied weights
                if adds_gradients(parameter):
                    # Changes of `.data` are its own; all other views of DeepSpeed's buffer count theirs together.
                    give_gradient_sum(parameter, GradientSum(total.data.view(parameter.shape), kernel))

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

    def average(self, replicas: Group) -> None:
        """Average the sums over the replicas, in fp32 and in place.

        Communicates: one all-reduce of each group of parameters over `replicas`.
        """
        self.add_waiting()
        if replicas.size > 1:
            for flat in self._owner.fp32_groups_gradients_flat:
                torch.distributed.all_reduce(flat, group=replicas.handle)
                flat /= replicas.size

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


def take_over_sums(owner: Any, optimizer: torch.optim.Optimizer, kernel: GradientSumKernel) -> GradientSums:
    """Have `GradientSums` add up a BF16_Optimizer's gradients, and `optimizer`, which it wraps, clip them."""
    sums = GradientSums(owner, kernel)
    read, read_for_norm = owner.get_grads_for_reduction, owner.get_grads_for_norm

    def get_grads_for_reduction() -> Any:
        sums.add_waiting()
        return read()

    def get_grads_for_norm(for_clipping: bool = False) -> Any:
        # DeepSpeed leaves out what no backward has told it of. The sum of such a parameter is 0.
        owner.fp32_groups_has_gradients = [[True] * len(group) for group in owner.bf16_groups]
        found = read_for_norm(for_clipping)
        if for_clipping or not found[0]:
            return found
        # DeepSpeed takes the norm of one tensor after the other; that of all their norms is the same.
        return [torch.stack(torch._foreach_norm(found[0], 2.0))], *found[1:]

    def zero_grad(set_to_none: bool = True) -> None:
        owner.clear_lp_grads(set_to_none)  # `step` has cleared the sums already.

    owner._update_hp_grad = sums.add
    owner.zero_grad = zero_grad
    owner.get_grads_for_reduction = get_grads_for_reduction
    owner.get_grads_for_norm = get_grads_for_norm
    if isinstance(optimizer, AdamW):
        optimizer.norm_from_engine = lambda: owner._global_grad_norm
    return sums
