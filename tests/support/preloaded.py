"""Imported once by the fork server of `ranks`: what every rank would otherwise import itself, at seconds each."""

from __future__ import annotations

import importlib
import logging

import torch

for name in (
    "deepspeed.ops",
    "deepspeed.pipe",
    "deepspeed.runtime.pipe.engine",
    "torch._dynamo",  # DeepSpeed's ZeRO and recomputation import it
    "torch.utils.checkpoint",
    "megalm.models.gpt.pipeline",
    "megalm.train.build",
    "megalm.train.dry_run",
    "megalm.train.loop",
    "megalm.tokenizers.null",
    "tests.support.tiny_run",
):
    importlib.import_module(name)
torch.set_num_threads(1)
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
