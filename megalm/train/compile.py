"""torch.compile by region: each transformer block by itself; stages, recomputation and engines stay as they are.

All blocks of a stage share one compiled graph, since they differ in their weights alone.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from megalm.errors import KernelError
from megalm.kernels.attention.baddbmm import BaddbmmAttention
from megalm.kernels.attention.sdpa import SdpaAttention
from megalm.kernels.linear.torch_native import TorchLinear
from megalm.kernels.triton_support import triton_missing
from megalm.models.blocks.block import ParallelTransformerLayer
from megalm.telemetry.console import Console
from megalm.train.watchdog import Watchdog

CPU_COMPILERS = ("g++", "clang++", "c++")
STEPS_TO_COMPILE = 3
"""Steps of a run in which compiling is expected; later it costs time that was not planned, and is warned of."""


class CompileWatch:
    """Counts what torch.compile compiles and how long it takes."""

    def __init__(self, console: Console, *, watchdog: Watchdog | None = None) -> None:
        self._console = console
        self._watchdog = watchdog
        self._num_graphs = 0
        self._seconds = 0.0
        self._started: float | None = None
        self.listens = False

    def listen(self) -> None:
        """Hear of every compilation from now on."""
        import torch._dynamo

        self.listens = True
        torch._dynamo.on_compile_start(self._on_start)
        torch._dynamo.on_compile_end(self._on_end)

    def report(self, occasion: str, *, expected: bool) -> int:
        """Log what was compiled since the last report, as a warning unless it was `expected`. Returns the graphs."""
        num_graphs, seconds = self._num_graphs, self._seconds
        self._num_graphs, self._seconds = 0, 0.0
        if num_graphs and expected:
            self._console.info(f"compiled {num_graphs} graph(s) in {seconds:.1f} s during {occasion}")
        elif num_graphs:
            self._console.warning(
                f"recompiled {num_graphs} graph(s) in {seconds:.1f} s during {occasion}: something changed that the "
                "compiled blocks depend on; --no-compile runs without"
            )
        return num_graphs

    def _on_start(self, _: Any = None) -> None:
        if self._watchdog is not None:
            self._watchdog.compiles()
        self._started = time.perf_counter()

    def _on_end(self, _: Any = None) -> None:
        if self._started is not None:
            self._num_graphs += 1
            self._seconds += time.perf_counter() - self._started
            self._started = None
            if self._watchdog is not None:
                self._watchdog.has_compiled()


def compile_blocks(
    module: nn.Module,
    *,
    requested: str,
    device: torch.device,
    zero_stage: int,
    console: Console,
    watchdog: Watchdog | None = None,
    backend: str = "inductor",
) -> CompileWatch:
    """Compile every block of `module`, if `requested` ("auto", "on" or "off") and the machine say so; log which.

    `watchdog` hears when it compiles. `backend` is torch.compile's; others than its default need no compiler of C.
    Raises: KernelError if it is asked for and cannot be done.
    """
    watch = CompileWatch(console, watchdog=watchdog)
    if requested == "off":
        console.info("torch.compile: off (asked for)")
        return watch
    reason = obstacle(device, zero_stage=zero_stage, needs_compiler=backend == "inductor")
    if requested == "on" and reason is not None:
        raise KernelError(f"output.compile = on cannot be done on {device}: {reason}\n  leave it out, or --no-compile")
    if requested == "auto" and device.type == "cpu":
        reason = "on a CPU it is for --compile to ask for"
    if reason is not None:
        console.info(f"torch.compile: off ({reason})")
        return watch
    blocks = [part for part in module.modules() if isinstance(part, ParallelTransformerLayer)]
    for block in blocks:
        _keep_outside(block)
        # The part inside recomputation; what DeepSpeed hooks into the module's call stays outside of the graph.
        block._compute = torch.compile(block._compute, dynamic=False, backend=backend)  # type: ignore[method-assign]
    watch.listen()
    console.info(f"torch.compile: on ({len(blocks)} blocks, at the first step)")
    return watch


def _keep_outside(block: ParallelTransformerLayer) -> None:
    """Mark what a graph cannot hold, so that it is cut there: collectives, products that are not torch's own, attention
    cores that keep a bias between calls, and a backward that differentiates by itself."""
    attention = block.self_attention
    columns, rows = (attention.query_key_value, block.mlp.dense_h_to_4h), (attention.dense, block.mlp.dense_4h_to_h)
    for part in (*columns, *rows):
        if part.tp.size > 1 or part.kernel.name != TorchLinear.name:
            _cut_at(part, "with_bias" if part in columns else "forward")
    if block.mlp.recomputes_activation:
        _cut_at(block.mlp.dense_4h_to_h, "after_activation")
    if attention.alibi is not None and isinstance(attention.core, SdpaAttention | BaddbmmAttention):
        _cut_at(attention, "_attend")
    if block.spread.splits_sequence:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            _cut_at(norm, "forward")
            _cut_at(norm, "after_adding")
            _cut_at(norm, "and_pass")


def _cut_at(module: nn.Module, method: str) -> None:
    # One function for all modules of a class, as graphs are compiled again for every other function they meet.
    setattr(module, method, MethodType(_uncompiled(getattr(type(module), method)), module))


@functools.cache
def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compiler.disable(function)


def obstacle(device: torch.device, *, zero_stage: int, needs_compiler: bool = True) -> str | None:
    """Why blocks cannot be compiled here, or None."""
    if zero_stage == 3:
        return "ZeRO-3 gathers parameters in hooks inside the blocks"
    if device.type == "cuda":
        return triton_missing()
    if needs_compiler and not any(shutil.which(compiler) for compiler in CPU_COMPILERS):
        return f"there is no compiler among {', '.join(CPU_COMPILERS)}"
    return None
