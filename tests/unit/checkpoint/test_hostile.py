"""Checkpoints made to do harm by somebody who can also make their manifest agree: refused, and nothing in them runs."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.checkpoint import layout
from megalm.checkpoint.durable import FileRecord, replace_text
from megalm.checkpoint.find import find_checkpoint
from megalm.checkpoint.identity import read_config
from megalm.checkpoint.manifest import hash_file, read_manifest
from megalm.checkpoint.optimizer_files import MOMENTS, read_engine_state
from megalm.checkpoint.source import open_checkpoint
from megalm.checkpoint.tensor_files import read_tensors
from megalm.errors import MegalmError
from megalm.models.gpt.weights import FIRST_BLOCK_LAYER
from tests.support.bigscience import write_bigscience
from tests.support.checkpoints import bloom_config, write_checkpoint

LAYER = layout.layer_file(FIRST_BLOCK_LAYER, 0)
OPTIMIZER = layout.optimizer_file(dp_rank=0, mp_rank=0, bf16=True)
RNG = layout.rng_file(tp_rank=0, pp_rank=0, dp_rank=0)


class Canary:
    """Pickles into a call that makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def read_everything(folder: Path) -> None:
    """What a resumed run reads, and what the export reads."""
    path = find_checkpoint(folder, warn=str)
    read_config(path)
    source = open_checkpoint(path)
    for _ in source.layers.iterate():
        pass
    read_engine_state(path / layout.model_file(0), read=source.read)
    if (path / RNG).exists():
        read_tensors(path / RNG)
    files = source.optimizer()
    if files.exists:
        for weight, _ in source.layers.iterate():
            for key in MOMENTS:
                files.whole(weight, key)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint of every kind of file."""
    checkpoint = tmp_path / "run" / "global_step3"
    write_checkpoint(checkpoint, bloom_config())
    write_bigscience(tmp_path / "old" / "global_step7", bloom_config(), tp_size=1, dp_size=1)
    content = pickle.loads(pickle.dumps({"global_steps": 3, "optimizer": None}))
    torch.save(content, checkpoint / layout.model_file(0))
    torch.save({"cpu": torch.get_rng_state()}, checkpoint / RNG)
    list_files(checkpoint)
    replace_text(tmp_path / "run" / layout.LATEST, "global_step3")
    read_everything(tmp_path / "run")
    return checkpoint


def list_files(folder: Path) -> None:
    """Let the manifest agree with whatever lies in the folder."""
    manifest = read_manifest(folder)
    paths = [path for path in sorted(folder.iterdir()) if path.name != layout.MANIFEST and path.is_file()]
    files = tuple(FileRecord(path.name, path.stat().st_size, hash_file(path)) for path in paths)
    (folder / layout.MANIFEST).write_text(replace(manifest, files=files).to_json())


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / layout.MANIFEST
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def torch_canary(name: str, *, zipped: bool = True) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = {"weight": torch.ones(2), "x": Canary(folder.parent.parent / "canary")}
        torch.save(content, folder / name, _use_new_zipfile_serialization=zipped)
        list_files(folder)

    return spoil


def raw_canary(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(pickle.dumps(Canary(folder.parent.parent / "canary")))
        if name != layout.MANIFEST:
            list_files(folder)

    return spoil


def yaml_canary(folder: Path) -> None:
    path = folder.parent.parent / "canary"
    (folder / layout.CONFIG).write_text(f"model: !!python/object/apply:os.mkdir ['{path}']\n")
    list_files(folder)


def model_of(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: change_manifest(folder, lambda content: content["model"].update(fields))


def first_file(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: change_manifest(folder, lambda content: content["files"][0].update(fields))


def link_out(folder: Path) -> None:
    outside = folder.parent.parent / "outside.pt"
    (folder / LAYER).rename(outside)
    (folder / LAYER).symlink_to(outside)


def huge_tensor(folder: Path) -> None:
    """A shard whose weight claims far more elements than the file holds: an expanded view of one number."""
    state = read_tensors(folder / LAYER)
    state["mlp.dense_h_to_4h.weight"] = torch.ones(1).expand(2**20, 2**20)
    torch.save(state, folder / LAYER)
    list_files(folder)


def integer_weights(folder: Path) -> None:
    state = {key: tensor.long() if "dense" in key else tensor for key, tensor in read_tensors(folder / LAYER).items()}
    torch.save(state, folder / LAYER)
    list_files(folder)


HOSTILE: dict[str, Callable[[Path], None]] = {
    "pickle in a layer file": torch_canary(LAYER),
    "pickle in a layer file of the old format": torch_canary(LAYER, zipped=False),
    "bare pickle for a layer file": raw_canary(LAYER),
    "pickle in the engine state": torch_canary(layout.model_file(0)),
    "bare pickle for the engine state": raw_canary(layout.model_file(0)),
    "pickle in an optimizer partition": torch_canary(OPTIMIZER),
    "bare pickle for an optimizer partition": raw_canary(OPTIMIZER),
    "pickle in the random-number state": torch_canary(RNG),
    "pickle for train_state.json": raw_canary(layout.TRAIN_STATE),
    "pickle for the manifest": raw_canary(layout.MANIFEST),
    "a call in config.yaml": yaml_canary,
    "a name that climbs": first_file(name="../../outside.pt"),
    "an absolute name": first_file(name="/etc/passwd"),
    "a link out of the folder": link_out,
    "a negative length": first_file(bytes=-1),
    "a length that is no number": first_file(bytes="1e9"),
    "a billion layers": model_of(num_layers=10**9),
    "an enormous width": model_of(hidden_size=2**40),
    "no heads": model_of(num_heads=0),
    "fields of no model": model_of(evil=1),
    "a tensor larger than its file": huge_tensor,
    "weights of whole numbers": integer_weights,
    "nested without end": lambda folder: (folder / layout.MANIFEST).write_text("[" * 100_000) and None,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_is_refused_and_the_canary_is_not_made(folder: Path, name: str) -> None:
    HOSTILE[name](folder)
    with pytest.raises(MegalmError):
        read_everything(folder.parent)
    assert not (folder.parent.parent / "canary").exists()


@pytest.mark.parametrize("name", [LAYER, layout.model_file(0), OPTIMIZER])
def test_a_pickle_in_a_foreign_checkpoint_is_refused_or_inert(folder: Path, name: str) -> None:
    old = folder.parent.parent / "old" / "global_step7"
    torch_canary_in(old / name)
    with pytest.raises(MegalmError):
        read_everything(old.parent)
    assert not (folder.parent.parent / "canary").exists()


def torch_canary_in(path: Path) -> None:
    torch.save({"x": Canary(path.parent.parent.parent / "canary")}, path)
