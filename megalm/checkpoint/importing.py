"""A Hugging Face folder as a checkpoint that a run continues from."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from torch import Tensor

from megalm.checkpoint import layout
from megalm.checkpoint.draft import versions
from megalm.checkpoint.durable import (
    FileRecord,
    make_folder,
    publish_folder,
    remove_folder,
    replace_text,
    write_text,
    writing_to,
)
from megalm.checkpoint.export import DTYPES
from megalm.checkpoint.foreign import ForeignModel, ForeignWeights, read_foreign_config
from megalm.checkpoint.huggingface import BLOOM, renamed
from megalm.checkpoint.identity import resolved_fields
from megalm.checkpoint.manifest import Manifest
from megalm.checkpoint.special_ids import KEPT
from megalm.checkpoint.split import check_layout, write_layer_files
from megalm.checkpoint.tensor_files import is_finite
from megalm.config.model import ModelConfig
from megalm.errors import CheckpointError
from megalm.models.gpt.shape import GPTShape, gpt_shape
from megalm.models.gpt.weights import Weight, weight_table
from megalm.tokenizers.build import data_fields

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
# GPT-2's causal masks, which old folders store as if they were weights.
_BUFFERS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")

Progress = Callable[[str, int, int], None]
"""Called with a weight's name, its bytes in fp32, and the bytes in all."""


@dataclass(frozen=True)
class Import:
    """What an import wrote."""

    path: Path
    family: str
    model: ModelConfig
    num_parameters: int
    preset: Path
    """A YAML preset of the model, for `--config`."""


def import_folder(
    source: Path,
    destination: Path,
    *,
    tp_size: int = 1,
    pp_size: int = 1,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Import:
    """Write `destination/global_step0` with the weights of a Bloom or GPT-2 folder. Holds one layer in memory.

    `dtype` is fp32, bf16 or fp16; the folder's own when not given. The checkpoint has no optimizer state, and loads at
    any layout, whatever the sizes here.
    Raises: CheckpointError if the folder cannot be expressed, is damaged, or the destination is not empty or cannot be
    written.
    """
    foreign = read_foreign_config(source)
    weights = ForeignWeights(source)
    foreign = _with_head(foreign, weights)
    shape = gpt_shape(foreign.model)
    _check_names(source, weights, shape, family=foreign.family)
    check_layout(shape, tp_size=tp_size, pp_size=pp_size)
    with writing_to(destination):
        _check_destination(destination)
    final = destination / layout.step_folder(0)
    temporary = destination / layout.temporary_folder(0)
    chosen = dtype or foreign.dtype
    sizes: dict[str, int | str] = {"tp": tp_size, "pp": pp_size, "dp": 1, "zero_stage": 0, "dtype": chosen or "stored"}
    try:
        with writing_to(destination):
            make_folder(temporary)
            converted = _converted(weights, shape, family=foreign.family, dtype=chosen, progress=progress)
            records = write_layer_files(temporary, converted, tp_size=tp_size)
            _write_descriptions(temporary, foreign, records, sizes=sizes)
            preset = _write_preset(source, destination, foreign)
            publish_folder(temporary, final, replaced=destination / layout.replaced_folder(0))
            replace_text(destination / layout.LATEST, final.name)
    except BaseException:
        remove_folder(temporary)
        raise
    count = sum(weight.numel for weight in weight_table(shape))
    return Import(final, foreign.family, foreign.model, count, preset)


def _with_head(foreign: ForeignModel, weights: ForeignWeights) -> ForeignModel:
    """Whether the head is tied is what the tensors say, not what the configuration claims."""
    if "lm_head.weight" not in weights.names():
        return replace(foreign, model=replace(foreign.model, tie_embeddings=True))
    embedding = "word_embeddings.weight" if foreign.family == BLOOM else "wte.weight"
    tied = torch.equal(weights.read("lm_head.weight"), weights.read(embedding))
    if not tied and foreign.family == BLOOM:
        raise CheckpointError(f"{weights.folder}: lm_head.weight differs from the word embedding, which no Bloom has")
    return replace(foreign, model=replace(foreign.model, tie_embeddings=tied))


def _check_names(source: Path, weights: ForeignWeights, shape: GPTShape, *, family: str) -> None:
    expected = {
        renamed(weight, shape, family=family).name.removeprefix("transformer.") for weight in weight_table(shape)
    }
    found = {name for name in weights.names() if not _BUFFERS.fullmatch(name)} - {"lm_head.weight"}
    missing, left_over = sorted(expected - found - {"lm_head.weight"}), sorted(found - expected)
    if missing or left_over:
        raise CheckpointError(
            f"{source} does not hold the weights of its config.json\n"
            f"  missing: {', '.join(missing[:5]) or 'none'}; not known: {', '.join(left_over[:5]) or 'none'}"
        )


def _check_destination(destination: Path) -> None:
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination} is a file\n  give a folder")
    if destination.exists() and any(destination.iterdir()):
        raise CheckpointError(f"{destination} is not empty, and nothing is overwritten\n  give another folder")


def _converted(
    weights: ForeignWeights, shape: GPTShape, *, family: str, dtype: str | None, progress: Progress | None
) -> Iterator[tuple[Weight, Tensor]]:
    table = weight_table(shape)
    total = 4 * sum(weight.numel for weight in table)
    for weight in table:
        form = renamed(weight, shape, family=family)
        tensor = weights.read(form.name.removeprefix("transformer."))
        if tuple(tensor.shape) != form.shape or not tensor.is_floating_point():
            raise CheckpointError(
                f"{weights.folder}: {form.name} is {tensor.dtype} of shape {list(tensor.shape)}; "
                f"config.json makes it {list(form.shape)}"
            )
        own = form.from_hf(tensor)
        converted = own if dtype is None else own.to(DTYPES[dtype])
        _check_finite(converted, own, name=f"{weights.folder}: {form.name}", dtype=dtype or str(own.dtype))
        yield weight, converted
        if progress is not None:
            progress(weight.name, 4 * weight.numel, total)


def _check_finite(converted: Tensor, stored: Tensor, *, name: str, dtype: str) -> None:
    if is_finite(converted):
        return
    if is_finite(stored):
        raise CheckpointError(
            f"{name} holds values up to {stored.abs().max().item():.3g}, which are infinity in {dtype}\n"
            "  import it in one that holds them: --dtype fp32"
        )
    raise CheckpointError(
        f"{name} holds NaN or infinity in {dtype}, and such weights are not published\n"
        "  get the folder again, or another version of the model"
    )


def _write_descriptions(
    folder: Path, foreign: ForeignModel, records: list[FileRecord], *, sizes: dict[str, int | str]
) -> None:
    """Write progress, which is none, what is kept of config.json, and the manifest of everything."""
    counts = {"step": 0, "consumed_samples": 0, "consumed_tokens": 0, "skipped_steps": 0}
    state = {**counts, KEPT: dict(foreign.kept)}
    progress = write_text(folder / layout.TRAIN_STATE, json.dumps(state, indent=1) + "\n")
    manifest = Manifest(
        step=0,
        layout=sizes,
        model=resolved_fields(foreign.model, seq_length=foreign.seq_length),
        versions=versions(),
        files=tuple(sorted([*records, progress], key=lambda record: record.name)),
    )
    write_text(folder / layout.MANIFEST, manifest.to_json())


def _write_preset(source: Path, destination: Path, foreign: ForeignModel) -> Path:
    """Write model.yaml, and the tokenizer's files to `tokenizer/`."""
    tokenizer = destination / layout.TOKENIZER
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            make_folder(tokenizer)
            shutil.copyfile(source / name, tokenizer / name)
    fields = resolved_fields(foreign.model, seq_length=foreign.seq_length)
    content: dict[str, dict[str, object]] = {"model": {k: v for k, v in fields.items() if v is not None}}
    data: dict[str, object] = {}
    if foreign.seq_length is not None:
        data["seq_length"] = foreign.seq_length
    data.update(data_fields(tokenizer.resolve()))
    if data:
        content["data"] = data
    path = destination / "model.yaml"
    write_text(path, "# The imported model: give this file to --config.\n" + yaml.safe_dump(content, sort_keys=False))
    return path
