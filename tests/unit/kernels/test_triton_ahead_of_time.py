"""Every Triton kernel compiles for an H100 as it is launched there, without spilling registers."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megalm.kernels import triton_sums
from megalm.kernels.adamw import triton_adamw
from megalm.kernels.attention import triton_forward, triton_launch
from megalm.kernels.bias_gelu import triton_activation as activation
from megalm.kernels.cross_entropy import triton_rows
from megalm.kernels.dropout_add import triton_dropout as dropout
from megalm.kernels.gradient_sum import triton_sum
from megalm.kernels.layer_norm import triton_norm as norm
from megalm.kernels.rotary import triton_rotary
from megalm.kernels.softmax import triton_softmax
from megalm.kernels.triton_language import ceil_div, next_power_of_two
from tests.support import triton_device
from tests.support.ahead_of_time import compile_for_hopper
from tests.unit.kernels import test_attention_compiled

pytestmark = pytest.mark.skipif(not triton_device.INSTALLED, reason=triton_device.ABSENT)

# BLOOM-560m, -1b7, -7b1 and -176B.
WIDTHS = (1024, 2048, 4096, 14336)


class Launch(NamedTuple):
    """A kernel, its constants and its warps. `argument` tells what the rest of its arguments are."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    num_warps: int
    streams: bool = True
    """Whether it reads so much that 16 bytes at a time matter."""


NUMBERS = {
    "num_rows", "num_columns", "row_stride", "size", "x_stride", "residual_stride", "dy_stride", "dtotal_stride",
    "threshold", "num_queries", "num_heads", "num_positions", "half", "mask_batch", "mask_head", "mask_query",
    "stride_batch", "stride_head", "stride_position", "num_parts", "num_blocks",
    "width", "stride_b", "stride_n", "stride_s",
}  # fmt: skip
FRACTIONS = {"z_loss", "eps", "scale", "sign", "lr"}
WIDE = {
    "peaks", "totals", "log_sums", "means", "scales", "partial", "factor", "angles", "peak", "total", "guesses",
    "targets", "factors", "parts", "norms", "master", "exp_avg", "exp_avg_sq", "step", "scalars",
}  # fmt: skip


def argument(name: str, constants: dict[str, Any]) -> Any:
    """What the kernel is given under this name."""
    if name in constants:
        return constants[name]
    if name in NUMBERS:
        return int
    if name in FRACTIONS:
        # A weight per token in one kernel, a number in the others.
        return float
    types = {
        **dict.fromkeys(WIDE, "fp32"),
        "labels": "i64",
        "seeds": "i64",
        "mask": "u8",
        "sorted_ids": "i64",
        "order": "i64",
    }
    return types.get(name, "bf16")


def launches() -> Iterator[Launch]:
    block, warps = triton_rows._block(250_880)
    constants = {"PART": triton_rows.PART_COLUMNS, "BLOCK": block}
    yield Launch("row exponentials", triton_rows.cross_entropy_exponentials, {**constants, "guesses": "fp32"}, warps)
    yield Launch("row statistics", triton_rows.cross_entropy_statistics, constants, warps)
    joined = {"ROWS": triton_rows.ROWS_TO_JOIN, "PARTS": next_power_of_two(ceil_div(250_880, triton_rows.PART_COLUMNS))}
    yield Launch("row statistics joined", triton_rows.cross_entropy_join, joined, 1, streams=False)
    joined |= {"weights": "fp32"}
    yield Launch("row factors", triton_rows.cross_entropy_factors, joined, 1, streams=False)
    constants = {"BLOCK": triton_rows.GUESS_COLUMNS}
    yield Launch("row guess", triton_rows.cross_entropy_guess, constants, triton_rows.GUESS_WARPS)
    for width in WIDTHS:
        block_to_scale = min(triton_rows.MOST_COLUMNS_TO_SCALE, next_power_of_two(width))
        for scales in (False, True):
            constants = {"SCALES": scales, "BLOCK": block_to_scale}
            warps_to_scale = max(1, block_to_scale // 512)
            yield Launch(
                f"rows scaled {width}, {scales}", triton_rows.cross_entropy_scale_rows, constants, warps_to_scale
            )
    constants = {"BLOCK": block, "weights": "fp32"}
    yield Launch("row gradient", triton_rows.cross_entropy_gradient, constants, warps)
    yield Launch("scale", triton_rows.cross_entropy_scale, {"BLOCK": triton_rows.SCALE_BLOCK}, 8)
    for width in WIDTHS:
        rows, block, warps = norm.tile(width)
        for adds in (False, True):
            constants = {"ADDS": adds, "ROWS": rows, "BLOCK": block}
            yield Launch(f"norm {width}, adds {adds}", norm.layer_norm_forward, constants, warps)
            constants |= {"BRANCH": adds, "SUMS": block <= norm.WIDEST_WITH_SUMS, "STAGES": norm.backward_stages(width)}
            yield Launch(f"norm backward {width}, adds {adds}", norm.layer_norm_backward, constants, warps)
    constants = {"BRANCH": True, "ROWS": norm.SUM_ROWS, "COLUMNS": norm.SUM_COLUMNS}
    yield Launch("norm sums", norm.layer_norm_sums, constants, norm.SUM_WARPS)
    tile = {"ROWS": activation.ROWS, "COLUMNS": activation.COLUMNS}
    for name in activation.ACTIVATIONS:
        constants = {"ACTIVATION": name, "ROWS": activation.FORWARD_ROWS, "COLUMNS": activation.FORWARD_COLUMNS}
        yield Launch(name, activation.activation_forward, constants, activation.NUM_WARPS)
        constants = {"ACTIVATION": name, **tile}
        if name != "gelu_tanh":
            yield Launch(f"{name} backward", activation.gate_backward, constants, 2 * activation.NUM_WARPS)
    constants = {**tile, "STAGES": activation.BACKWARD_STAGES}
    yield Launch("gelu_tanh backward", activation.gelu_backward, constants, activation.NUM_WARPS)
    constants = {"DROPS": True, "ROWS": dropout.ROWS, "COLUMNS": dropout.COLUMNS}
    yield Launch("dropout", dropout.dropout_add_forward, constants, dropout.NUM_WARPS)
    yield Launch("dropout backward", dropout.dropout_add_backward, constants, dropout.NUM_WARPS)
    constants = {"SCALES": False, "BLOCK": triton_sum.BLOCK, "total": "fp32", "factor": "fp32"}
    yield Launch("gradient sum", triton_sum.gradient_sum_add, constants, triton_sum.NUM_WARPS)
    constants = {"ROWS": triton_sum.ROWS_AT_ONCE, "BLOCK": triton_sum.MOST_COLUMNS, "total": "fp32"}
    yield Launch("gradient sum of rows", triton_sum.gradient_sum_add_rows, constants, triton_sum.MOST_COLUMNS // 256)
    constants = {"LOG2_BETA1": math.log2(0.9), "LOG2_BETA2": math.log2(0.95)}
    yield Launch("adamw step", triton_adamw.adamw_step, constants, 1, streams=False)
    for divides in (False, True):
        constants = {"SHARE1": 0.1, "SHARE2": 0.05, "EPS": 1e-8, "DECAY": 0.1, "BLOCK": triton_adamw.BLOCK}
        constants |= {"DIVIDES": divides, "gradient": "fp32"}
        yield Launch(f"adamw, clips {divides}", triton_adamw.adamw_update, constants, triton_adamw.NUM_WARPS)
    constants = {"PARTS": triton_sums.PARTS_AT_ONCE, "COLUMNS": triton_sums.COLUMNS}
    yield Launch("sum of parts", triton_sums.sum_of_parts, constants, triton_sums.NUM_WARPS, streams=False)
    for head_size in (64, 80, 96, 112, 128):
        constants = {
            "HEAD_SIZE": head_size, "D": triton_launch.padded_head_size(head_size), "BLOCK": triton_launch.NORM_BLOCK
        }  # fmt: skip
        yield Launch(f"key norms {head_size}", triton_forward.attention_key_norms, constants, 8)
    rows, block, warps = triton_softmax._tile(2048)
    constants = {"MASKED": True, "ROWS": rows, "BLOCK": block, "mask_key": 1}
    yield Launch("softmax", triton_softmax.softmax_forward, constants, warps)
    yield Launch("softmax backward", triton_softmax.softmax_backward, {"ROWS": rows, "BLOCK": block}, warps)
    constants = {"ROWS": triton_rotary.ROWS, "BLOCK": 64, "REST": 0}
    yield Launch("rotary", triton_rotary.rotary_turn, constants, triton_rotary.NUM_WARPS)


@pytest.mark.slow
@pytest.mark.parametrize("launch", list(launches()), ids=lambda launch: launch.name)
def test_kernel_compiles_for_hopper_without_spilling(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--full") and launch.name not in ("row exponentials", "gelu_tanh backward"):
        pytest.skip("--full compiles all kernels")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    arguments = {name: argument(name, launch.constants) for name in launch.kernel.arg_names}
    resources = compile_for_hopper(launch.kernel, arguments, tmp_path, num_warps=launch.num_warps)
    assert resources.spilled_bytes == 0
    # A multiprocessor has 65,536 registers, and 227 KiB of shared memory for one program.
    assert resources.registers * launch.num_warps * 32 <= 65_536
    assert resources.shared_bytes <= 227 * 1024
    # 16 bytes at a time from memory, or into shared memory ahead of their use.
    assert not launch.streams or ".v4.b32" in resources.ptx or "cp.async.cg" in resources.ptx


def test_no_kernel_is_left_out() -> None:
    launched, compilable = set(), set()
    for path in (Path(__file__).parents[3] / "megalm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):  # kernel[grid](...)
                launched.add(ast.unparse(node.func.value).rpartition(".")[2])
            if isinstance(node, ast.FunctionDef) and "jit" in map(ast.unparse, node.decorator_list):
                compilable.add(node.name)
    compiled = {launch.kernel.__name__ for launch in launches()}
    compiled |= {kernel.__name__ for kernel in test_attention_compiled.KERNELS.values()}
    assert launched & compilable == compiled
