"""Whether Triton can compile kernels here, without loading it."""

from __future__ import annotations

import importlib.util
import shutil

COMPILERS = ("gcc", "clang", "cc")


def triton_missing() -> str | None:
    """What Triton lacks on this machine, or None. It compiles the code that launches its kernels with a C compiler."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if not any(shutil.which(compiler) for compiler in COMPILERS):
        return f"Triton needs a C compiler, and none of {', '.join(COMPILERS)} is on PATH"
    return None
