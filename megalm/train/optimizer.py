"""AdamW over a tensor- and pipeline-parallel model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from megalm.config.training import TrainingConfig
from megalm.kernels.adamw.protocol import AdamWKernel
from megalm.topology.topology import Topology


def parameter_groups(module: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; vectors (biases, LayerNorm weights) without.

    Source: Megatron-LM's and GPT-2's practice: decay pulls matrices alone toward zero.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


class PlainAdamW(torch.optim.AdamW):
    """torch's AdamW, without torch.compile's tracer.

    torch's own loads torch._dynamo, 3 s of processor time in every process, to have optimizers left out of graphs. Here
    none is ever in one. DeepSpeed's ZeRO loads it for its Muon; in fp32 without ZeRO nothing else does.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **options: Any) -> None:
        for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
            function = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
            if function is not None:
                # Where torch 2.13 keeps what the tracer made of it.
                setattr(function, "__dynamo_disable", function)  # noqa: B010  (the name must not be mangled)
        super().__init__(groups, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        undecorated = getattr(torch.optim.AdamW.step, "__wrapped__", None)
        return super().step(closure) if undecorated is None else undecorated(self, closure)


class AdamW(PlainAdamW):
    """torch's AdamW whose step first measures the gradient norm of the whole model and clips to it.

    DeepSpeed clips by itself in fp16 and with ZeRO. In plain fp32 its norm leaves out the replicated parameters of all
    stages but the first and counts tied embeddings twice, so that layouts would clip differently: there, this class
    does it. In bf16 DeepSpeed measures, and this class clips in its update, which spares a pass over all gradients.
    `_global_grad_norm` is the name under which the engine looks for the norm.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, topology: Topology, clip_grad: float, **options: Any
    ) -> None:
        super().__init__(groups, **options)
        self._topology = topology
        self._clip_grad = clip_grad
        self._global_grad_norm: float | None = None
        self.grad_scale: torch.Tensor | None = None
        """What torch's fused update divides gradients by."""
        self.overflow = False
        self.norm_from_engine: Callable[[], torch.Tensor] | None = None
        """Where DeepSpeed has measured the norm before it calls `step`, and left out steps that are not finite."""
        self.kernel: AdamWKernel | None = None
        """What updates each group's one flat fp32 master, writes its 16-bit weights and clears its gradient."""
        self.weights: list[Tensor] = []
        """Where `kernel` writes those of each group."""
        self.wrote_weights = False
        """Whether it has, and the owner of the gradients has not taken note of it yet."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Clip, then update; a gradient that is not finite leaves parameters and moments untouched on every rank.

        Communicates: one all-reduce of a scalar over the model's ranks.
        """
        norm = self._norm() if self.norm_from_engine is None else self.norm_from_engine()
        self._global_grad_norm = norm.item()
        self.overflow = not torch.isfinite(norm).item()
        if self.overflow:
            return None
        # The fused update divides every gradient as it reads it, so that clipping is no pass of its own.
        clips = self._clip_grad > 0 and self._global_grad_norm > self._clip_grad
        self.grad_scale = ((norm + 1e-6) / self._clip_grad).float() if clips else None
        if self.kernel is None:
            return super().step(closure)
        for group, weight in zip(self.param_groups, self.weights, strict=True):
            (master,) = group["params"]
            self.kernel.update_(
                master, master.grad, weight, **self._state_of(master), factor=self.grad_scale,
                **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")},
            )  # fmt: skip
        self.wrote_weights = True
        return None

    def _state_of(self, master: nn.Parameter) -> dict[str, Any]:
        """What torch's fused AdamW keeps of a parameter, begun as it does."""
        state: dict[str, Any] = self.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state.update({name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")})
        return state

    def _norm(self) -> torch.Tensor:
        """2-norm over every parameter of the model, each counted once, and not finite where any gradient on any rank is
        not. Identical on all ranks that share a model.

        Data-parallel replicas compute it from equal gradients and so agree without communication.
        """
        found: dict[bool, list[torch.Tensor]] = {True: [], False: []}
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter.grad is not None and not is_tied_copy(parameter):
                found[is_counted_here(parameter, self._topology)].append(parameter.grad)
        total = torch.zeros((), device=self._topology.device)
        for counted, gradients in found.items():
            if gradients:
                norms = torch.stack(torch._foreach_norm(gradients, 2.0, dtype=torch.float32))
                # Of what another rank counts: 0, or NaN.
                total = total + (norms.square().sum() if counted else norms.sum() * 0.0)
        if self._topology.model.size > 1:
            torch.distributed.all_reduce(total, group=self._topology.model.handle)
        return total.sqrt()


def is_tied_copy(parameter: nn.Parameter) -> bool:
    """Whether another stage counts this parameter, whose gradient is added up over both."""
    return bool(getattr(parameter, "ds_pipe_replicated", False))


def is_counted_here(parameter: nn.Parameter, topology: Topology) -> bool:
    """Whether this rank counts the parameter: shards always, replicas on the first tensor rank, tied copies once."""
    if is_tied_copy(parameter):
        return False
    return topology.tp.is_first or bool(getattr(parameter, "tensor_model_parallel", False))


def build_optimizer(
    module: nn.Module, training: TrainingConfig, *, topology: Topology, engine_clips: bool
) -> torch.optim.Optimizer:
    """The optimizer that the engine wraps; with `engine_clips` DeepSpeed clips by itself."""
    groups = parameter_groups(module, weight_decay=training.weight_decay)
    options: dict[str, Any] = {
        "lr": training.lr,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_eps,
        "fused": True,  # one kernel for all parameters; on a CPU a ninth of the time of an operation at a time
    }
    if engine_clips:
        return PlainAdamW(groups, **options)
    return AdamW(groups, topology=topology, clip_grad=training.clip_grad, **options)
