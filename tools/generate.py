#!/usr/bin/env python
"""Continue a text with a trained model: a checkpoint of any layout, or a Hugging Face folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalm.errors import CheckpointError, ConfigError
from megalm.program import program

COLDEST = 1e-6
"""Logits divided by less could leave the range of fp32."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    result.add_argument("--load", type=Path, required=True, help="checkpoint folder, or Hugging Face folder")
    result.add_argument("--step", type=int, help="step of the checkpoint; default: the one that `latest` names")
    result.add_argument("--prompt", required=True, help="text to continue")
    result.add_argument("--max-new-tokens", type=int, default=40, help="tokens to add (default: 40)")
    result.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    result.add_argument("--top-k", type=int, help="choose among the k likeliest tokens only")
    result.add_argument("--seed", type=int, default=0, help="seed of the choice (default: 0)")
    result.add_argument("--tokenizer-name-or-path", help="tokenizer; default: the model's own")
    return result


def open_model(options: argparse.Namespace) -> tuple[Any, Any, int | None]:
    """(a function from tokens to logits, the tokenizer, the longest input or None)."""
    import torch

    from megalm.checkpoint.pretrained import load_pretrained
    from megalm.checkpoint.run_tokenizer import check_rows, tokenizer_of_run
    from megalm.tokenizers.build import tokenizer_in

    given = options.tokenizer_name_or_path
    if (options.load / "config.json").is_file():
        if options.step is not None:
            raise ConfigError(
                f"--step {options.step} has no meaning for the Hugging Face folder {options.load}\n"
                "  leave it out, or give --load the folder that a run saved to"
            )
        model = load_pretrained(options.load, dtype=torch.float32)
        tokenizer = tokenizer_in(given or str(options.load))
        check_rows(tokenizer, model.get_input_embeddings().num_embeddings)
        return (lambda tokens: model(tokens).logits), tokenizer, getattr(model.config, "n_positions", None)

    from megalm.checkpoint.byte_line import ByteLine
    from megalm.checkpoint.find import find_checkpoint
    from megalm.checkpoint.identity import read_config
    from megalm.checkpoint.source import open_checkpoint
    from megalm.checkpoint.standalone import load_model

    line = ByteLine(sys.stderr, "verifying")
    checkpoint = find_checkpoint(options.load, step=options.step, warn=warn, progress=line)
    line.close()
    tokenizer = tokenizer_of_run(open_checkpoint(checkpoint), read_config(checkpoint), given=given, warn=warn)
    if tokenizer is None:
        raise CheckpointError(f"{checkpoint} does not name its tokenizer\n  give --tokenizer-name-or-path")
    reading = ByteLine(sys.stderr, "reading")
    own = load_model(checkpoint, progress=reading)
    reading.close()
    return own, tokenizer, own.plan.shape.num_positions


def run(options: argparse.Namespace) -> None:
    """Load, continue, print."""
    from megalm.checkpoint.standalone import Sampling, continue_tokens

    for name, least in (("max_new_tokens", 0), ("temperature", 0), ("top_k", 1), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and not value >= least:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least {least}")
    if options.seed >= 2**63:
        raise ConfigError(f"--seed {options.seed} must be less than 2^63")
    if options.temperature > 0 and not COLDEST <= options.temperature < float("inf"):
        raise ConfigError(f"--temperature {options.temperature} must be 0, or finite and at least {COLDEST}")
    if options.top_k is not None and options.temperature == 0:
        raise ConfigError(
            f"--top-k {options.top_k} limits a choice at random, and --temperature 0 takes the likeliest token\n"
            "  pass a --temperature above 0, or leave out --top-k"
        )
    logits, tokenizer, max_length = open_model(options)
    tokens = tokenizer.encode(options.prompt)
    if not tokens:
        raise CheckpointError("--prompt has no tokens\n  give some text")
    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, seed=options.seed)
    continued = continue_tokens(
        logits,
        tokens,
        num_new=options.max_new_tokens,
        vocab_size=tokenizer.vocab_size,
        sampling=sampling,
        max_length=max_length,
        stop_id=tokenizer.eod_id,
    )
    print(tokenizer.decode(continued))


def warn(message: str) -> None:
    """Print a warning."""
    print(f"warning: {message}", file=sys.stderr)


@program
def main(arguments: list[str]) -> int:
    """Run the tool and return its exit code."""
    options = parser().parse_args(arguments)
    run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
