"""Every kernel of linear layers gives the three products, within the rounding of what it multiplies with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalm.errors import KernelError
from megalm.kernels import cpu
from megalm.kernels.backend import choose
from megalm.kernels.linear import fp8, onednn
from megalm.kernels.linear.protocol import LinearKernel
from megalm.kernels.linear.torch_native import TorchLinear, add_weight_gradient
from megalm.kernels.linear.widened import Fp32Linear
from megalm.parallel.linear import linear

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(onednn.obstacle(CPU) is not None, reason=f"{onednn.obstacle(CPU)}")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
WIDE = [TorchLinear(), Fp32Linear(), pytest.param(onednn.OneDnnLinear(), marks=needs_onednn)]
# One rounding of each operand: half of the last bit of the mantissa, 3 bits in e4m3 and 2 in e5m2.
E4M3_ROUNDING, E5M2_ROUNDING = 2.0**-4, 2.0**-3


def operands(*, tokens: int = 48, inputs: int = 32, outputs: int = 80) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and the gradient of the output, in fp32."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((tokens, inputs), (outputs, inputs), (outputs,), (tokens, outputs))
    x, weight, bias, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, weight, bias, grad


def products(kernel: LinearKernel, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, gradient of the input, gradient of the weight."""
    return [kernel.output(x, weight, bias), kernel.input_gradient(grad, weight), kernel.weight_gradient(grad, x)]


@pytest.mark.parametrize("kernel", WIDE, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("sizes", [(48, 32, 80), (48, 80, 32), (1, 7, 3), (130, 1, 33)], ids=str)
def test_fp32_products_err_by_less_than_the_rounding_of_their_sums(
    kernel: LinearKernel, sizes: tuple[int, int, int]
) -> None:
    tokens, inputs, outputs = sizes
    values = operands(tokens=tokens, inputs=inputs, outputs=outputs)
    exact = products(TorchLinear(), *(value.double() for value in values))
    # A sum of n products in fp32 errs by at most n 2^-24 of the sum of their magnitudes.
    bounds = products(TorchLinear(), *(value.double().abs() for value in values))
    for got, wanted, magnitude in zip(products(kernel, *values), exact, bounds, strict=True):
        assert got.dtype == torch.float32
        assert ((got - wanted).abs() <= (max(sizes) + 1) * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize("kernel", WIDE, ids=lambda kernel: kernel.name)
def test_leading_dimensions_and_strides_are_free(kernel: LinearKernel) -> None:
    x, weight, bias, grad = operands()
    flat = products(kernel, x, weight, bias, grad)
    lead = products(kernel, x.view(6, 8, -1), weight, bias, grad.view(6, 8, -1))
    strided = products(kernel, x.t().contiguous().t(), weight.t().contiguous().t(), bias, grad.t().contiguous().t())
    for one, other, third in zip(flat, lead, strided, strict=True):
        torch.testing.assert_close(other.flatten(0, -2) if other.dim() == 3 else other, one, rtol=0, atol=2e-5)
        torch.testing.assert_close(third, one, rtol=0, atol=2e-5)
    assert lead[0].shape == (6, 8, 80)
    assert lead[1].shape == (6, 8, 32)


@pytest.mark.parametrize("kernel", [*WIDE, fp8.Fp8Linear()], ids=lambda kernel: kernel.name)
def test_no_tokens_give_no_output_and_a_zero_gradient(kernel: LinearKernel) -> None:
    x, weight, bias, grad = operands()
    output, grad_x, grad_weight = products(kernel, x[:0], weight, bias, grad[:0])
    assert output.shape == (0, 80)
    assert grad_x.shape == (0, 32)
    assert torch.equal(grad_weight, torch.zeros(80, 32))


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_onednn_leaves_other_dtypes_to_torch(dtype: torch.dtype) -> None:
    values = [value.to(dtype) for value in operands()]
    for got, wanted in zip(products(onednn.OneDnnLinear(), *values), products(TorchLinear(), *values), strict=True):
        assert torch.equal(got, wanted)


@needs_onednn
def test_onednn_is_deterministic() -> None:
    values = operands(tokens=256, inputs=128, outputs=384)
    first, second = (products(onednn.OneDnnLinear(), *values) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "kernel, gradient_rounding",
    [(fp8.Fp8Linear(), E5M2_ROUNDING), (fp8.Fp8Linear(gradient_format=fp8.E4M3), E4M3_ROUNDING)],
    ids=["hybrid", "e4m3"],
)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_fp8_products_err_by_the_rounding_of_their_operands(
    kernel: LinearKernel, gradient_rounding: float, scale: float
) -> None:
    x, weight, bias, grad = operands()
    values = [x.double() * scale, weight.double(), bias.double() * 0.0, grad.double() * scale]
    exact = products(TorchLinear(), *values)
    magnitudes = products(TorchLinear(), *(value.abs() for value in values))
    got = products(kernel, *(value.float() for value in values))
    # Elements far below a tensor's largest lose further bits as subnormal numbers: 2^-9 of 448 steps in e4m3.
    relative = [2 * E4M3_ROUNDING, E4M3_ROUNDING + gradient_rounding, E4M3_ROUNDING + gradient_rounding]
    for one, wanted, magnitude, bound in zip(got, exact, magnitudes, relative, strict=True):
        error = (one.double() - wanted).abs()
        assert (error <= bound * magnitude + 1e-3 * magnitude.max()).all()
        assert error.max() > 1e-4 * wanted.abs().max(), "this was not rounded to 8 bits"


def test_fp8_keeps_sizes_that_it_cannot_take_in_full_precision() -> None:
    values = operands(tokens=47, inputs=32, outputs=80)
    got, wanted = products(fp8.Fp8Linear(), *values), products(TorchLinear(), *values)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[2], wanted[2])


@pytest.mark.parametrize("kernel", [*WIDE, fp8.Fp8Linear()], ids=lambda kernel: kernel.name)
def test_one_differentiable_operation_is_made_of_the_three_products(kernel: LinearKernel) -> None:
    x, weight, bias, grad = operands()
    leaves = [value.clone().requires_grad_() for value in (x, weight, bias)]
    y = linear(*leaves, kernel=kernel)  # type: ignore[misc]
    y.backward(grad)
    output, grad_x, grad_weight = products(kernel, x, weight, bias, grad)
    assert torch.equal(y, output)
    for leaf, wanted in zip(leaves, (grad_x, grad_weight, grad.sum(0)), strict=True):
        torch.testing.assert_close(leaf.grad, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_products_in_fp32_are_rounded_once(dtype: torch.dtype) -> None:
    values = [value.to(dtype) for value in operands(tokens=256, inputs=512, outputs=96)]
    exact = products(TorchLinear(), *(value.double() for value in values))
    magnitudes = products(TorchLinear(), *(value.double().abs() for value in values))
    for got, wanted, magnitude in zip(products(Fp32Linear(), *values), exact, magnitudes, strict=True):
        assert got.dtype == dtype
        # Half a unit in the last place of the result, and the rounding of a sum of up to 512 in fp32.
        half_an_ulp = torch.finfo(dtype).eps / 2 * wanted.abs()
        assert ((got - wanted).abs() <= half_an_ulp + 513 * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_auto_multiplies_16_bits_in_fp32_where_a_cpu_has_no_such_products(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_has_products", lambda dtype: False)
    assert choose("linear", "auto", CPU, dtype=dtype).name == "fp32"
    assert choose("linear", "auto", CPU, dtype=torch.float32).name in ("torch", "onednn")
    assert choose("linear", "auto", torch.device("cuda"), dtype=dtype).name == "torch"
    monkeypatch.setattr(cpu, "_has_products", lambda dtype: True)
    assert choose("linear", "auto", CPU, dtype=dtype).name in ("torch", "onednn")


@pytest.mark.parametrize("handed_on, avx512, amx, machine, fast", [
    (True, True, False, "x86_64", True),
    (True, False, True, "AMD64", True),
    (True, False, False, "x86_64", False),  # oneDNN emulates it
    (False, True, True, "x86_64", False),
    (True, False, False, "aarch64", True),
])  # fmt: skip
def test_bf16_products_are_fast_where_the_processor_has_them(
    handed_on: bool, avx512: bool, amx: bool, machine: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: handed_on)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
    assert cpu._has_products.__wrapped__(torch.bfloat16) is fast


def test_auto_never_takes_eight_bits_and_a_gpu_takes_no_cpu_kernel() -> None:
    assert choose("linear", "auto", CPU).name in ("torch", "onednn")
    assert choose("linear", "auto", torch.device("cuda")).name == "torch"
    with pytest.raises(KernelError, match=r"output\.linear = 'onednn' cannot run on cuda: oneDNN's products"):
        choose("linear", "onednn", torch.device("cuda"))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("sizes", [(48, 32, 80), (4096, 256, 512), (3, 8, 24)], ids=str)
def test_a_weight_s_gradient_is_added_to_an_fp32_sum(device: str, sizes: tuple[int, int, int]) -> None:
    tokens, inputs, outputs = sizes
    x, weight, _, grad = (value.to(device) for value in operands(tokens=tokens, inputs=inputs, outputs=outputs))
    x, grad, total = x.bfloat16(), grad.bfloat16(), weight.clone()
    add_weight_gradient(total, grad.view(1, tokens, outputs), x.view(1, tokens, inputs))
    exact = TorchLinear().weight_gradient(grad.double(), x.double())
    magnitude = TorchLinear().weight_gradient(grad.double().abs(), x.double().abs()) + weight.abs()
    # A CPU rounds the product to bf16 before it is added; cuBLAS adds in fp32.
    rounding = 2.0**-8 * exact.abs() if device == "cpu" else 0.0
    assert total.dtype == torch.float32
    assert ((total - weight - exact).abs() <= rounding + (tokens + 1) * 2.0**-24 * magnitude).all()
