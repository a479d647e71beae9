"""Layer files out of weights: the way back from `merge`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from torch import Tensor

from megalm.checkpoint import layout
from megalm.checkpoint.durable import FileRecord
from megalm.checkpoint.tensor_files import snapshot, write_tensors
from megalm.errors import CheckpointError
from megalm.models.gpt.shape import GPTShape
from megalm.models.gpt.weights import Weight


def check_layout(shape: GPTShape, *, tp_size: int, pp_size: int) -> None:
    """Refuse sizes that no run could load the result at.

    Raises: CheckpointError that names the sizes that fit.
    """
    if min(tp_size, pp_size) < 1:
        raise CheckpointError(f"parallel sizes must be at least 1, not {tp_size} and {pp_size}")
    if pp_size > shape.num_layers:
        raise CheckpointError(
            f"{pp_size} pipeline stages do not fit {shape.num_layers} layers\n  sizes that fit: 1 to {shape.num_layers}"
        )
    parts = {
        "attention heads": shape.block.num_heads,
        "units of the MLP": shape.block.ffn_size,
        "rows of vocabulary": shape.vocab_rows,
    }
    fitting = [size for size in range(1, shape.block.num_heads + 1) if all(n % size == 0 for n in parts.values())]
    for name, count in parts.items():
        if count % tp_size:
            raise CheckpointError(
                f"the {count} {name} cannot be cut into {tp_size} parts\n"
                f"  tensor-parallel sizes that fit: {', '.join(map(str, fitting))}"
            )


def write_layer_files(
    folder: Path, weights: Iterable[tuple[Weight, Tensor]], *, tp_size: int, tp_ranks: Iterable[int] | None = None
) -> list[FileRecord]:
    """Write weights that come whole, in the order of the layers, as the layer files of `tp_size` tensor ranks.

    Holds one layer at a time. `tp_ranks` limits the files to those of some ranks.
    Raises: CheckpointError if tp_size does not divide a weight.
    """
    ranks = list(range(tp_size) if tp_ranks is None else tp_ranks)
    records = []
    for index, layer in groupby(weights, key=lambda pair: pair[0].layer):
        own = list(layer)
        for rank in ranks:
            state = {weight.key: shard(weight, tensor, tp_rank=rank, tp_size=tp_size) for weight, tensor in own}
            records.append(write_tensors(folder / layout.layer_file(index, rank), snapshot(state, copy=False)))
    return records


def shard(weight: Weight, tensor: Tensor, *, tp_rank: int, tp_size: int) -> Tensor:
    """One tensor rank's part of a whole weight, as a view.

    Raises: CheckpointError if tp_size does not divide it.
    """
    dim = weight.partition_dim
    if dim is None:
        return tensor
    if tensor.size(dim) % tp_size != 0:
        raise CheckpointError(
            f"{weight.name} {list(tensor.shape)} cannot be cut into {tp_size} parts along dimension {dim}\n"
            "  choose a tensor-parallel size that divides it"
        )
    size = tensor.size(dim) // tp_size
    return tensor.narrow(dim, tp_rank * size, size)
