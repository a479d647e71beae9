"""cuBLASLt's matrix product with an epilogue, called in the library that torch has loaded.

torch gives access to some epilogues, and to none that keeps what went into the GELU or that differentiates it.
Source: https://docs.nvidia.com/cuda/cublas, "Using the cuBLASLt API"; numbers and structures from cublasLt.h of CUDA
13, the same in CUDA 12.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megalm.errors import KernelError

GELU_AUX_BIAS, DGELU, DGELU_BGRAD = 32 | 128 | 4, 64 | 128, 64 | 128 | 16
WORKSPACE_BYTES = 32 * 2**20
"""What NVIDIA recommends for Hopper."""
ALIGNMENT = 16
"""Bytes: what the fast algorithms ask of every matrix, its rows included."""

_COMPUTE_32F, _R_32F = 68, 0
_DTYPES = {torch.float16: 2, torch.bfloat16: 14, torch.float32: 0}
_TRANSPOSE_A, _EPILOGUE, _BIAS_POINTER, _AUX_POINTER, _AUX_LD = 3, 7, 8, 11, 12
_MAX_WORKSPACE, _MIN_ALIGNMENT = 1, (5, 6, 7, 8)


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t: an algorithm first, then what it needs and how well it fills the GPU."""

    _fields_ = [
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


@dataclass(frozen=True)
class Shape:
    """D = epilogue(op(A) B), column after column as cuBLAS sees memory: A [k, m] or, not transposed, [m, k], B [k, n],
    D and the epilogue's matrix [m, n]."""

    m: int
    n: int
    k: int
    transposes_a: bool
    epilogue: int
    dtype: torch.dtype


class Host(Protocol):
    """What a call needs of the process: the library, a handle of it, a stream and memory."""

    library: Any

    def handle(self) -> int: ...

    def stream(self) -> int: ...


class TorchHost:
    """The library, the handle and the stream that torch uses on its current device."""

    def __init__(self) -> None:
        self.library = loaded_library()

    def handle(self) -> int:
        """cuBLAS's handle, which serves cuBLASLt too, as torch itself uses it."""
        return torch.cuda.current_blas_handle()

    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream


@functools.cache
def loaded_library() -> Any:
    """cuBLASLt of torch's CUDA release, by the name under which torch has loaded it. Raises: OSError."""
    return ctypes.CDLL(f"libcublasLt.so.{(torch.version.cuda or '').partition('.')[0]}")


class Product:
    """One shape's descriptors and algorithm, chosen once by cuBLASLt's heuristic, so that every call gives the same
    bits. `choice` takes a later one of its suggestions.

    Raises: KernelError if cuBLASLt has no algorithm for the shape.
    """

    def __init__(self, host: Host, shape: Shape, *, choice: int = 0) -> None:
        self._host = host
        self._shape = shape
        self._description = self._created("cublasLtMatmulDescCreate", ctypes.c_int(_COMPUTE_32F), ctypes.c_int(_R_32F))
        self._set(_TRANSPOSE_A, ctypes.c_int32(shape.transposes_a))
        self._set(_EPILOGUE, ctypes.c_uint32(shape.epilogue))
        self._set(_AUX_LD, ctypes.c_int64(shape.m))
        # The heuristic looks at the alignment of these alone.
        self._set(_AUX_POINTER, ctypes.c_void_p(ALIGNMENT))
        self._set(_BIAS_POINTER, ctypes.c_void_p(ALIGNMENT))
        self._a = self._matrix(*((shape.k, shape.m) if shape.transposes_a else (shape.m, shape.k)))
        self._b = self._matrix(shape.k, shape.n)
        self._d = self._matrix(shape.m, shape.n)
        preference = self._created("cublasLtMatmulPreferenceCreate")
        self._prefer(preference, _MAX_WORKSPACE, ctypes.c_uint64(WORKSPACE_BYTES))
        for attribute in _MIN_ALIGNMENT:
            self._prefer(preference, attribute, ctypes.c_uint32(ALIGNMENT))
        found, number = (_Heuristic * (choice + 1))(), ctypes.c_int()
        status = host.library.cublasLtMatmulAlgoGetHeuristic(
            ctypes.c_void_p(host.handle()), self._description, self._a, self._b, self._d, self._d, preference,
            ctypes.c_int(choice + 1), found, ctypes.byref(number),
        )  # fmt: skip
        self._call("cublasLtMatmulPreferenceDestroy", preference)
        if status or number.value <= choice or found[choice].state:
            raise KernelError(
                f"cuBLASLt has no algorithm for {shape} (status {status}, {number.value} suggestions)\n"
                "  --gelu-linear-kernel separate works everywhere"
            )
        self._algorithm = found[choice]

    def __call__(self, a: Tensor, b: Tensor, out: Tensor, aux: Tensor, bias: Tensor) -> None:
        """Write `out`, and `aux` or `bias` if they are the epilogue's results. All contiguous and aligned."""
        assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in (a, b, out, aux, bias))
        self._set(_AUX_POINTER, ctypes.c_void_p(aux.data_ptr()))
        self._set(_BIAS_POINTER, ctypes.c_void_p(bias.data_ptr()))
        workspace = torch.empty(self._algorithm.workspace_bytes, dtype=torch.uint8, device=a.device)
        one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        place = ctypes.c_void_p(out.data_ptr())
        self._call(
            "cublasLtMatmul",
            ctypes.c_void_p(self._host.handle()), self._description, ctypes.byref(one),
            ctypes.c_void_p(a.data_ptr()), self._a, ctypes.c_void_p(b.data_ptr()), self._b, ctypes.byref(zero),
            place, self._d, place, self._d, self._algorithm.algorithm,
            ctypes.c_void_p(workspace.data_ptr()), ctypes.c_size_t(workspace.numel()),
            ctypes.c_void_p(self._host.stream()),
        )  # fmt: skip

    def _matrix(self, rows: int, columns: int) -> ctypes.c_void_p:
        sizes = ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows)
        return self._created("cublasLtMatrixLayoutCreate", ctypes.c_int(_DTYPES[self._shape.dtype]), *sizes)

    def _created(self, function: str, *arguments: Any) -> ctypes.c_void_p:
        """Descriptors stay as long as the process: there is one `Product` for every shape of a model."""
        made = ctypes.c_void_p()
        self._call(function, ctypes.byref(made), *arguments)
        return made

    def _set(self, attribute: int, value: Any) -> None:
        self._call("cublasLtMatmulDescSetAttribute", self._description, *_attribute(attribute, value))

    def _prefer(self, preference: ctypes.c_void_p, attribute: int, value: Any) -> None:
        self._call("cublasLtMatmulPreferenceSetAttribute", preference, *_attribute(attribute, value))

    def _call(self, function: str, *arguments: Any) -> None:
        called: Callable[..., int] = getattr(self._host.library, function)
        status = called(*arguments)
        if status:
            raise KernelError(f"{function} of cuBLASLt failed with status {status} for {self._shape}")


def _attribute(number: int, value: Any) -> tuple[Any, ...]:
    return ctypes.c_int(number), ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value))
