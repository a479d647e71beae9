"""Every module imports with the base dependencies alone, and importing does nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A child process: refuse whatever is not a base dependency, import every module, report what that changed.
PROBE = """
import importlib, json, os, pkgutil, sys

class Refuse:
    blocked = frozenset(sys.argv[1].split(","))
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.blocked:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)

sys.meta_path.insert(0, Refuse())
import torch, deepspeed  # their own side effects are not ours
before = dict(os.environ), torch.get_num_threads(), torch.is_grad_enabled(), torch.random.initial_seed()
import megalm
names = [info.name for info in pkgutil.walk_packages(megalm.__path__, "megalm.")]
failures = {}
for name in names:
    try:
        importlib.import_module(name)
    except Exception as error:
        failures[name] = f"{type(error).__name__}: {error}"
after = dict(os.environ), torch.get_num_threads(), torch.is_grad_enabled(), torch.random.initial_seed()
with open(sys.argv[2], "w") as file:
    json.dump({"names": names, "failures": failures, "unchanged": before == after,
               "started_cuda": torch.cuda.is_initialized()}, file)
"""
OPTIONAL = (
    "transformers",
    "matplotlib",
    "tensorboard",
    "wandb",
    "sentencepiece",
    "pyarrow",
    "zstandard",
    "pytest",
    "hypothesis",
    "triton",
    "apex",
)


@pytest.mark.slow
def test_every_module_imports_with_base_dependencies_and_importing_does_nothing(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:megalm", "-c", PROBE, ",".join(OPTIONAL), str(report)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    result = json.loads(report.read_text())
    assert len(result["names"]) > 50
    assert result["failures"] == {}
    assert result["unchanged"]
    assert not result["started_cuda"]
    assert child.stdout == ""


def test_base_dependencies_are_those_of_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    base = re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert base is not None
    named = set(re.findall(r'"([A-Za-z0-9_-]+)', base.group(1)))
    assert named == {"torch", "deepspeed", "numpy", "pyyaml", "tokenizers", "safetensors", "tiktoken"}
    assert named.isdisjoint(OPTIONAL)


def test_every_requirement_of_pyproject_is_pinned_in_the_lock() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    requirements = re.findall(r'^ +"([A-Za-z0-9_-]+)(?:\[[^]]*\])?>=', text, re.MULTILINE)
    requirements += re.findall(
        r'"([A-Za-z0-9_-]+)>=', " ".join(re.findall(r"^(?:data|hf|tracking) = .*$", text, re.MULTILINE))
    )
    pinned = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    assert len(requirements) > 10
    assert {name.lower() for name in requirements} <= pinned
