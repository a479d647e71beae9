"""GPT computes what Hugging Face's Bloom and GPT-2 compute with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megalm.checkpoint.huggingface import family_of, model_config, renamed
from megalm.config.model import ModelConfig
from megalm.models.gpt.build import build_model, choose_kernels, plan_gpt
from megalm.models.gpt.model import GPT
from megalm.models.gpt.weights import named_in_model, weight_table
from tests.unit.models import small

transformers = pytest.importorskip("transformers")

# The bound that exports promise, in absolute logits; the logits here reach about 10 and the differences a few ulps.
TOLERANCE = 1e-5


def _twins(model: ModelConfig, *, attention: str = "auto") -> tuple[GPT, Any]:
    """Our model with random weights, and transformers' with the same ones, through the map of names."""
    kernels, _ = choose_kernels(model, device=torch.device("cpu"), attention=attention)
    ours = build_model(plan_gpt(model, kernels=kernels), seed=0).eval()
    small.randomise(ours)
    shape = ours.plan.shape
    family = family_of(shape)
    settings = model_config(shape, family=family, dtype="float32", eod_id=0, seq_length=32)
    kind = settings.pop("model_type")
    config = transformers.AutoConfig.for_model(kind, **settings)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    parameters = dict(named_in_model(ours, shape))
    state = {}
    for weight in weight_table(shape):
        other = renamed(weight, shape, family=family)
        state[other.name] = other.to_hf(parameters[weight.name].detach()).contiguous()
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert unexpected == []
    assert set(missing) <= {"lm_head.weight"}, "only the tied head has no weight of its own"
    theirs.tie_weights()
    return ours, theirs


def _logits_and_grads(ours: GPT, theirs: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits, and the gradient of the word embedding, which every other gradient flows into."""
    tokens = torch.randint(0, 96, (3, 33), generator=torch.Generator().manual_seed(1))
    found = []
    for module in (ours, theirs):
        output = module(tokens[:, :-1])
        logits = output if isinstance(output, torch.Tensor) else output.logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        found.append(logits.detach())
    ours_grad = ours.embedding.word_embeddings.weight.grad
    theirs_grad = theirs.get_input_embeddings().weight.grad
    assert ours_grad is not None
    return [found[0], ours_grad], [found[1], theirs_grad]


def _assert_twins_agree(model: ModelConfig, *, attention: str = "auto") -> None:
    ours, theirs = _logits_and_grads(*_twins(model, attention=attention))
    assert ours[0].std() > 0.5, "logits that are all but equal would prove nothing"
    for value, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(value, expected, rtol=0.0, atol=TOLERANCE)


@pytest.mark.parametrize("attention", ["baddbmm", "sdpa"])
@pytest.mark.parametrize("num_heads", [4, 6, 12])
def test_gpt_equals_transformers_bloom(num_heads: int, attention: str) -> None:
    _assert_twins_agree(small.bloom(num_heads=num_heads), attention=attention)


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_heads": 6, "ffn_hidden_size": 80}, {"activation": "gelu_erf"}, {"tie_embeddings": False}],
    ids=["plain", "other sizes", "erf", "untied"],
)
def test_gpt_equals_transformers_gpt2(changes: dict[str, Any]) -> None:
    _assert_twins_agree(small.gpt2(**changes))
