"""DeepSpeed's engines behind one small interface: a step, an evaluation, and the raw engine for checkpoints."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import nn

from megalm.config.deepspeed_json import NEVER
from megalm.data.batches import Batch
from megalm.errors import ConfigError, DivergedError
from megalm.kernels.adamw.protocol import AdamWKernel
from megalm.kernels.gradient_sum.oracle import TorchGradientSum
from megalm.kernels.gradient_sum.protocol import GradientSumKernel
from megalm.topology.agree import exchange
from megalm.topology.mpu import Mpu
from megalm.topology.topology import Topology
from megalm.train.cuda_graph import MicroBatchGraph
from megalm.train.gradient_sums import GradientSums, take_over_sums
from megalm.train.optimizer import is_counted_here


@dataclass(frozen=True)
class StepResult:
    """What one update tells every rank."""

    loss: float
    """Mean over micro-batches of their means over tokens that count, nats per token."""
    grad_norm: float | None
    """2-norm of the whole model's gradient before clipping."""
    loss_scale: float | None
    """Scale of the loss in fp16, None otherwise."""
    skipped: bool
    """Whether the update was left out because a gradient was not finite."""


class Engine(ABC):
    """One data-parallel replica's share of the training, spread over its pipeline and tensor ranks."""

    def __init__(self, raw: Any, topology: Topology) -> None:
        self.raw = raw
        self._topology = topology

    @property
    def module(self) -> nn.Module:
        """This rank's part of the model."""
        module: nn.Module = self.raw.module
        return module

    def train_step(self, batches: Iterator[Batch], *, global_batch_size: int, learning_rate: float) -> StepResult:
        """Read this rank's micro-batches of one global batch, and update the parameters once.

        `batches` is read on the first and the last stage alone.
        """
        if self.raw.train_batch_size() != global_batch_size:
            self.raw.set_train_batch_size(global_batch_size)
        for group in self.raw.optimizer.param_groups:
            group["lr"] = learning_rate
        skipped_before = self.raw.skipped_steps
        with _told_of_the_least_scale():
            loss = self._forward_backward_update(batches)
        norm = self.raw.get_global_grad_norm()
        return StepResult(
            loss=loss.item(),
            grad_norm=None if norm is None else float(norm),
            # The engine's own loss_scale() is what the configuration asked for: 0 where the scale adapts itself.
            loss_scale=float(self.raw.optimizer.loss_scale) if self.raw.fp16_enabled() else None,
            skipped=self.raw.skipped_steps > skipped_before,
        )

    @abstractmethod
    def _forward_backward_update(self, batches: Iterator[Batch]) -> torch.Tensor:
        """One update; returns the mean loss of the global batch, a scalar equal on every rank."""

    @abstractmethod
    def evaluate(self, batches: Iterator[Batch], *, num_micro_batches: int) -> float:
        """Mean loss over `num_micro_batches` of each replica, in nats per token; equal on every rank."""


class PipelineTrainingEngine(Engine):
    """Any number of stages, one included, over DeepSpeed's PipelineEngine: 1F1B, ZeRO-0 or ZeRO-1."""

    def __init__(self, raw: Any, topology: Topology, graph: MicroBatchGraph | None = None) -> None:
        super().__init__(raw, topology)
        self._graph = graph

    def _forward_backward_update(self, batches: Iterator[Batch]) -> torch.Tensor:
        loss: torch.Tensor = self.raw.train_batch(data_iter=_as_pipeline_input(batches, self._topology.device))
        if self.raw.steps_per_print() == NEVER:
            # DeepSpeed 0.19 keeps two events of every step until it prints them.
            self.raw.timers("train_batch").reset()
        if self._graph is not None:
            self._graph.end_step()
        return loss

    def evaluate(self, batches: Iterator[Batch], *, num_micro_batches: int) -> float:
        inputs = _as_pipeline_input(batches, self._topology.device)
        loss = self.raw.eval_batch(inputs, num_micro_batches=num_micro_batches)
        return float(loss)


class DataParallelTrainingEngine(Engine):
    """One stage over the plain DeepSpeedEngine: the engine that has ZeRO-2 and ZeRO-3."""

    def _forward_backward_update(self, batches: Iterator[Batch]) -> torch.Tensor:
        self.raw.train()
        num_micro_batches = self.raw.gradient_accumulation_steps()
        total = torch.zeros((), device=self._topology.device)
        for number in range(1, num_micro_batches + 1):
            # By itself DeepSpeed counts micro-batches from the start of the run, and a batch that grows ends elsewhere.
            self.raw.set_gradient_accumulation_boundary(number == num_micro_batches)
            loss = self._loss(next(batches))
            self.raw.backward(loss)
            self.raw.step()
            total += loss.detach()
        return self._mean_over_replicas(total / num_micro_batches)

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], *, num_micro_batches: int) -> float:
        self.raw.eval()
        total = torch.zeros((), device=self._topology.device)
        for _ in range(num_micro_batches):
            total += self._loss(next(batches))
        return float(self._mean_over_replicas(total / num_micro_batches))

    def _loss(self, batch: Batch) -> torch.Tensor:
        batch = batch.to(self._topology.device)
        loss: torch.Tensor = self.raw(batch.tokens, labels=batch.labels, loss_mask=batch.loss_mask)
        return loss

    def _mean_over_replicas(self, loss: torch.Tensor) -> torch.Tensor:
        if self._topology.dp.size > 1:
            torch.distributed.all_reduce(loss, group=self._topology.dp.handle)
            loss /= self._topology.dp.size
        return loss


@contextlib.contextmanager
def _told_of_the_least_scale() -> Iterator[None]:
    """DeepSpeed 0.19 raises a plain exception, on every rank, where fp16 gradients overflow at the least loss scale.

    Raises: DivergedError in its place.
    """
    try:
        yield
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        raise DivergedError(
            "gradients overflow in fp16 although the loss scale is at its least, set by --min-loss-scale\n"
            "  training has diverged: go on from an earlier checkpoint, with a lower --lr or --bf16"
        ) from error


def _as_pipeline_input(
    batches: Iterable[Batch], device: torch.device
) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]]:
    """The pair that PipelineEngine hands out: inputs to the first stage, labels to the last one's loss."""
    for batch in (batch.to(device) for batch in batches):
        yield batch.tokens, (batch.labels, batch.loss_mask)


def build_engine(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    deepspeed_config: dict[str, Any],
    topology: Topology,
    *,
    gradient_sum: GradientSumKernel | None = None,
    adamw: AdamWKernel | None = None,
    graph: Callable[[Any, GradientSums], MicroBatchGraph] | None = None,
) -> Engine:
    """Wrap a PipelineModule, or a plain module of one stage, in the engine that fits it.

    `gradient_sum` adds 16-bit gradients to fp32 sums where DeepSpeed keeps those for the whole model, and `adamw`
    updates with them; torch by default.
    `graph` makes one graph of a micro-batch that adds to those sums, on one stage.
    Raises: ConfigError if DeepSpeed does not take a key or a value of `deepspeed_config`.
    """
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    check_deepspeed_keys(deepspeed_config, dp_size=topology.dp.size)
    _quieten_deepspeed(logging.INFO if deepspeed_config.get("dump_state") else logging.WARNING)
    pipelined = isinstance(module, PipelineModule)
    # DeepSpeed 0.19 prints its memory eight times while it sets up bf16.
    with contextlib.redirect_stdout(io.StringIO()):
        raw, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_config,
            mpu=None if pipelined else Mpu(topology),
            dist_init_required=False,
        )
    sums = None
    if isinstance(raw.optimizer, BF16_Optimizer):
        sums = take_over_sums(
            raw.optimizer,
            optimizer,
            gradient_sum or TorchGradientSum(),
            adamw=adamw,
            replicas=topology.dp,
            counts=functools.partial(is_counted_here, topology=topology),
        )
        if raw.communication_data_type == torch.float32:
            raw._bf16_reduce_grads = sums.average
    if raw.fp16_enabled():
        _update_before_the_scale_grows(raw.optimizer)
    if topology.tp.size > 1:
        _look_at_replicas_too(raw.optimizer)
    if isinstance(raw.optimizer, DeepSpeedZeroOptimizer) and raw.optimizer.cpu_offload:
        _forget_what_was_left_out(raw.optimizer)
    if not pipelined:
        return DataParallelTrainingEngine(raw, topology)
    if isinstance(raw.optimizer, DeepSpeedZeroOptimizer):
        _join_norms(raw.optimizer, topology)
    if topology.dp.size == 1 and not raw.zero_optimization():
        # DeepSpeed would copy all gradients together and back to add up those of one replica.
        raw.pipeline_enable_backward_allreduce = False
    return PipelineTrainingEngine(raw, topology, None if sums is None or graph is None else graph(raw, sums))


def _update_before_the_scale_grows(optimizer: Any) -> None:
    """Have DeepSpeed's ZeRO raise fp16's loss scale after the update by gradients of the scale before.

    DeepSpeed 0.19 raises it first and divides them by the new scale: each time an update by half the gradients, and at
    stage 3 half their norm. Where the scale falls there is no update.
    """
    update_scale, update = optimizer._update_scale, optimizer.step

    def lower_scale(has_overflow: bool = False) -> None:
        if has_overflow:
            update_scale(has_overflow)

    def step(closure: Any = None) -> None:
        update(closure)
        if not optimizer.overflow:
            update_scale(False)

    optimizer._update_scale, optimizer.step = lower_scale, step


def _look_at_replicas_too(optimizer: Any) -> None:
    """Have DeepSpeed's ZeRO look for gradients that are not finite among all of a rank's, as it does in fp16.

    In fp32 (at stage 3 in bf16 too) it looks at their norm alone, which leaves out what tensor ranks but the first hold
    in common with it: a LayerNorm's NaN there would go into that rank's weights.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.check_grad_overflow = True
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):

        def check(update_scale: bool = True) -> Any:
            optimizer.check_overflow()
            return optimizer._loss_scale_update_and_overflow_cleanup() if update_scale else optimizer.overflow

        optimizer._overflow_check_and_loss_scale_update = check


def _forget_what_was_left_out(optimizer: Any) -> None:
    """Have DeepSpeed's ZeRO-2 drop the gradients of an update that it leaves out, with an offloaded optimizer, too.

    DeepSpeed 0.19 keeps their sums there in bf16, and with the NaN in them leaves out every later update.
    """
    reset = optimizer.reset_cpu_buffers

    def reset_and_forget() -> None:
        reset()
        if optimizer.overflow:
            optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)

    optimizer.reset_cpu_buffers = reset_and_forget


def _join_norms(optimizer: Any, topology: Topology) -> None:
    """Have every rank of DeepSpeed's ZeRO-1 take part in the norms of as many groups as the rank with most has.

    DeepSpeed 0.19 leaves out empty groups of parameters, and all-reduces the squares of one group after the other. A
    last stage with the head alone has matrices and no vector, and would leave the others waiting. Which groups meet in
    a round does not matter, as all are added up.

    Communicates: one all-gather of small objects over the world.
    """
    own = len(optimizer.bit16_groups)
    missing = max(exchange(own, topology.world)) - own
    if not missing:
        return
    from deepspeed.runtime.utils import combine_grad_norm_groups

    norm_of_own_groups = optimizer.scaled_global_norm

    def norm_of_all_groups(norm_type: int = 2) -> torch.Tensor:
        norms = [norm_of_own_groups(norm_type)]
        for _ in range(missing):
            if optimizer.cpu_offload:
                norms.append(optimizer.complete_grad_norm_calculation_for_cpu_offload([]))
            else:
                norms.append(optimizer.get_grad_norm_direct([], []))
        norm: torch.Tensor = combine_grad_norm_groups(norms, norm_type=norm_type)
        return norm

    optimizer.scaled_global_norm = norm_of_all_groups


OLDEST_DEEPSPEED = "0.19.8"
"""0.19.0 trains two stages with tied embeddings to losses that are 1.4 % off (tests/dist/test_layouts.py), 0.18.9 fails
in ZeRO-1 under torch 2.13."""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


class _Sizes:
    """All that DeepSpeedConfig asks of an `mpu`."""

    def __init__(self, dp_size: int) -> None:
        self._dp_size = dp_size

    def get_data_parallel_world_size(self) -> int:
        return self._dp_size


def check_deepspeed_keys(deepspeed_config: dict[str, Any], *, dp_size: int) -> None:
    """Whether DeepSpeed is one that trains the model, and takes every key and value.

    Raises: ConfigError.
    """
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig

    if _numbers(deepspeed.__version__) < _numbers(OLDEST_DEEPSPEED):
        raise ConfigError(
            f"DeepSpeed {deepspeed.__version__} is older than {OLDEST_DEEPSPEED}: it runs, and trains another model "
            "than one process does where there are stages, replicas or ZeRO\n"
            f"  pip install 'deepspeed>={OLDEST_DEEPSPEED}'"
        )
    # Before the processes have joined, as in a dry run, DeepSpeed takes the world for one process whatever `mpu` says,
    # and finds that the batch does not fit it. That the sizes fit was checked with the configuration.
    keys = {key: copy.deepcopy(value) for key, value in deepspeed_config.items() if key != "train_batch_size"}
    try:
        _quieten_deepspeed(logging.ERROR)  # What it warns of it says again when the engine is built.
        DeepSpeedConfig(keys, mpu=_Sizes(dp_size))
    except Exception as refusal:  # It raises its own, pydantic's, ValueError, TypeError and AssertionError.
        said = " ".join(line.strip() for line in str(refusal).splitlines()[:3])
        raise ConfigError(
            f"DeepSpeed does not take its configuration: {said}\n"
            "  its keys are set by --deepspeed_config; correct or remove this one"
        ) from refusal


def _is_worth_reading(record: logging.LogRecord) -> bool:
    """Not DeepSpeed's surprise at torch's AdamW under ZeRO, which is what is tested here."""
    return "untested optimizer" not in record.getMessage()


def _quieten_deepspeed(level: int) -> None:
    """megalm logs what matters of the set-up itself; of DeepSpeed's hundreds of lines those from `level` on stay."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(level)
    logger.addFilter(_is_worth_reading)
    # torch 2.13 has new names for what DeepSpeed 0.19 calls in every step of ZeRO-3.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
