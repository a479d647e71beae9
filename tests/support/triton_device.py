"""Where tests run Triton kernels: on the GPU if there is one, otherwise in Triton's interpreter on the CPU.

`with triton_device() as device:` (or the fixture of that name in tests/unit/kernels/conftest.py) is all that a test
needs: the launches inside it work on tensors of `device`. No environment variable is set and no module is imported
anew: Triton decides at decoration whether a function is compiled or interpreted, so the block replaces the compiled
functions of megalm.kernels and of triton.language by interpreted ones and puts everything back at its end. Thus one
process can interpret a kernel and compile it ahead of time, in any order.

Rules for kernels: call `tl.sum(x)` rather than `x.sum()`; import the language as `tl` into the module; no autotuning
(it times kernels, which needs a GPU, and it lets two runs of one program differ in their last bits).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch

ON_GPU = torch.cuda.is_available()
"""Whether kernels run for real: tests may then take larger shapes."""


def _can_launch() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return ON_GPU or tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)


INSTALLED = _can_launch()
"""Whether there is a Triton to launch kernels with; tests skip where there is none. Without a GPU it takes 3.6,
whose interpreter is patched below."""
ABSENT = "Triton is not installed, or has no GPU and an interpreter from before 3.6"


@contextlib.contextmanager
def triton_device() -> Iterator[torch.device]:
    """The device that kernels can be launched on inside the block."""
    if ON_GPU:
        yield torch.device("cuda", torch.cuda.current_device())
        return
    with _interpreted():
        yield torch.device("cpu")


@contextlib.contextmanager
def _interpreted() -> Iterator[None]:
    import triton
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    # The interpreter patches these and, after calls of one function by another, does not restore them.
    patched = [tl, tl.core, tl.math, tl.core.tensor, tl.core.dtype, tl.core.tensor_descriptor_base]
    before = [(target, dict(vars(target))) for target in patched]
    replaced: list[tuple[ModuleType, str, Any]] = []
    twins: dict[int, Any] = {}
    interpret = triton.knobs.runtime.interpret
    patch_tensor, convert_float = interpreter._patch_lang_tensor, interpreter._convert_float
    create_dot = interpreter.InterpreterBuilder.create_dot
    triton.knobs.runtime.interpret = True
    interpreter._patch_lang_tensor = functools.partial(_patch_tensor, patch_tensor)
    interpreter._convert_float = functools.partial(_convert_float, convert_float)
    interpreter.InterpreterBuilder.create_dot = functools.partialmethod(_dot, create_dot, interpreter.TensorHandle)
    try:
        for module in _modules_with_kernels():
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    replaced.append((module, name, value))
                    twin = twins.setdefault(id(value), InterpretedFunction(value.fn))
                    setattr(module, name, twin)
        yield
    finally:
        triton.knobs.runtime.interpret = interpret
        interpreter._patch_lang_tensor, interpreter._convert_float = patch_tensor, convert_float
        interpreter.InterpreterBuilder.create_dot = create_dot
        for module, name, value in replaced:
            setattr(module, name, value)
        for target, attributes in before:
            _restore(target, attributes)


def _patch_tensor(patch: Callable[..., None], tensor: Any, scope: Any) -> None:
    patch(tensor, scope)
    # Triton 3.6 converts an array of one element, which numpy 2.4 refuses, where a kernel computes a loop's bound.
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _convert_float(convert: Callable[..., Any], values: Any, source: Any, target: Any, rounding: Any) -> Any:
    # Triton 3.6 truncates fp32 to bf16 here; a GPU rounds to the nearest, as torch does.
    if (str(source), str(target), rounding) == ("fp32", "bf16", None):
        rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)
    return convert(values, source, target, rounding)


def _dot(builder: Any, dot: Callable[..., Any], handle: Callable[..., Any], *arguments: Any) -> Any:
    # Triton 3.6 multiplies the bit patterns of bf16; fp32 holds the products exactly, and a GPU sums them in fp32 too.
    a, b, *rest = arguments
    fp32 = type(a.dtype.scalar)("fp32")
    wide = (handle(_wide(x.data), fp32) if str(x.dtype.scalar) == "bf16" else x for x in (a, b))
    return dot(builder, *wide, *rest)


def _wide(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _modules_with_kernels() -> list[ModuleType]:
    return [
        module
        for name, module in list(sys.modules.items())
        if module is not None and name.startswith(("megalm.kernels", "triton.language"))
    ]


def _restore(target: Any, attributes: dict[str, Any]) -> None:
    for name, value in list(vars(target).items()):
        if name not in attributes:
            delattr(target, name)
        elif value is not attributes[name]:
            setattr(target, name, attributes[name])
