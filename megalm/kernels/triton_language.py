"""Triton's decorator and language under one name, so that kernel files can be imported where Triton is not installed.

Only files of kernels and of their launches import this; it loads Triton, which takes half a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`; without Triton the function as it is, which nothing can launch."""
    return function if triton is None else triton.jit(function)


def ceil_div(numerator: int, denominator: int) -> int:
    """How many blocks of `denominator` cover `numerator`."""
    return -(-numerator // denominator)


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`, which is positive."""
    return 1 << (number - 1).bit_length()


__all__ = ["ceil_div", "jit", "next_power_of_two", "tl", "triton"]
