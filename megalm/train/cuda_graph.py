"""Forward and backward of a micro-batch as one CUDA graph, which the host starts in one call.

A micro-batch of BLOOM-1b7 is some 1,250 kernels. Started one by one they leave the GPU idle for some microseconds each,
and where they are short the host cannot keep up at all. A graph holds the kernels and their arguments, addresses
included: it serves as long as micro-batches have the same shapes and what they read and write stays where it is.
Source: https://docs.nvidia.com/cuda/cuda-c-programming-guide, "CUDA Graphs"; torch.cuda.CUDAGraph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megalm.config.deepspeed_json import effective_zero_stage
from megalm.config.root import Config
from megalm.errors import KernelError
from megalm.telemetry.console import Console
from megalm.topology.topology import Topology
from megalm.train.gradient_sums import GradientSums

STEPS_BEFORE = 1
"""Steps that run kernel by kernel: they compile, choose algorithms and allocate the optimizer's state."""


DEEPSPEED_MEASURES: dict[str, Callable[[Any], bool]] = {
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "timers": lambda timers: bool(((timers or {}).get("throughput") or {}).get("enabled")),
    "flops_profiler": lambda profiler: bool((profiler or {}).get("enabled")),
}
"""Keys of its configuration with which DeepSpeed measures what a micro-batch does, and whether a value asks for it."""


class Recording(Protocol):
    """The work of a function, to be done again without the function."""

    def replay(self) -> None:
        """Do the work once, on what then stands where it was recorded."""
        ...


def record_cuda_graph(work: Callable[[], None]) -> Recording:
    """Record what `work` starts on the current stream, without running it.

    Raises: RuntimeError if some of it cannot be part of a graph, such as waiting for a result.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # The graph has memory of its own; what the steps before it left would lie idle beside it.
    graph = torch.cuda.CUDAGraph()
    # Other threads pin batches and watch collectives meanwhile, which is no concern of this capture.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        work()
    return graph


@dataclass(frozen=True)
class _Recorded:
    recording: Recording
    inputs: tuple[Tensor, ...]
    loss: Tensor


class MicroBatchGraph:
    """Stands between DeepSpeed's schedule for one stage and its micro-batches, and replays them.

    `record` records what a function does; tests on a CPU give one of their own.
    """

    def __init__(
        self,
        raw: Any,
        sums: GradientSums,
        console: Console,
        *,
        record: Callable[[Callable[[], None]], Recording] = record_cuda_graph,
    ) -> None:
        self._sums = sums
        self._console = console
        self._record = record
        self._steps_left = STEPS_BEFORE
        self._key: tuple[Any, ...] | None = None
        self._recorded: _Recorded | None = None
        self._gave_up = False
        self._replayed = False
        # DeepSpeed binds what it finds in this table to the engine at every call.
        kinds = {kind.__name__: kind for kind in raw._INSTRUCTION_MAP}
        forward, backward = kinds["ForwardPass"], kinds["BackwardPass"]
        self._forward_one_by_one, self._backward_one_by_one = (
            raw._INSTRUCTION_MAP[kind] for kind in (forward, backward)
        )
        raw._INSTRUCTION_MAP = {**raw._INSTRUCTION_MAP, forward: self._forward, backward: self._backward}

    def end_step(self) -> None:
        """A step is over."""
        self._steps_left = max(0, self._steps_left - 1)

    def _forward(self, raw: Any, buffer_id: int) -> None:
        self._replayed = False
        if self._gave_up or self._steps_left or not raw.module.training:
            self._forward_one_by_one(raw, buffer_id)
            return
        batch = _tensors(raw, buffer_id)
        key = (raw.gradient_accumulation_steps(), *((tensor.shape, tensor.dtype) for tensor in batch))
        if key != self._key:
            self._recorded = None  # The memory of one graph is enough.
            self._recorded, self._key = self._try_to_record(raw, buffer_id, batch), key
        if self._recorded is None:
            self._forward_one_by_one(raw, buffer_id)
            return
        for place, tensor in zip(self._recorded.inputs, batch, strict=True):
            place.copy_(tensor, non_blocking=True)
        self._recorded.recording.replay()
        raw.total_loss = self._recorded.loss.clone() if raw.total_loss is None else raw.total_loss + self._recorded.loss
        self._replayed = True

    def _backward(self, raw: Any, buffer_id: int) -> None:
        if not self._replayed:
            self._backward_one_by_one(raw, buffer_id)

    def _try_to_record(self, raw: Any, buffer_id: int, batch: tuple[Tensor, ...]) -> _Recorded | None:
        inputs = tuple(tensor.clone() for tensor in batch)
        total = raw.total_loss

        def work() -> None:
            _place(raw, buffer_id, inputs)
            raw.total_loss = None
            self._forward_one_by_one(raw, buffer_id)
            self._backward_one_by_one(raw, buffer_id)
            self._sums.add_waiting()

        recorded = None
        try:
            recording = self._record(work)
            recorded = _Recorded(recording, inputs, raw.loss.detach())
        except RuntimeError as failure:
            self._gave_up = True
            self._sums.forget_waiting()
            raw.optimizer.clear_lp_grads(set_to_none=True)
            raw.pipe_buffers["outputs"][buffer_id] = None  # It holds the activations of a micro-batch that failed.
            self._console.warning(
                f"CUDA graph: off, as a micro-batch could not be recorded ({str(failure).splitlines()[0]}); "
                "--no-cuda-graph does not try"
            )
        finally:
            raw.total_loss = total
            raw.fwd_outputs.clear()
            raw.loss = None
            _place(raw, buffer_id, batch)
        return recorded


def _tensors(raw: Any, buffer_id: int) -> tuple[Tensor, ...]:
    """What a micro-batch reads: tokens, labels, loss mask."""
    return raw.pipe_buffers["inputs"][buffer_id], *raw.pipe_buffers["labels"][buffer_id]


def _place(raw: Any, buffer_id: int, tensors: tuple[Tensor, ...]) -> None:
    raw.pipe_buffers["inputs"][buffer_id] = tensors[0]
    raw.pipe_buffers["labels"][buffer_id] = tensors[1:]


def choose_cuda_graph(config: Config, topology: Topology, *, attention: str, console: Console) -> bool:
    """Whether micro-batches become a graph, by output.cuda_graph ("auto", "on" or "off") and what they do; logged.

    With a graph the current stream of this thread changes: the default one cannot be recorded.
    Raises: KernelError if a graph is asked for and cannot be had.
    """
    requested = config.output.cuda_graph
    reason = "asked for" if requested == "off" else obstacle(config, topology, attention=attention)
    if requested == "on" and reason is not None:
        raise KernelError(f"output.cuda_graph = on cannot be done: {reason}\n  leave it out, or --no-cuda-graph")
    if reason is not None:
        console.info(f"CUDA graph: off ({reason})")
        return False
    console.info(f"CUDA graph: on (a micro-batch, after step {STEPS_BEFORE})")
    stream = torch.cuda.Stream(topology.device)
    stream.wait_stream(torch.cuda.current_stream(topology.device))
    torch.cuda.set_stream(stream)
    return True


def obstacle(config: Config, topology: Topology, *, attention: str) -> str | None:
    """Why a micro-batch cannot be one graph here, or None. `attention` is the name of the attention core."""
    model, training = config.model, config.training
    if topology.device.type != "cuda":
        return "it is for GPUs"
    if topology.model.size > 1:
        return "ranks send within a micro-batch"
    if training.dtype != "bf16" or effective_zero_stage(config) != 1:
        return "gradients have a fixed place in bf16 with ZeRO-0 and ZeRO-1 alone"
    for key, measures in DEEPSPEED_MEASURES.items():
        if measures(config.deepspeed.get(key)):
            return f"{key} of the DeepSpeed configuration measures inside micro-batches, where a graph runs no Python"
    if model.hidden_dropout > 0.0 or model.attention_dropout > 0.0:
        return "dropout draws other numbers in every micro-batch"
    if attention != "triton" and not (attention == "sdpa" and model.position_embedding != "alibi"):
        return f"the {attention} attention core keeps tensors between calls"
    return None
