"""What each rank runs for `test_pipeline_assembly`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from megalm.config.model import ModelConfig
from megalm.models.blocks.arrangement import Spread
from megalm.kernels.layer_norm import oracle
from megalm.models.blocks.block import ParallelTransformerLayer
from megalm.models.gpt.build import build_model, build_pipeline, choose_kernels, plan_gpt
from megalm.models.gpt.plan import DocumentRules, GPTPlan
from megalm.models.gpt.weights import named_in_model, named_in_pipeline
from megalm.topology.start import Launch, start
from tests.unit.models import small

PARTITION = "type:transformer|embedding"


class Comparison(NamedTuple):
    """The pipeline of one stage beside `GPT`."""

    loss_bits_equal: bool
    names_equal: bool
    grads_bit_equal: list[str]
    grads_different: list[str]


def _plan(model: ModelConfig, documents: DocumentRules | None, topology: Any) -> GPTPlan:
    return plan_gpt(model, spread=Spread(tp=topology.tp), documents=documents)


def compare_with_model(cases: dict[str, tuple[ModelConfig, DocumentRules | None]]) -> dict[str, Comparison]:
    """One stage: the same loss and gradients, bit for bit, as both run the same operations."""
    topology = start(Launch.from_environment(), tp=1, pp=1, backend="gloo")
    return {name: _compare(_plan(*case, topology), topology) for name, case in cases.items()}


def _compare(plan: GPTPlan, topology: Any) -> Comparison:
    tokens = torch.randint(0, 96, (3, 17), generator=torch.Generator().manual_seed(2))
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    mask = (torch.arange(48).view(3, 16) % 5 != 0).float()
    model = build_model(plan, seed=6)
    pipeline = build_pipeline(plan, layout=topology.layout, partition=PARTITION, seed=6)
    loss = model(inputs, labels, mask)
    piped = pipeline.loss_fn(pipeline(inputs), (labels, mask))
    loss.backward()
    piped.backward()
    ours = dict(named_in_model(model, plan.shape))
    theirs = dict(named_in_pipeline(pipeline, plan.shape))
    equal = {name for name in ours if torch.equal(_grad(ours[name]), _grad(theirs[name]))}
    return Comparison(torch.equal(loss, piped), set(ours) == set(theirs), sorted(equal), sorted(set(ours) - equal))


def _grad(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def train_fused(pp: int) -> tuple[list[list[float]], list[bool]]:
    """Losses of three steps through DeepSpeed's engine without and with additions fused into LayerNorm; which of this
    stage's blocks then leave their addition to the next."""
    topology = start(Launch.from_environment(), tp=1, pp=pp, backend="gloo")
    model = small.bloom(num_layers=4, init_std=0.2)
    losses, left = [], []
    for add_layer_norm in (None, oracle.add_layer_norm):
        kernels, _ = choose_kernels(model, device=torch.device("cpu"))
        plan = plan_gpt(model, kernels=replace(kernels, add_layer_norm=add_layer_norm), spread=Spread(tp=topology.tp))
        pipeline = build_pipeline(plan, layout=topology.layout, partition=PARTITION, seed=6)
        left = [m.leaves_addition for m in pipeline.forward_funcs if isinstance(m, ParallelTransformerLayer)]
        losses.append(_three_steps(pipeline, vocabulary=96))
    return losses, left


def train_with_documents(pp: int) -> list[float]:
    """Losses of three steps through DeepSpeed's engine, with document numbers sent from stage to stage."""
    topology = start(Launch.from_environment(), tp=1, pp=pp, backend="gloo")
    rules = DocumentRules(eod_id=3, reset_positions=True, reset_attention=True)
    plan = _plan(small.gpt2(init_std=0.2), rules, topology)
    return _three_steps(build_pipeline(plan, layout=topology.layout, partition=PARTITION, seed=6), vocabulary=12)


def _three_steps(pipeline: Any, *, vocabulary: int) -> list[float]:
    """Losses of three updates through DeepSpeed's engine, of tokens below `vocabulary`."""
    import deepspeed

    settings = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3, "gradient_clipping": 0.0}
    engine, *_ = deepspeed.initialize(
        model=pipeline, optimizer=torch.optim.SGD(pipeline.parameters(), lr=0.5), config=settings
    )
    generator = torch.Generator().manual_seed(2)
    tokens = [torch.randint(0, vocabulary, (2, 17), generator=generator) for _ in range(9)]
    batches = iter([(t[:, :-1], (t[:, 1:], torch.ones(2, 16))) for t in tokens])
    return [float(engine.train_batch(batches)) for _ in range(3)]


class Stage(NamedTuple):
    """What one rank of a pipeline owns."""

    stages: list[range]
    names: list[str]
    files: dict[int, list[str]]
    counted_elsewhere: list[str]
    word_embeddings: list[float]
    class_names: list[str]


def describe_stage(pp: int, num_layers: int, partition: str, tie: bool) -> Stage:
    """The stage of this rank, before and after tied weights are synchronised."""
    topology = start(Launch.from_environment(), tp=1, pp=pp, backend="gloo")
    model = small.bloom(num_layers=num_layers, tie_embeddings=tie)
    plan = _plan(model, None, topology)
    pipeline = build_pipeline(plan, layout=topology.layout, partition=partition, seed=6)
    named = list(named_in_pipeline(pipeline, plan.shape))
    first = pipeline.stages()[topology.pp.rank].start
    embeddings = [
        parameter.detach().flatten()[:5].tolist() for name, parameter in named if name == "word_embeddings.weight"
    ]
    return Stage(
        stages=pipeline.stages(),
        names=[name for name, _ in named],
        files={
            first + index: list(layer.state_dict())
            for index, layer in enumerate(pipeline.forward_funcs)
            if hasattr(layer, "state_dict")
        },
        counted_elsewhere=[name for name, parameter in named if parameter.ds_pipe_replicated],  # type: ignore[attr-defined]
        word_embeddings=embeddings[0] if embeddings else [],
        class_names=[type(layer).__name__ for layer in pipeline.forward_funcs],
    )
