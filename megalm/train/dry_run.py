"""What `--dry-run` tells: the options, the files that the run will read and write, DeepSpeed's keys, the stages."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megalm.checkpoint import layout
from megalm.checkpoint.find import candidates, none_valid
from megalm.checkpoint.history import read_tip
from megalm.checkpoint.roll_backs import KEY as ROLL_BACKS
from megalm.checkpoint.run_tokenizer import tokenizer_facts
from megalm.checkpoint.source import read_train_state
from megalm.config.deepspeed_json import deepspeed_json
from megalm.config.root import Config
from megalm.config.show import dry_run_report
from megalm.data.build import open_corpora
from megalm.errors import CheckpointError
from megalm.models.flops import flops_per_token, parameter_count
from megalm.tokenizers.protocol import Tokenizer
from megalm.train.assembly import stages
from megalm.train.continuing import check_save_folder, compare, left_out_ahead, onward, or_afresh, roll_backs
from megalm.train.engine import check_deepspeed_keys
from megalm.train.prepare import Plan
from megalm.train.schedule import BatchSize

BYTES_PER_PARAMETER = {"fp32": 12, "bf16": 14, "fp16": 14}
"""In a checkpoint: a master weight and two moments in fp32, and the weight itself in 16 bits."""


def report(plan: Plan) -> str:
    """What `--dry-run` prints.

    Raises: MegalmError for what the run would stop at: kernels, stages, corpora, a checkpoint, DeepSpeed's keys.
    """
    dealt = stages(plan)
    model, seq_length = plan.config.model, plan.config.data.seq_length
    batch_size = BatchSize.from_config(plan.config.training, dp_size=plan.dp_size)
    num_parameters = parameter_count(model, seq_length=seq_length)
    steps = batch_size.steps_of(plan.config.training)
    more = {
        "steps": f"{steps:,} of {'up to ' if batch_size.increment else ''}{seq_length * batch_size.final:,} tokens",
        "parameters": f"{num_parameters:,}",
        "vocabulary": f"{model.padded_vocab_size:,} rows for {model.vocab_size:,} tokens of {plan.tokenizer.name}",
        "operations": f"{flops_per_token(model, seq_length=seq_length):.3e} a token, forward and backward",
        **({"stages": f"of {', '.join(str(len(stage)) for stage in dealt)} layers"} if len(dealt) > 1 else {}),
        **_look(plan.config, plan.tokenizer, num_parameters=num_parameters, dp_size=plan.dp_size),
    }
    return dry_run_report(plan.config, world_size=plan.launch.world_size, more=more)


def _look(config: Config, tokenizer: Tokenizer, *, num_parameters: int, dp_size: int) -> dict[str, str]:
    """What was found, in words by name; reads headers and small files, and writes nothing.

    Raises: DataError, CheckpointError or ConfigError, as the run itself would.
    """
    check_deepspeed_keys(deepspeed_json(config, dp_size=dp_size), dp_size=dp_size)
    corpora, warnings = open_corpora(config.data, tokenizer=tokenizer_facts(tokenizer))
    tokens = sum(corpus.num_tokens for corpus in corpora)
    found = {"corpora": "; ".join([f"{len(corpora):,}, with {tokens:,} tokens", *warnings])}
    if config.output.load is not None:
        found["load"] = _checkpoint(config, Path(config.output.load), dp_size=dp_size)
    else:
        check_save_folder(config, None)
    if config.output.save is not None:
        found["save"] = _room(Path(config.output.save), num_parameters * BYTES_PER_PARAMETER[config.training.dtype])
    return found


def _checkpoint(config: Config, folder: Path, *, dp_size: int) -> str:
    """The checkpoint that the run would try first, by its small files; its hashes are the run's to verify."""
    found = candidates(folder, None, config.output.universal_checkpoint)
    if not found.paths:
        if config.output.allow_fresh_start:
            check_save_folder(config, None)
            return f"nothing in {folder}: the run starts from step 0, as --allow-fresh-start says"
        raise or_afresh(none_valid(folder, found.remarks))
    path = found.paths[0]
    check_save_folder(config, path)
    said: list[str] = []
    compare(config, path, dp_size=dp_size, info=said.append, warn=said.append)
    step = layout.parse_step(path.resolve().name.removesuffix(".old"))
    if step is not None:
        going = onward(config, path, read_tip(path, step=step))
        said += [f"{config.output.save} holds {going}"] if going.later else []
        said += [f"another attempt begins at step {step + 1}"] if going.begins else []
        stored = read_train_state(path).get(ROLL_BACKS) if (path / layout.TRAIN_STATE).is_file() else None
        known = roll_backs(config, path, stored=stored, step=step, warn=said.append)
        said += left_out_ahead(config, known, step=step)
    return "; ".join([f"{path}, whose hashes are verified when it is loaded", *said])


def _room(folder: Path, checkpoint_bytes: int) -> str:
    """Whether the folder can be written to, and the room there.

    Raises: CheckpointError.
    """
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise CheckpointError(f"{folder} cannot be written: {there} is not a folder that this user may write to")
    free = shutil.disk_usage(there).free
    short = "" if free >= checkpoint_bytes else ": too little for one"
    return f"{folder}, {checkpoint_bytes / 1e9:,.2f} GB a checkpoint, {free / 1e9:,.2f} GB free{short}"
