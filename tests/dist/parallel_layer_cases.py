"""What each rank runs for `test_parallel_layers`: sharded layers beside dense ones with the same weights.

Every case returns how far the sharded results are from the dense ones, as the largest difference over the largest dense
value; a case that must be exact returns a difference of bits.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.kernels.cross_entropy.torch_rows import TorchRows
from megalm.kernels.linear.torch_native import TorchLinear
from megalm.parallel import collectives, head_loss
from megalm.parallel.cross_entropy import vocab_parallel_cross_entropy
from megalm.parallel.embedding import VocabParallelEmbedding
from megalm.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megalm.parallel.replicas import Drift, copies_of, find_drift
from megalm.parallel.shard import mark_replicated, mark_sharded
from megalm.topology.group import SOLO, Group

S, B, H, OUT, VOCAB = 8, 3, 16, 24, 32


def run_layer_cases(tp: Group) -> dict[str, float]:
    """All cases on this rank."""
    results: dict[str, float] = {}
    for name, case in LAYER_CASES.items():
        torch.manual_seed(11)
        results[name] = case(tp)
    return results


def relative_difference(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Over all pairs of result and dense result, the largest; NaN if anything is."""
    return torch.stack([(ours - dense).abs().max() / dense.abs().max() for ours, dense in pairs]).max().item()


def _grad(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def _part(x: Tensor, tp: Group, dim: int) -> Tensor:
    return x.detach().chunk(tp.size, dim)[tp.rank]


def _leaf(*size: int) -> Tensor:
    return torch.randn(*size, requires_grad=True)


def _load(layer: nn.Module, **values: Tensor) -> None:
    with torch.no_grad():
        for name, value in values.items():
            getattr(layer, name).copy_(value)


def column(tp: Group, *, sequence_parallel: bool, gather_output: bool = False) -> float:
    dense = nn.Linear(H, OUT)
    x, upstream = _leaf(S, B, H), torch.randn(S, B, OUT)
    expected = dense(x)
    expected.backward(upstream)
    layer = ColumnParallelLinear(H, OUT, tp=tp, sequence_parallel=sequence_parallel, gather_output=gather_output)
    _load(layer, weight=_part(dense.weight, tp, 0), bias=_part(dense.bias, tp, 0))
    ours = (_part(x, tp, 0) if sequence_parallel else x.detach().clone()).requires_grad_()
    y = layer(ours)
    y.backward(upstream if gather_output else _part(upstream, tp, 2))
    grad = _part(_grad(x), tp, 0) if sequence_parallel else _grad(x)
    return relative_difference(
        [
            (y, expected if gather_output else _part(expected, tp, 2)),
            (_grad(ours), grad),
            (_grad(layer.weight), _part(_grad(dense.weight), tp, 0)),
            (_grad(layer.bias), _part(_grad(dense.bias), tp, 0)),
        ]
    )


def row(tp: Group, *, sequence_parallel: bool) -> float:
    dense = nn.Linear(H, OUT)
    x, upstream = _leaf(S, B, H), torch.randn(S, B, OUT)
    expected = dense(x)
    expected.backward(upstream)
    layer = RowParallelLinear(H, OUT, tp=tp, sequence_parallel=sequence_parallel)
    _load(layer, weight=_part(dense.weight, tp, 1), bias=dense.bias)
    ours = _part(x, tp, 2).clone().requires_grad_()
    y = layer(ours)
    y.backward(_part(upstream, tp, 0) if sequence_parallel else upstream)
    return relative_difference(
        [
            (y, _part(expected, tp, 0) if sequence_parallel else expected),
            (_grad(ours), _part(_grad(x), tp, 2)),
            (_grad(layer.weight), _part(_grad(dense.weight), tp, 1)),
            (_grad(layer.bias), _grad(dense.bias)),
        ]
    )


def embedding(tp: Group, *, sequence_parallel: bool) -> float:
    dense = nn.Embedding(VOCAB, H)
    ids, upstream = torch.randint(0, VOCAB, (S, B)), torch.randn(S, B, H)
    expected = dense(ids)
    expected.backward(upstream)
    layer = VocabParallelEmbedding(VOCAB, H, tp=tp, sequence_parallel=sequence_parallel)
    _load(layer, weight=_part(dense.weight, tp, 0))
    y = layer(ids)
    y.backward(_part(upstream, tp, 0) if sequence_parallel else upstream)
    return relative_difference(
        [
            (y, _part(expected, tp, 0) if sequence_parallel else expected),
            (_grad(layer.weight), _part(_grad(dense.weight), tp, 0)),
        ]
    )


def cross_entropy(tp: Group, *, dtype: torch.dtype, z_loss: float = 0.0) -> float:
    logits = (5 * torch.randn(S, B, VOCAB)).to(dtype).float().requires_grad_()
    labels, upstream = torch.randint(0, VOCAB, (S, B)), torch.randn(S, B)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(S, B)
    expected = expected + z_loss * logits.logsumexp(-1).square()
    expected.backward(upstream)
    ours = _part(logits, tp, 2).to(dtype).requires_grad_()
    loss = vocab_parallel_cross_entropy(ours, labels, tp=tp, z_loss=z_loss)
    loss.backward(upstream)
    grad = _part(_grad(logits), tp, 2).to(dtype)
    return relative_difference([(loss, expected), (_grad(ours).float(), grad.float())])


def fused_head(tp: Group, *, sequence_parallel: bool = False, z_loss: float = 0.0, num_chunks: int = 1) -> float:
    """Logits in full on one rank, against chunks of tokens and a part of the vocabulary on each."""
    x, weight = _leaf(S, B, H), _leaf(VOCAB, H)
    labels, counted = torch.randint(0, VOCAB, (S, B)), (torch.rand(S, B) < 0.7).float() / 17
    logits = F.linear(x, weight)
    log_sum = logits.logsumexp(-1)
    losses = log_sum - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) + z_loss * log_sum.square()
    expected = (losses * counted).sum()
    expected.backward()
    ours = (_part(x, tp, 0) if sequence_parallel else x.detach().clone()).requires_grad_()
    shard = _part(weight, tp, 0).clone().requires_grad_()
    entered = collectives.gather_sequence(ours, tp) if sequence_parallel else collectives.copy_to(ours, tp)
    loss = chunked_head(entered, shard, labels, counted, tp=tp, z_loss=z_loss, num_chunks=num_chunks)
    loss.backward()
    grad = _part(_grad(x), tp, 0) if sequence_parallel else _grad(x)
    return relative_difference([(loss, expected), (_grad(ours), grad), (_grad(shard), _part(_grad(weight), tp, 0))])


def chunked_head(
    x: Tensor, weight: Tensor, labels: Tensor, counted: Tensor, *, tp: Group, z_loss: float, num_chunks: int
) -> Tensor:
    """The fused head, with chunks of a size that is not a multiple of 64, as only a test can ask for."""
    size = -(-S * B // num_chunks)
    with mock.patch.object(head_loss, "_tokens_of_a_chunk", return_value=size):
        return head_loss.head_cross_entropy(
            x, weight, labels, counted, tp=tp, rows=TorchRows(), kernel=TorchLinear(), z_loss=z_loss
        )


def adjoint(tp: Group, *, enter: str, leave: str) -> float:
    """The backward of `enter` is the forward of `leave` and the other way round."""
    forward, backward = getattr(collectives, enter), getattr(collectives, leave)
    x = torch.randn(S, B, H) + tp.rank
    x.requires_grad_()
    y = forward(x, tp)
    upstream = torch.randn(y.shape) - tp.rank
    y.backward(upstream)
    pulled = upstream.clone().requires_grad_()
    back = backward(pulled, tp)
    back.backward(x.detach())
    return relative_difference([(_grad(x), back.detach()), (_grad(pulled), y.detach())])


def replica_bits(tp: Group) -> float:
    """1 unless the comparison finds nothing among equal replicas, then exactly the one whose last bit is flipped."""
    parameters = [
        ("same", mark_replicated(nn.Parameter(torch.randn(5, 3)))),
        ("flipped", mark_replicated(nn.Parameter(torch.randn(7).bfloat16()))),
        ("sharded", mark_sharded(nn.Parameter(torch.full((4,), float(tp.rank))), dim=0)),
    ]

    def differing() -> dict[str, list[Drift]]:
        tensors = {name: parameter.detach() for name, parameter in parameters}
        over = {"tp": copies_of(parameters, tp=tp), "dp": copies_of(parameters, tp=SOLO, dp=tp)}
        cpu = torch.device("cpu")
        return {axis: find_drift(tensors, copies, world=tp, device=cpu) for axis, copies in over.items()}

    sharded = Drift("dp", tp.ranks, (), ("sharded",))  # No two ranks have the same.
    expected = [{"tp": [], "dp": [sharded] if tp.size > 1 else []}]
    found = [differing()]
    if tp.is_last:
        parameters[1][1].data.view(torch.int16)[3] ^= 1
    odd = (tp.size - 1,) if tp.size > 2 else ()
    flipped = {axis: Drift(axis, tp.ranks, odd, ("flipped",)) for axis in ("tp", "dp")}
    if tp.size == 2:
        flipped["dp"] = Drift("dp", tp.ranks, (), ("flipped", "sharded"))
    with_sharded = [flipped["dp"]] if tp.size == 2 else [sharded, flipped["dp"]]
    expected.append({"tp": [flipped["tp"]], "dp": with_sharded} if tp.size > 1 else {"tp": [], "dp": []})
    found.append(differing())
    return float(found != expected)

LAYER_CASES: dict[str, Callable[[Group], float]] = {
    "column": lambda tp: column(tp, sequence_parallel=False),
    "column, gathered": lambda tp: column(tp, sequence_parallel=False, gather_output=True),
    "column, sequence": lambda tp: column(tp, sequence_parallel=True),
    "row": lambda tp: row(tp, sequence_parallel=False),
    "row, sequence": lambda tp: row(tp, sequence_parallel=True),
    "embedding": lambda tp: embedding(tp, sequence_parallel=False),
    "embedding, sequence": lambda tp: embedding(tp, sequence_parallel=True),
    "cross-entropy": lambda tp: cross_entropy(tp, dtype=torch.float32),
    "cross-entropy, bf16": lambda tp: cross_entropy(tp, dtype=torch.bfloat16),
    "cross-entropy, z-loss": lambda tp: cross_entropy(tp, dtype=torch.float32, z_loss=1e-2),
    "fused head": fused_head,
    "fused head, chunks": lambda tp: fused_head(tp, num_chunks=5),
    "fused head, sequence, chunks, z-loss": lambda tp: fused_head(
        tp, sequence_parallel=True, z_loss=1e-2, num_chunks=3
    ),
    "copy and reduce": lambda tp: adjoint(tp, enter="copy_to", leave="reduce_from"),
    "gather and scatter": lambda tp: adjoint(tp, enter="scatter_to", leave="gather_from"),
    "sequence gather and reduce-scatter": lambda tp: adjoint(
        tp, enter="gather_sequence", leave="reduce_scatter_sequence"
    ),
    "replica comparison": replica_bits,
}
