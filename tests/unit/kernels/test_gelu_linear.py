"""The GELU inside the MLP's products: numbers, what cuBLASLt is called with, and the MLP that is made of them."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.errors import KernelError
from megalm.kernels import self_check
from megalm.kernels.backend import choose
from megalm.kernels.bias_gelu.eager import bias_gelu
from megalm.kernels.gelu_linear import operations
from megalm.kernels.gelu_linear.cublaslt import CublasLtGeluLinear
from megalm.kernels.gelu_linear.cublaslt_library import DGELU, DGELU_BGRAD, GELU_AUX_BIAS, Product, Shape
from megalm.kernels.gelu_linear.oracle import TorchGeluLinear
from megalm.kernels.gelu_linear.protocol import GeluLinearKernel
from megalm.kernels.gradient_sum.oracle import TorchGradientSum
from megalm.parallel.gradient_sum import GradientSum, give_gradient_sum
from megalm.parallel.linear import ColumnParallelLinear, RowParallelLinear, gelu_mlp
from megalm.topology.group import SOLO

CPU = torch.device("cpu")
ON_GPU = torch.cuda.is_available()
SOURCE = Path(__file__).parents[2] / "support" / "host_cublaslt.c"
COMPILER = shutil.which("cc") or shutil.which("gcc")


class OnTheHost:
    """A `Host` whose library computes on the host's memory."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def handle(self) -> int:
        return 1

    def stream(self) -> int:
        return 42

    @property
    def calls(self) -> int:
        return ctypes.c_int.in_dll(self.library, "calls_of_matmul").value


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> OnTheHost:
    if COMPILER is None:
        pytest.skip("the library that stands in for cuBLASLt needs a C compiler")
    built = tmp_path_factory.mktemp("cublaslt") / "libhost.so"
    headers = [f"-I{folder}" for folder in _cuda_headers()]
    for flags in (headers, []):  # NVIDIA's headers may be there in part.
        command = [COMPILER, "-std=c11", "-O2", "-shared", "-fPIC", *flags, str(SOURCE), "-o", str(built), "-lm"]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return OnTheHost(ctypes.CDLL(str(built)))
    pytest.skip("the C compiler does not build the library that stands in for cuBLASLt")


def _cuda_headers() -> list[Path]:
    return sorted(Path(torch.__file__).parents[1].glob("nvidia/*/include"))


def operands(
    *, tokens: int = 24, inputs: int = 16, features: int = 40, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {
        "x": (tokens, inputs), "up": (features, inputs), "bias": (features,), "grad": (tokens, inputs),
        "down": (inputs, features), "inner": (tokens, features),
    }  # fmt: skip
    drawn = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    for name in ("up", "down"):
        drawn[name] *= 0.5
    return drawn


def results(kernel: GeluLinearKernel, values: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return (
        *kernel.forward(values["x"], values["up"], values["bias"]),
        *kernel.backward(values["grad"], values["down"], values["inner"]),
    )


def exact(values: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return results(TorchGeluLinear(), {name: value.double() for name, value in values.items()})


def assert_rounded_once(got: Tensor, wanted: Tensor, magnitude: float) -> None:
    """Half an ulp of the result, and what sums in fp32 of terms of this magnitude err by."""
    ulp = torch.finfo(got.dtype).eps * wanted.abs()
    assert ((got.double() - wanted).abs() <= 0.5 * ulp + 2.0**-18 * magnitude).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(24, 16, 40), (1, 8, 8), (130, 40, 16)], ids=str)
@pytest.mark.parametrize("sums_bias", [True, False])
def test_cublaslt_gets_the_products_and_their_epilogues(
    host: OnTheHost, sums_bias: bool, sizes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    tokens, inputs, features = sizes
    values = operands(tokens=tokens, inputs=inputs, features=features, dtype=dtype)
    before = host.calls
    got = results(CublasLtGeluLinear(lambda: host, sums_bias=sums_bias), values)
    assert host.calls == before + 2, "both products were cuBLASLt's"
    assert ctypes.c_void_p.in_dll(host.library, "last_stream").value == host.stream()
    for one, wanted in zip(got[:3], exact(values), strict=False):
        assert one.shape == wanted.shape
        assert one.dtype == dtype
        assert_rounded_once(one, wanted, magnitude=float(wanted.abs().max()))
    bias, wanted = got[3], exact(values)[3]
    # Added up apart, rows were rounded before.
    rounded = 0.0 if sums_bias else torch.finfo(dtype).eps * exact(values)[2].abs().sum(0)
    assert ((bias.double() - wanted).abs() <= torch.finfo(dtype).eps * wanted.abs() + rounded + 1e-4).all()


def test_leading_dimensions_strides_and_alignment_are_free(host: OnTheHost) -> None:
    kernel, values = CublasLtGeluLinear(lambda: host), operands()
    flat = results(kernel, values)
    lead = {name: value.view(4, 6, -1) if value.size(0) == 24 else value for name, value in values.items()}
    strided = {name: value.t().contiguous().t() if value.dim() == 2 else value for name, value in values.items()}
    shifted = {
        name: torch.cat((value.new_zeros(1), value.flatten()))[1:].view(value.shape) for name, value in values.items()
    }
    assert all(value.data_ptr() % 16 for value in shifted.values())
    for other in (lead, strided, shifted):
        for one, again in zip(flat, results(kernel, other), strict=True):
            assert torch.equal(again.reshape(one.shape), one)
    assert results(kernel, lead)[0].shape == (4, 6, 40)


@pytest.mark.parametrize(
    "changed",
    [{"features": 12}, {"inputs": 12}, {"tokens": 0}, {"dtype": torch.float32}],
    ids=lambda changed: str(changed),
)
def test_what_cublaslt_does_not_take_goes_to_torch(host: OnTheHost, changed: dict[str, Any]) -> None:
    values, before = operands(**changed), host.calls
    for one, wanted in zip(
        results(CublasLtGeluLinear(lambda: host), values), results(TorchGeluLinear(), values), strict=True
    ):
        assert torch.equal(one, wanted)
    assert host.calls == before


def test_later_suggestions_can_be_had_as_far_as_there_are_any(host: OnTheHost) -> None:
    values = operands()
    for one, other in zip(
        results(CublasLtGeluLinear(lambda: host), values),
        results(CublasLtGeluLinear(lambda: host, choice=2), values),
        strict=True,
    ):
        assert torch.equal(one, other)
    with pytest.raises(KernelError, match="no algorithm for"):
        results(CublasLtGeluLinear(lambda: host, choice=3), values)


def test_a_call_that_fails_says_which_and_for_what(host: OnTheHost) -> None:
    shape = Shape(8, 4, 8, transposes_a=False, epilogue=DGELU_BGRAD, dtype=torch.bfloat16)
    product = Product(host, shape)
    tensors = [torch.zeros(8, 8, dtype=torch.bfloat16) for _ in range(5)]
    product(*tensors[:5])
    product._algorithm.algorithm[0] = 0
    with pytest.raises(KernelError, match=r"cublasLtMatmul of cuBLASLt failed with status 7 for Shape\(m=8, n=4"):
        product(*tensors[:5])


@pytest.mark.parametrize("epilogue", [GELU_AUX_BIAS, DGELU, DGELU_BGRAD])
def test_nvidias_own_library_takes_every_attribute(epilogue: int) -> None:
    """It describes products without a GPU; the choice of an algorithm, which takes a handle, is left out."""
    found = sorted(Path(torch.__file__).parents[1].glob("nvidia/*/lib/libcublasLt.so.*"))
    if not found:
        pytest.skip("needs NVIDIA's cuBLASLt, which a torch for CPUs does not bring")
    library = ctypes.CDLL(str(found[-1]))

    class WithoutAlgorithms:
        def __getattr__(self, function: str) -> Any:
            return getattr(library, function)

        def cublasLtMatmulAlgoGetHeuristic(self, *arguments: Any) -> int:
            return 1

    class WithoutGpu:
        library = WithoutAlgorithms()

        def handle(self) -> int:
            return 0

        def stream(self) -> int:
            return 0

    shape = Shape(8192, 16_384, 2048, transposes_a=epilogue == GELU_AUX_BIAS, epilogue=epilogue, dtype=torch.bfloat16)
    with pytest.raises(KernelError, match=r"no algorithm for Shape\(.*\(status 1, 0 suggestions\)"):
        Product(WithoutGpu(), shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_check_of_a_run_sees_a_wrong_epilogue(host: OnTheHost, dtype: torch.dtype) -> None:
    demand = self_check.Demand(dtype, hidden_size=16)
    kernel = CublasLtGeluLinear(lambda: host)
    assert self_check.failure("gelu_linear", kernel, CPU, demand=demand) is None

    class ForgetsTheSlope(CublasLtGeluLinear):
        def backward(self, grad: Tensor, weight: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
            gradient = grad @ weight
            return gradient, gradient.sum(0)

    wrong = self_check.failure("gelu_linear", ForgetsTheSlope(lambda: host), CPU, demand=demand)
    assert wrong is not None
    assert wrong.startswith("gradient differs from the reference by")


def test_cublaslt_is_refused_on_a_cpu_and_auto_keeps_the_products_apart() -> None:
    assert choose("gelu_linear", "auto", CPU).name == "separate"
    assert choose("gelu_linear", "auto", CPU).implementation is None
    with pytest.raises(KernelError, match="cannot run on cpu: cuBLASLt is for NVIDIA GPUs"):
        choose("gelu_linear", "cublaslt", CPU)


def layers(dtype: torch.dtype, *, h: int = 16, f: int = 40) -> tuple[ColumnParallelLinear, RowParallelLinear]:
    generator = torch.Generator().manual_seed(11)
    up = ColumnParallelLinear(h, f, tp=SOLO, skip_bias_add=True)
    down = RowParallelLinear(f, h, tp=SOLO, skip_bias_add=True)
    for parameter in (*up.parameters(), *down.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype) * 0.5
    return up, down


def gradients_of(layers: tuple[ColumnParallelLinear, RowParallelLinear], y: Tensor, x: Tensor) -> list[Tensor | None]:
    up, down = layers
    return list(
        torch.autograd.grad(y, (x, up.weight, up.added_bias(), down.weight), torch.ones_like(y), allow_unused=True)
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "in a graph"])
def test_the_mlp_has_the_gradients_of_its_parts_written_out(compiled: bool) -> None:
    both = up, down = layers(torch.float64)
    x = torch.randn(3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def fused(x: Tensor) -> Tensor:
        return gelu_mlp(x, up.weight, up.added_bias(), down.weight, kernel="torch")

    run = torch.compile(fused, backend="aot_eager", fullgraph=True) if compiled else fused
    y, wanted = run(x), down(bias_gelu(up(x), up.added_bias()))
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    for got, one in zip(gradients_of(both, y, x), gradients_of(both, wanted, x), strict=True):
        assert got is not None
        assert one is not None
        torch.testing.assert_close(got, one, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "in a graph"])
def test_weights_gradients_go_to_their_sums(compiled: bool) -> None:
    both = up, down = layers(torch.float32)
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    _, up_gradient, bias_gradient, down_gradient = gradients_of(
        both, gelu_mlp(x, up.weight, up.added_bias(), down.weight, kernel="torch"), x
    )
    sums = [torch.full_like(layer.weight, 2.0) for layer in both]
    for layer, total in zip(both, sums, strict=True):
        give_gradient_sum(layer.weight, GradientSum(total, TorchGradientSum()))

    def fused(x: Tensor) -> Tensor:
        return gelu_mlp(x, up.weight, up.added_bias(), down.weight, kernel="torch")

    run = torch.compile(fused, backend="aot_eager", fullgraph=True) if compiled else fused
    for _ in range(2):  # Two micro-batches.
        got = gradients_of(both, run(x), x)
        assert got[1] is None
        assert got[3] is None
        assert bias_gradient is not None
        torch.testing.assert_close(got[2], bias_gradient)
    assert up_gradient is not None
    assert down_gradient is not None
    torch.testing.assert_close(sums[0], 2.0 + 2.0 * up_gradient)
    torch.testing.assert_close(sums[1], 2.0 + 2.0 * down_gradient)


def test_what_needs_no_gradient_gets_none() -> None:
    up, down = layers(torch.float32)
    x = torch.randn(6, 16)
    up.weight.requires_grad_(False)
    gelu_mlp(x, up.weight, up.added_bias(), down.weight, kernel="torch").sum().backward()
    assert up.weight.grad is None
    assert up.added_bias().grad is not None
    assert down.weight.grad is not None
    with torch.no_grad():
        assert not gelu_mlp(x, up.weight, up.added_bias(), down.weight, kernel="torch").requires_grad


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device: cuBLASLt itself")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(4096, 1024, 4096), (333, 264, 1048), (1, 64, 256)], ids=str)
def test_cublaslt_on_a_gpu_errs_no_more_than_the_reference(dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    tokens, inputs, features = sizes
    values = operands(tokens=tokens, inputs=inputs, features=features, dtype=dtype)
    values["up"] /= inputs**0.5
    values["down"] /= inputs**0.5
    values = {name: value.cuda() for name, value in values.items()}
    kernel = operations.BY_NAME["cublaslt"]
    names = ("result", "inner result", "gradient", "bias's gradient")
    first, second = results(kernel, values), results(kernel, values)
    for name, got, again, reference, wanted in zip(
        names, first, second, results(TorchGeluLinear(), values), exact(values), strict=True
    ):
        assert torch.equal(got, again), f"{name} differs from run to run"
        error, bound = ((one.double() - wanted).norm() / wanted.norm() for one in (got, reference))
        print(f"{name}: {error.item():.3e}, of torch's products and GELU {bound.item():.3e}")
        assert error <= 1.1 * bound + 1e-6, name
