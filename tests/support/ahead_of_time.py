"""Compiles a Triton kernel for an H100 on a machine without one, and reads what ptxas says about registers.

Triton brings ptxas along. What cannot be seen here is how long the kernel takes.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32", "i64": "*i64", "u8": "*u8"}
ARCHITECTURE = 90


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes of a multiprocessor."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    ptx: str


def compile_for_hopper(kernel: Any, arguments: dict[str, Any], folder: Path, *, num_warps: int) -> Resources:
    """Compile `kernel` with arguments that are a type of TYPES for a tensor, `int` or `float`, or a constant.

    Tensors are taken to be aligned to 16 bytes and whole numbers to be multiples of 16, as they are in a run.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if value in TYPES:
            signature[name] = TYPES[value]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif value is int:
            signature[name] = "i32"
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif value is float:
            signature[name] = "fp32"
        else:
            signature[name] = "constexpr"
            constants[(place,)] = value
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURE, 32), options={"num_warps": num_warps})
    ptx = compiled.asm["ptx"]
    (folder / "kernel.ptx").write_text(ptx)
    command = [
        str(get_ptxas(ARCHITECTURE).path),
        "-v",
        f"--gpu-name=sm_{ARCHITECTURE}a",
        str(folder / "kernel.ptx"),
        "-o",
        str(folder / "cubin"),
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill", said)]
    registers = re.search(r"Used (\d+) registers", said)
    assert registers, said
    return Resources(int(registers[1]), sum(spilled), compiled.metadata.shared, ptx)
