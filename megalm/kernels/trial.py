"""A kernel that may or may not be the better one on this GPU, tried there before a run takes it.

Reports of such kernels contradict each other from one GPU, driver or shape to the next, so `auto` measures them once,
at the run's own sizes. It does so in a process of its own: a call into a library that goes wrong on a GPU that nobody
has tried takes its process with it, and a run must go on.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megalm.kernels import self_check
from megalm.kernels.adamw.oracle import TorchAdamW
from megalm.kernels.adamw.protocol import AdamWKernel
from megalm.kernels.backend import Verdict
from megalm.kernels.bias_gelu.protocol import BiasGeluKernel
from megalm.kernels.gelu_linear.operations import BY_NAME
from megalm.kernels.gelu_linear.oracle import TorchGeluLinear
from megalm.kernels.gelu_linear.protocol import GeluLinearKernel

PATIENCE_SECONDS = 180.0
SHARE = 0.97
"""Of the other side's time: what a kernel may take, so that noise does not decide."""
ERROR_SHARE = 1.1
"""Of the reference's own error against float64."""
ROUNDS, CALLS = 15, 4
"""Measurements, and calls in one of them: a GPU computes while the host starts the next."""
MOST_TOKENS = 16_384
"""More are as fast for each."""
NUM_ELEMENTS = 2**26


def in_a_process(
    contest: Callable[[], Verdict], *, device: torch.device | None = None, seconds: float = PATIENCE_SECONDS
) -> Verdict:
    """What `contest` finds on `device` in a new process, which may end in any way, or not at all. It must be one to
    pickle."""
    started = time.perf_counter()
    try:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(contest, device, theirs), daemon=True)
        process.start()
        theirs.close()
        try:
            verdict = ours.recv() if ours.poll(seconds) else Verdict(False, f"no answer in {seconds:g} s")
        except EOFError:
            process.join()
            verdict = Verdict(False, f"its process ended with code {process.exitcode}")
        process.kill()
        process.join()
    except Exception as error:  # Where no process can be started, the run goes on without.
        verdict = Verdict(False, _words(error))
    return verdict._replace(reason=f"{verdict.reason}; tried in {time.perf_counter() - started:.0f} s")


def _answer(contest: Callable[[], Verdict], device: torch.device | None, connection: Connection) -> None:
    try:
        if device is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # Triton, graphs and events take the current one, which is GPU 0 at first.
        verdict = contest()
    except Exception as error:  # Whatever a library or a driver raises.
        verdict = Verdict(False, _words(error))
    connection.send(verdict)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def gelu_inside(
    name: str,
    bias_gelu: BiasGeluKernel,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_tokens: int,
    hidden_size: int,
    ffn_size: int,
) -> Verdict:
    """The kernel of that name, with the GELU inside the MLP's products, against products with `bias_gelu` between them.

    Timed and repeated in CUDA graphs, as in a run; what is repeated must be the same to the bit.
    """
    kernel, draw = BY_NAME[name], self_check.Draw(device, dtype)
    rows = min(num_tokens, MOST_TOKENS)
    x, up, bias = draw(rows, hidden_size), draw(ffn_size, hidden_size) / hidden_size**0.5, draw(ffn_size)
    grad, down = draw(rows, hidden_size), draw(hidden_size, ffn_size) / hidden_size**0.5

    def inside() -> tuple[Tensor, ...]:
        y, inner = kernel.forward(x, up, bias)
        return y, inner, *kernel.backward(grad, down, inner)

    def apart() -> tuple[Tensor, ...]:
        inner, added = functional.linear(x, up).requires_grad_(), bias.detach().requires_grad_()
        y = bias_gelu(inner, added)
        return y.detach(), *torch.autograd.grad(y, (inner, added), grad @ down)

    few = min(rows, 512)
    wrong = _errs_more(kernel, x[:few], up, bias, grad[:few], down)
    if wrong is not None:
        return Verdict(False, wrong)
    once = inside()
    (again, repeat), (_, repeat_apart) = _repeatable(inside, device), _repeatable(apart, device)
    repeat()
    if not all(torch.equal(one, other) for one, other in zip(once, again or inside(), strict=True)):
        return Verdict(False, "its results differ from one call to the next")
    return _faster(repeat, repeat_apart, device)


def update(kernel: AdamWKernel, *, device: torch.device, num_elements: int = NUM_ELEMENTS) -> Verdict:
    """An update against torch's, both clipped, on bf16 weights."""
    draw = self_check.Draw(device, torch.float32)
    master, gradient, exp_avg = (draw(num_elements) for _ in range(3))
    state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg.square(), "step": torch.full((), 10.0, device=device)}
    weight, factor = master.bfloat16(), torch.full((), 2.0, device=device)

    def updating(one: AdamWKernel) -> Callable[[], None]:
        return lambda: one.update_(
            master, gradient, weight, **state, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, factor=factor
        )

    wrong = self_check.failure("adamw", kernel, device)
    return Verdict(False, wrong) if wrong is not None else _faster(updating(kernel), updating(TorchAdamW()), device)


def _errs_more(kernel: GeluLinearKernel, x: Tensor, up: Tensor, bias: Tensor, grad: Tensor, down: Tensor) -> str | None:
    """What a kernel computes less exactly than torch's products and GELU do, against float64."""
    _, inner = TorchGeluLinear().forward(x, up, bias)
    results = []
    for one, dtype in ((kernel, x.dtype), (TorchGeluLinear(), x.dtype), (TorchGeluLinear(), torch.float64)):
        forward = one.forward(*(value.to(dtype) for value in (x, up, bias)))
        results.append((*forward, *one.backward(*(value.to(dtype) for value in (grad, down, inner)))))
    for name, *found in zip(("result", "inner result", "gradient", "bias's gradient"), *results, strict=True):
        got, reference, exact = (value.double() for value in found)
        error, bound = ((value - exact).norm() / exact.norm() for value in (got, reference))
        if not error <= ERROR_SHARE * bound + 1e-6:
            return f"its {name} errs by {error.item():.2e}, that of torch by {bound.item():.2e}"
    return None


def _repeatable(
    run: Callable[[], tuple[Tensor, ...]], device: torch.device
) -> tuple[tuple[Tensor, ...] | None, Callable[[], Any]]:
    """A CUDA graph of `run` and the results that its replays write; `run` itself elsewhere."""
    if device.type != "cuda":
        return None, run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return results, graph.replay


def _faster(run: Callable[[], Any], other: Callable[[], Any], device: torch.device) -> Verdict:
    """Both in turns, whose medians are compared."""
    times: list[list[float]] = [[], []]
    for found, one in [*zip(times, (run, other), strict=True)] * (ROUNDS + 2):
        found.append(_milliseconds(one, device))
    ours, theirs = (statistics.median(found[2:]) for found in times)
    return Verdict(ours <= SHARE * theirs, f"{ours:.3f} ms where the other takes {theirs:.3f}")


def _milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(CALLS):
        run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / CALLS
