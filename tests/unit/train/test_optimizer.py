"""The optimizer updates as torch's does, and starts faster."""

from __future__ import annotations

import subprocess
import sys

import torch

from megalm.train.optimizer import PlainAdamW

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
