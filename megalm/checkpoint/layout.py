"""Every file name of a checkpoint, in one place.

The names are those of BigScience's and DeepSpeed's pipeline checkpoints. DeepSpeed writes most of them from names of
its own, so they are interface: a test compares these functions with what a run leaves on the disk.
"""

from __future__ import annotations

import re

LATEST = "latest"
LATEST_UNIVERSAL = "latest_universal"
TRAIN_STATE = "train_state.json"
CONFIG = "config.yaml"
MANIFEST = "manifest.json"
KERNELS = "kernels.json"
"""What a run found when it tried kernels, beside its checkpoints."""
ROLL_BACKS = "roll_backs.json"
"""Beside the checkpoints: what runs leave out since their losses rose."""

TOKENIZER = "tokenizer"
"""Folder beside an imported checkpoint with its tokenizer's files."""

UNIVERSAL_FOLDER = "zero"
"""Folder of a universal checkpoint that has a folder for each parameter."""
UNIVERSAL_OPTIMIZER = "optimizer_state.pt"
"""What its optimizer states have in common, in that folder."""

_STEP = re.compile(r"global_step(\d+)")
_LAYER_FILE = re.compile(r"layer_(\d{2,})-model_(\d{2,})-model_states\.pt")
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d{2,})_optim_states\.pt")
_MODEL_FILE = re.compile(r"mp_rank_(\d{2,})_model_states\.pt")


def step_folder(step: int) -> str:
    """Folder of the checkpoint after `step` optimizer updates."""
    return f"global_step{step}"


def temporary_folder(step: int) -> str:
    """Folder that a checkpoint is written to before it is published."""
    return f"{step_folder(step)}.tmp"


def replaced_folder(step: int) -> str:
    """Where an older checkpoint of the same step stands while its successor takes the name."""
    return f"{step_folder(step)}.old"


def parse_step(name: str) -> int | None:
    """Step of a published checkpoint's folder name, or None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match.group(1)) if match else None


def layer_file(index: int, tp_rank: int) -> str:
    """Weights of one pipeline layer, numbered as in `models/gpt/weights`, on one tensor rank."""
    return f"layer_{index:02d}-model_{tp_rank:02d}-model_states.pt"


def parse_layer_file(name: str) -> tuple[int, int] | None:
    """(layer index, tensor rank) of a layer file's name, or None for any other name."""
    match = _LAYER_FILE.fullmatch(name)
    return (int(match.group(1)), int(match.group(2))) if match else None


def model_rank(*, pp_rank: int, tp_rank: int, tp_size: int) -> int:
    """DeepSpeed's `mp_rank`: tensor ranks counted within stages."""
    return pp_rank * tp_size + tp_rank


def model_file(mp_rank: int) -> str:
    """Engine state of one (stage, tensor rank); with ZeRO 0 the optimizer state is in it."""
    return f"mp_rank_{mp_rank:02d}_model_states.pt"


def sharded_model_file(*, dp_rank: int, mp_rank: int) -> str:
    """Engine state of one rank under ZeRO-3."""
    return f"zero_pp_rank_{dp_rank}_{model_file(mp_rank)}"


def parse_model_file(name: str) -> int | None:
    """mp_rank of an engine-state file's name, or None for any other name."""
    match = _MODEL_FILE.fullmatch(name)
    return int(match.group(1)) if match else None


def optimizer_file(*, dp_rank: int, mp_rank: int, bf16: bool) -> str:
    """Optimizer partition of one rank. DeepSpeed's "pp_rank" in the name is the data-parallel rank."""
    return f"{'bf16_' if bf16 else ''}zero_pp_rank_{dp_rank}_mp_rank_{mp_rank:02d}_optim_states.pt"


def parse_optimizer_file(name: str) -> tuple[int, int] | None:
    """(data rank, mp_rank) of an optimizer file's name, or None for any other name."""
    match = _OPTIMIZER_FILE.fullmatch(name)
    return (int(match.group(1)), int(match.group(2))) if match else None


def universal_file(parameter: str, key: str) -> str:
    """One state of one parameter of a universal checkpoint: fp32, exp_avg, exp_avg_sq or step; with its folders."""
    return f"{UNIVERSAL_FOLDER}/{parameter}/{key}.pt"


def rng_file(*, tp_rank: int, pp_rank: int, dp_rank: int) -> str:
    """Random-number states of one rank."""
    return f"rng_pipe_{pp_rank:02d}-data_{dp_rank:02d}-model_{tp_rank:02d}.pt"
