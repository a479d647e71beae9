"""Imported once by the fork server of `ranks`: what every rank would otherwise import itself."""

from __future__ import annotations

import logging

import deepspeed.ops  # noqa: F401  # imported for its cost
import torch

torch.set_num_threads(1)
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
