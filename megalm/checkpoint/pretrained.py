"""A Hugging Face folder's model as transformers computes it: loaded whole, or refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megalm.errors import CheckpointError


def load_pretrained(folder: Path, *, dtype: torch.dtype) -> Any:
    """transformers' causal language model of a folder, in evaluation mode. Nothing is downloaded, no code of it run.

    Raises: CheckpointError if transformers cannot read it, or would fill in weights or leave some out.
    """
    from transformers import AutoModelForCausalLM

    try:
        with _quietly():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, output_loading_info=True, local_files_only=True, trust_remote_code=False, dtype=dtype
            )
    # Wrong types, sizes and damaged files come as errors of safetensors, of the hub's client, of torch, or plain ones.
    except Exception as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{folder} holds no model that transformers reads: {said}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            names = ", ".join(sorted(map(str, info[kind]))[:5])
            raise CheckpointError(
                f"transformers reports {kind.replace('_', ' ')} in {folder}: {names}\n"
                "  its weights are not those of its config.json: write or copy the folder again"
            )
    return model.eval()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """No progress bar and no table of keys between the lines of megalm's tools; afterwards as before."""
    from transformers.utils import logging

    drew, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if drew:
            logging.enable_progress_bar()
