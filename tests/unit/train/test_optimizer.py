"""The optimizer updates as torch's does, and starts faster."""

from __future__ import annotations

import subprocess
import sys

import torch

from megalm.models.gpt.build import build_model, plan_gpt
from megalm.models.gpt.weights import named_in_model
from megalm.train.optimizer import PlainAdamW, parameter_groups
from tests.unit.models import small

WITHOUT_TRACER = """
import sys, torch
from megalm.train.optimizer import PlainAdamW
parameter = torch.nn.Parameter(torch.ones(3))
parameter.grad = torch.ones(3)
optimizer = PlainAdamW([{"params": [parameter]}], lr=0.1, fused=True)
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
optimizer.zero_grad()
assert not torch.equal(parameter, torch.ones(3))
print("torch._dynamo" in sys.modules)
"""


def test_an_update_does_not_load_the_tracer_of_torch_compile() -> None:
    ended = subprocess.run([sys.executable, "-c", WITHOUT_TRACER], capture_output=True, text=True)
    assert ended.stdout == "False\n", ended.stderr


def test_updates_are_torchs_bit_for_bit() -> None:
    results = []
    for kind in (torch.optim.AdamW, PlainAdamW):
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in (7, 3)]
        groups = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "weight_decay": 0.0}]
        optimizer = kind(groups, lr=0.01, betas=(0.9, 0.95), fused=True)
        for _ in range(5):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        results.append([parameter.detach() for parameter in parameters])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert torch.is_grad_enabled()


def test_matrices_alone_decay() -> None:
    plan = plan_gpt(small.bloom(), seq_length=16)
    model = build_model(plan, seed=1)
    decaying, others = parameter_groups(model, weight_decay=0.1)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in named_in_model(model, plan.shape)}
    decay = {names[id(parameter)] for parameter in decaying["params"]}
    rest = {names[id(parameter)] for parameter in others["params"]}
    assert {name for name in decay if name.endswith("bias") or "layernorm" in name or "ln_f" in name} == set()
    assert {name for name in rest if not (name.endswith("bias") or "layernorm" in name or "ln_f" in name)} == set()
    assert decay | rest == set(names.values())
    assert "word_embeddings.weight" in decay
