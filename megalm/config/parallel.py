"""How the model and the batch are spread over processes."""

from __future__ import annotations

from dataclasses import dataclass

from megalm.config.option import option

RECOMPUTE = ("none", "selective", "activation", "full")
BACKENDS = ("auto", "nccl", "gloo")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the tensor and pipeline axes; the data axis is what remains of the world."""

    tp: int = option(1, doc="Processes that share each layer's weights (tensor parallelism).")
    pp: int = option(1, doc="Pipeline stages.")
    sequence_parallel: bool = option(
        False,
        doc="Split activations outside the tensor-parallel layers along the sequence: reduce-scatter for all-reduce.",
    )
    pipeline_partition: str = option(
        "type:transformer",
        doc="How layers are dealt to stages: 'parameters', 'uniform', or 'type:REGEX' over layer class names.",
    )
    recompute: str = option(
        "none",
        doc="Activations recomputed in backward: none, the attention core's (selective), the output of the MLP's "
        "activation function (activation), or whole blocks (full).",
        choices=RECOMPUTE,
    )
    zero_stage: int = option(
        0, doc="ZeRO stage over the data axis; 2 and 3 need one pipeline stage.", choices=(0, 1, 2, 3)
    )
    backend: str = option(
        "auto", doc="torch.distributed backend; auto is nccl on GPUs, gloo on CPUs.", choices=BACKENDS
    )
