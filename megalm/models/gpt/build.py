"""From the configuration to a model with initial weights: the one place where `ModelConfig` becomes modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from megalm.config.model import ModelConfig
from megalm.kernels.attention.suitability import AttentionUse
from megalm.kernels.backend import Choice, Verdict, choose, choose_add_layer_norm, choose_layer_norm_and_pass
from megalm.kernels.bias_gelu.protocol import BiasGeluKernel
from megalm.kernels.linear.torch_native import TorchLinear
from megalm.models.blocks.arrangement import Kernels, Spread
from megalm.models.gpt.model import GPT
from megalm.models.gpt.plan import DocumentRules, GPTPlan
from megalm.models.gpt.shape import gpt_shape
from megalm.models.gpt.weights import initial_rule, named_in_model, named_in_pipeline
from megalm.parallel.initialise import initialise
from megalm.topology.layout import Layout

if TYPE_CHECKING:
    from megalm.models.gpt.pipeline import GPTPipeline


def choose_kernels(
    model: ModelConfig,
    *,
    device: torch.device,
    attention: str = "auto",
    layer_norm: str = "auto",
    bias_gelu: str = "auto",
    gelu_linear: str = "auto",
    linear: str = "auto",
    head: str = "auto",
    dropout_add: str = "auto",
    dtype: torch.dtype | None = None,
    documents: DocumentRules | None = None,
    gelu_contest: Callable[[BiasGeluKernel], Verdict] | None = None,
) -> tuple[Kernels, dict[str, Choice]]:
    """The kernels that the names ask for, and each choice with its reason, for the log.

    Without `dtype`, that of activations, kernels are taken that serve every type. `gelu_contest` tries the GELU inside
    the MLP's products against the kernel between them.
    Raises: KernelError if one is asked for by name and cannot run.
    """
    use = None
    if dtype is not None:
        use = AttentionUse(
            alibi=model.position_embedding == "alibi",
            head_size=model.head_size,
            dtype=dtype,
            dropout=model.attention_dropout > 0.0,
            documents=documents is not None and documents.reset_attention,
        )
    choose_for = partial(choose, device=device, dtype=dtype, hidden_size=model.hidden_size)
    choices = {
        "attention": choose_for("attention", attention, use=use),
        "layer_norm": choose_for("layer_norm", layer_norm),
        "linear": choose_for("linear", linear),
        "head": choose_for("head", head),
        "dropout_add": choose_for("dropout_add", dropout_add, drops=model.hidden_dropout > 0.0),
    }
    if model.glu_activation is not None:
        glu = choose_for("glu", bias_gelu, gate=model.glu_activation)
        choices["bias_gelu"] = Choice(glu.name, glu.implementation(model.glu_activation), glu.reason)
    else:
        choices["bias_gelu"] = choose_for("gelu_erf" if model.activation == "gelu_erf" else "bias_gelu", bias_gelu)
    contest = None if gelu_contest is None else partial(gelu_contest, choices["bias_gelu"].implementation)
    choices["gelu_linear"] = choose_for("gelu_linear", gelu_linear, contest=contest)
    chosen = {name: choice.implementation for name, choice in choices.items()}
    if chosen["gelu_linear"] is not None:  # Modules call it by its name, which a compiled graph can hold.
        chosen["gelu_linear"] = choices["gelu_linear"].name
    chosen["add_layer_norm"] = choose_add_layer_norm(choices["layer_norm"].name)
    chosen["layer_norm_and_pass"] = choose_layer_norm_and_pass(choices["layer_norm"].name)
    head_linear = TorchLinear() if choices["linear"].name.startswith("fp8") else choices["linear"].implementation
    return Kernels(**chosen, head_linear=head_linear), choices


def plan_gpt(
    model: ModelConfig,
    *,
    seq_length: int | None = None,
    kernels: Kernels | None = None,
    spread: Spread | None = None,
    documents: DocumentRules | None = None,
    z_loss: float = 0.0,
) -> GPTPlan:
    """The plan of the model that the configuration describes; by default on one rank, with the CPU's kernels.

    `seq_length` gives a learned position table its rows where model.max_position_embeddings does not.
    """
    if kernels is None:
        kernels, _ = choose_kernels(model, device=torch.device("cpu"))
    return GPTPlan(gpt_shape(model, seq_length=seq_length), kernels, spread or Spread(), documents, z_loss)


def build_model(plan: GPTPlan, *, seed: int, num_threads: int = 1) -> GPT:
    """A single-stage model with its initial weights, in fp32 on the CPU."""
    module = GPT(plan)
    initialise(
        named_in_model(module, plan.shape),
        seed=seed,
        tp=plan.spread.tp,
        rule=lambda name: initial_rule(plan.shape, name),
        num_threads=num_threads,
    )
    return module


def pipeline_stages(plan: GPTPlan, *, partition: str, num_stages: int) -> list[range]:
    """Positions of the layers that each stage of the pipeline owns.

    Raises: ConfigError if `partition` does not fit the model and the number of stages.
    """
    from megalm.models.gpt.pipeline import deal_stages

    return deal_stages(plan, partition=partition, num_stages=num_stages)


def build_pipeline(plan: GPTPlan, *, layout: Layout, partition: str, seed: int, num_threads: int = 1) -> GPTPipeline:
    """This rank's stage with its initial weights, in fp32 on DeepSpeed's device. Needs torch.distributed.

    Tied copies start equal because a weight's values depend on its name alone.
    """
    from megalm.models.gpt.pipeline import GPTPipeline

    module = GPTPipeline(plan, layout=layout, partition=partition)
    initialise(
        named_in_pipeline(module, plan.shape),
        seed=seed,
        tp=plan.spread.tp,
        rule=lambda name: initial_rule(plan.shape, name),
        num_threads=num_threads,
    )
    return module
