"""What the compiler makes of the Triton attention kernels for a Hopper GPU, which takes no GPU to find out.

The interpreter proves the numbers. This proves that the kernels compile for sm_90 with the blocks that are shipped,
that their products are asynchronous wgmma, that they fit into shared memory, and that the main path spills no
registers. `--full` adds the variants.
"""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.support.triton_device import ABSENT, INSTALLED

if not INSTALLED:
    pytest.skip(ABSENT, allow_module_level=True)

import triton

from megalm.kernels.attention import triton_backward, triton_forward
from megalm.kernels.attention.suitability import TRITON_SHARED_BYTES
from megalm.kernels.attention.triton_launch import Blocks, Cut, cut_for, head_parts

SHARED_BYTES = TRITON_SHARED_BYTES
"""What the choice of cores asks for; a block of an H100 can have 227 KiB."""

KERNELS = {
    "forward": triton_forward.attention_forward,
    "query_gradient": triton_backward.attention_query_gradient,
    "key_value_gradient": triton_backward.attention_key_value_gradient,
}
SERIALISED = ("key_value_gradient",)
"""Kernels whose wgmma may wait for one another: timed, these blocks are faster than any that ptxas does not serialise,
as two programs share a multiprocessor (docs/log.md)."""
FP32 = ("lse", "shifted_lse", "delta", "slopes", "norms", "sums")
INT32 = ("first_key", "starts")
FLOATS = ("scale", "scale2", "keep")


@dataclass(frozen=True)
class Report:
    """What ptxas said of one kernel."""

    shared_bytes: int
    registers: int
    spilled_bytes: int
    scratch_bytes: int
    """Of global memory, which would need an allocator."""
    serialised: bool
    ptx: str


def compile_for_hopper(
    kernel: str, head_size: int, dtype: torch.dtype, *, alibi: bool = True, starts: bool = False, dropout: bool = False,
    group: int = 1, cut: Cut | None = None,
) -> Report:  # fmt: skip
    """Compile one kernel ahead of time for sm_90 with the blocks that launches use."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = KERNELS[kernel]
    cut = cut or cut_for(head_size, dtype, dropout=dropout, grouped=group > 1)
    blocks: Blocks = getattr(cut, kernel)
    element = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    main, rest = head_parts(head_size)
    constants: dict[str, Any] = {
        "GROUP": group, "HEAD_SIZE": head_size, "D": main, "R": rest, "BOUND_BLOCK": cut.forward.queries,
        "SHIFT_BLOCK": cut.key_value_gradient.queries,
        "BLOCK_Q": blocks.queries, "BLOCK_K": blocks.keys, "ALIBI": alibi, "STARTS": starts, "DROPOUT": dropout,
        "SUMS": group == 1, "PRECISION": "ieee" if dtype == torch.float32 else "tf32", "BITS": 16,
    }  # fmt: skip
    constants |= {} if alibi else {"slopes": None, "norms": None}
    constants |= {} if starts else {"starts": None}
    constants |= {} if dropout else {"seed": None}
    constants |= {} if group == 1 else {"sums": None}
    constants |= {} if rest else {name: None for name in function.arg_names if name.endswith("_rest_desc")}
    signature, divisible = {}, {}
    for index, name in enumerate(function.arg_names):
        signature[name] = _type_of(name, element, blocks, constants)
        # Launches find out by themselves that addresses and strides are multiples of 16.
        if signature[name].startswith("*") or "stride" in name or name == "num_positions":
            divisible[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        function,
        signature=signature,
        constexprs={name: value for name, value in constants.items() if name in signature},
        attrs=divisible,
    )
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": blocks.warps, "num_stages": blocks.stages},
        )
    text = log.getvalue()
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    registers = re.search(r"Used (\d+) registers", text)
    assert spilled is not None, text
    assert registers is not None, text
    return Report(
        compiled.metadata.shared,
        int(registers.group(1)),
        int(spilled.group(1)) + int(spilled.group(2)),
        compiled.metadata.global_scratch_size,
        "serialized" in text,
        compiled.asm["ptx"],
    )


def _type_of(name: str, element: str, blocks: Blocks, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name.endswith("_desc"):
        rows = blocks.keys if name[:2] in ("k_", "v_") else blocks.queries
        columns = constants["R" if name.endswith("_rest_desc") else "D"]
        return f"tensordesc<{element}[1, 1, {rows}, {columns}]>"
    if name in FP32 or name in INT32 or name == "seed":
        return "*fp32" if name in FP32 else "*i32" if name in INT32 else "*i64"
    if name in ("out", "dq", "dk", "dv"):
        return f"*{element}"
    return "fp32" if name in FLOATS else "i32"


@pytest.fixture(autouse=True)
def _compilable(tmp_path: Any) -> Any:
    if not hasattr(triton_forward.attention_forward, "arg_names") or triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set for the whole process")
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        yield


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("head_size", [64, 128])
def test_alibi_kernels_fit_a_hopper_gpu_without_spills(kernel: str, head_size: int) -> None:
    report = compile_for_hopper(kernel, head_size, torch.bfloat16)
    assert report.spilled_bytes == 0
    assert not report.serialised or kernel in SERIALISED
    assert report.shared_bytes <= SHARED_BYTES
    assert report.scratch_bytes == 0
    assert "wgmma.mma_async" in report.ptx
    assert "cp.async.bulk.tensor.4d" in report.ptx
    assert not re.search(r"\batom\.", report.ptx)
    assert not re.search(r"\bred\.", report.ptx)


# Bytes that may be spilled, stores and loads together, where the main path's blocks are kept although they hold a
# little more, the mask of documents for instance: a few accesses among 450 instructions.
VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "no alibi": ({"alibi": False}, 0),
    "documents": ({"starts": True}, 96),
    "dropout": ({"dropout": True}, 96),
    "documents and dropout": ({"starts": True, "dropout": True}, 96),
    "shared keys": ({"group": 4}, 16),
}


@pytest.fixture
def _full(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--full"):
        pytest.skip("54 compilations; --full runs them")


@pytest.mark.slow
@pytest.mark.usefixtures("_full")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("head_size, dtype", [(64, torch.bfloat16), (128, torch.float16), (80, torch.bfloat16)])
def test_every_variant_compiles_for_a_hopper_gpu(kernel: str, head_size: int, dtype: torch.dtype, variant: str) -> None:
    flags, allowed = VARIANTS[variant]
    report = compile_for_hopper(kernel, head_size, dtype, **flags)
    assert report.spilled_bytes <= allowed
    assert not report.serialised or kernel in SERIALISED
    assert report.shared_bytes <= SHARED_BYTES


@pytest.mark.slow
@pytest.mark.usefixtures("_full")
@pytest.mark.parametrize("kernel", KERNELS)
def test_fp32_kernels_compile_for_a_hopper_gpu(kernel: str) -> None:
    report = compile_for_hopper(kernel, 128, torch.float32)
    assert report.shared_bytes <= SHARED_BYTES
