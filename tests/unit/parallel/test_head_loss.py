"""Head and cross-entropy in one, on one rank, against float64 and against the logits in full."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megalm.kernels.cross_entropy.torch_rows import TorchRows
from megalm.kernels.linear.onednn import OneDnnLinear
from megalm.kernels.linear.protocol import LinearKernel
from megalm.kernels.linear.torch_native import TorchLinear
from megalm.parallel import head_loss
from megalm.parallel.cross_entropy import vocab_parallel_cross_entropy
from megalm.parallel.head_loss import chunk_size, head_cross_entropy
from megalm.topology.group import SOLO

H = 24
# Of the products of 24 and of a few hundred terms below 1 in size, in fp32.
FP32_ERROR = 300 * 2.0**-24


class CountingRows(TorchRows):
    """Remembers how many rows of logits there were at once."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def log_sum_and_gradient_(
        self, logits: Tensor, labels: Tensor, weights: Tensor, *, z_loss: float
    ) -> tuple[Tensor, Tensor | None]:
        self.rows.append(logits.size(0))
        return super().log_sum_and_gradient_(logits, labels, weights, z_loss=z_loss)

    def statistics(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        self.rows.append(logits.size(0))
        return super().statistics(logits)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 tokens at most."""
    monkeypatch.setattr(head_loss, "LEAST_TOKENS", 64)
    monkeypatch.setattr(head_loss, "CPU_CHUNK_BYTES", 1)


def example(num_tokens: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, 1, H, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, H, generator=generator) / 2).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (num_tokens, 1), generator=generator)
    mask = (torch.rand(num_tokens, 1, generator=generator) < 0.8).float()
    return x, weight, labels, mask / mask.sum().clamp(min=1)


def fused(x: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, **options: object) -> Tensor:
    arguments: dict[str, object] = {"tp": SOLO, "rows": TorchRows(), "kernel": TorchLinear(), **options}
    return head_cross_entropy(x, weight, labels, weights, **arguments)  # type: ignore[arg-type]


def exact(x: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, z_loss: float = 0.0) -> tuple[Tensor, ...]:
    """Loss and gradients in float64, with the logits in full."""
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    logits = functional.linear(*wide)
    log_sum = torch.logsumexp(logits, dim=-1)
    target = logits.gather(-1, labels[..., None])[..., 0]
    loss = ((log_sum - target + z_loss * log_sum.square()) * weights.double()).sum()
    loss.backward()
    return loss.detach(), wide[0].grad, wide[1].grad


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("num_tokens, vocab", [(1, 1), (5, 7), (64, 33), (65, 130), (300, 97), (130, 2048)])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("kernel", [TorchLinear(), OneDnnLinear()], ids=lambda kernel: kernel.name)
def test_loss_and_gradients_match_float64(num_tokens: int, vocab: int, z_loss: float, kernel: LinearKernel) -> None:
    values = example(num_tokens, vocab, torch.float32)
    rows = CountingRows()
    loss = fused(*values, rows=rows, kernel=kernel, z_loss=z_loss)
    # The upstream gradient of a step with four micro-batches.
    (loss / 4).backward()
    expected = exact(*values, z_loss=z_loss)
    assert sum(rows.rows) == num_tokens
    assert max(rows.rows) <= 64
    torch.testing.assert_close(loss.detach().double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(values[0].grad.double(), expected[1] / 4, rtol=0, atol=FP32_ERROR)
    torch.testing.assert_close(values[1].grad.double(), expected[2] / 4, rtol=0, atol=FP32_ERROR)


@pytest.mark.parametrize("columns, padding", [(1024, 16), (4096, 16), (1000, 0), (1032, 0)])
def test_rows_of_logits_do_not_start_in_the_same_line_of_the_cache(columns: int, padding: int) -> None:
    buffer = head_loss._logits_buffer(torch.empty(0), 3, columns)
    assert buffer.shape == (3, columns)
    assert buffer.stride() == (columns + padding, 1)


@pytest.mark.usefixtures("small_chunks")
def test_float64_stays_float64() -> None:
    values = example(70, 9, torch.float64)
    loss = fused(*values, z_loss=0.1)
    loss.backward()
    for ours, expected in zip((loss.detach(), values[0].grad, values[1].grad), exact(*values, z_loss=0.1), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("budget", ["the sum in fp32", "the dtype of the weight"])
def test_bf16_gradients_err_by_the_roundings_that_are_documented(budget: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, labels, weights = example(256, 100, torch.bfloat16)
    if budget == "the dtype of the weight":
        # As on a GPU whose budget the sum does not fit into.
        monkeypatch.setattr(head_loss, "_sums_in_fp32", lambda *_: False)
    loss = fused(x, weight, labels, weights, chunk_bytes=1)
    loss.backward()
    # The reference takes the logits as they were rounded to bf16, like the kernels.
    logits = functional.linear(x, weight).detach().double()
    softmax = torch.softmax(logits, dim=-1)
    slope = (softmax - functional.one_hot(labels, 100)) * weights.double()[..., None]  # [256, 1, 100]
    flat, hidden = slope.flatten(0, 1), x.detach().double().flatten(0, 1)
    expected_x, expected_weight = flat @ weight.detach().double(), flat.t() @ hidden
    eps = 2.0**-8
    # Each gradient of a logit is rounded once; a bf16 logit that rounds the other way is half a unit of 4 off.
    slope_error = flat.abs() * (eps / 2 + 2.0**-6)
    x_bound = slope_error @ weight.detach().double().abs() + eps / 2 * expected_x.abs() + 1e-6
    assert ((x.grad.double().flatten(0, 1) - expected_x).abs() <= x_bound).all()
    rounded = expected_weight.abs() * eps / 2
    if budget == "the dtype of the weight":
        # Every partial sum of the four chunks is rounded.
        partial = torch.stack([flat[: 64 * k].t() @ hidden[: 64 * k] for k in range(1, 5)])
        rounded = partial.abs().sum(0) * eps / 2
    else:
        parts = torch.stack([flat[64 * k : 64 * k + 64].t() @ hidden[64 * k : 64 * k + 64] for k in range(4)])
        rounded = rounded + parts.abs().sum(0) * eps / 2
    assert ((weight.grad.double() - expected_weight).abs() <= slope_error.t() @ hidden.abs() + rounded + 1e-6).all()
    assert (x.grad.dtype, weight.grad.dtype, loss.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@pytest.mark.usefixtures("small_chunks")
def test_fp16_takes_the_loss_scale_into_the_gradients_of_logits() -> None:
    x, weight, labels, weights = example(128, 50, torch.float16)
    scale = 2.0**16
    loss = fused(x, weight, labels, weights * 1e-5)
    (loss * scale).backward(retain_graph=True)
    _, expected_x, expected_weight = exact(x, weight, labels, weights * 1e-5)
    for grad, expected in ((x.grad, expected_x), (weight.grad, expected_weight)):
        assert (grad.double() / scale - expected).norm() <= 2e-3 * expected.norm()
    # Below half of fp16's smallest number: without the scale they would be zero.
    assert (expected_x.abs() < 3e-8).float().mean() > 0.3


def test_evaluation_computes_no_gradient_and_the_same_loss() -> None:
    values = example(40, 30, torch.float32)
    rows = CountingRows()
    with torch.no_grad():
        loss = fused(*values, rows=rows)
    assert not loss.requires_grad
    torch.testing.assert_close(loss.double(), exact(*values)[0], rtol=1e-6, atol=0)
    frozen = [t.detach() for t in values]
    assert not fused(*frozen).requires_grad


def test_no_token_and_no_counted_token_give_zero_loss_and_gradients() -> None:
    for num_tokens, share in ((0, 1.0), (3, 0.0)):
        x, weight, labels, weights = example(num_tokens, 10, torch.float32)
        loss = fused(x, weight, labels, weights * share)
        loss.backward()
        assert loss.item() == 0.0
        assert x.grad.shape == x.shape
        assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_gradients_serve_one_backward_pass() -> None:
    loss = fused(*example(5, 7, torch.float32))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="computes its gradients once"):
        loss.backward()


@pytest.mark.parametrize("label", [-1, 10])
def test_label_outside_the_vocabulary_is_an_error(label: int) -> None:
    x, weight, labels, weights = example(5, 10, torch.float32)
    labels[2] = label
    with pytest.raises(RuntimeError):
        fused(x, weight, labels, weights)


def test_padding_rows_of_the_vocabulary_take_their_share_of_the_softmax() -> None:
    x, weight, labels, weights = example(20, 48, torch.float32)
    labels = labels % 40  # eight rows that no label names
    loss = fused(x, weight, labels, weights)
    loss.backward()
    full = (vocab_parallel_cross_entropy(functional.linear(x, weight), labels, tp=SOLO) * weights).sum()
    # Two fp32 evaluations of the same formula.
    torch.testing.assert_close(loss, full, rtol=1e-6, atol=0)
    assert (weight.grad[40:].abs().sum(1) > 0).all()


def test_strided_hidden_states_give_the_same_loss_and_gradients() -> None:
    x, weight, labels, weights = example(12, 20, torch.float32)
    dense = x.detach().view(3, 4, H)
    strided = dense.transpose(0, 1).requires_grad_()
    order = torch.arange(12).view(3, 4).t()
    loss = fused(strided, weight, labels.view(12)[order], weights.view(12)[order])
    loss.backward()
    expected = exact(x, weight, labels, weights)
    torch.testing.assert_close(loss.detach().double(), expected[0], rtol=1e-6, atol=0)
    moved = strided.grad.transpose(0, 1).reshape(12, 1, H)
    torch.testing.assert_close(moved.double(), expected[1], rtol=0, atol=FP32_ERROR)


@pytest.mark.usefixtures("small_chunks")
def test_two_runs_give_the_same_bits() -> None:
    results = []
    for _ in range(2):
        values = example(200, 60, torch.float32)
        loss = fused(*values)
        loss.backward()
        results.append((loss.detach(), values[0].grad, values[1].grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_chunks_of_bloom_fit_the_budget_and_are_equal() -> None:
    bytes_per_token = 250_880 * 2
    assert chunk_size(8192, bytes_per_token=bytes_per_token, chunk_bytes=head_loss.GPU_CHUNK_BYTES) == 2048
    # 16 MiB are left for the statistics, 32 for cuBLAS's workspace.
    assert 2048 * bytes_per_token <= 2**30 - 44 * 2**20
    for num_tokens in (1, 64, 127, 1000, 4095, 4096, 10_000):
        size = chunk_size(num_tokens, bytes_per_token=bytes_per_token, chunk_bytes=2**29)
        assert 1 <= size <= max(2**29 // bytes_per_token, head_loss.LEAST_TOKENS)
        assert size == num_tokens or size % 64 == 0
