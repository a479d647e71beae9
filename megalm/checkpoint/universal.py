"""DeepSpeed's universal checkpoints: a folder for each parameter, whole, so that no layout is left in them.

`zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt`, `zero/optimizer_state.pt`, `mp_rank_00_model_states.pt`; the text
file `latest_universal` beside the folder names it.
Source: DeepSpeed 0.19.8, deepspeed/checkpoint/{constants,ds_to_universal,universal_checkpoint}.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint import layout
from megalm.checkpoint.bigscience import BigScienceCheckpoint
from megalm.checkpoint.inert import read_with_stand_ins
from megalm.checkpoint.lineage import KEY as LINEAGE
from megalm.checkpoint.manifest import Manifest, read_manifest
from megalm.checkpoint.merge import LayerFiles
from megalm.checkpoint.optimizer_files import MASTER, MOMENTS, LocalState, OptimizerFiles, Pieces, StateReader
from megalm.checkpoint.roll_backs import KEY as ROLL_BACKS
from megalm.checkpoint.roll_backs import SPIKE_WATCH, parse_roll_backs, to_json
from megalm.checkpoint.tensor_files import InertState, read_tensors
from megalm.errors import CheckpointError
from megalm.models.gpt.shape import GPTShape
from megalm.models.gpt.weights import EMBEDDING_LAYER, FIRST_BLOCK_LAYER, TIED_KEY, Weight, weight_table

VERSION = 0.4
INFO_KEY = "universal_checkpoint_info"
"""Key of the engine-state files under which DeepSpeed's converter looks for `universal_info`."""
DESCRIPTION_KEY = "megalm"
"""Key of the engine-state files that says what manifest.json and train_state.json say: converters copy those files."""
ORIGIN = "universal"
_DTYPES: dict[str | None, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
PARAM, CAT_DIM, VOCABULARY = "param", "cat_dim", "vocab_tensor"


def pipeline_name(weight: Weight, shape: GPTShape) -> str:
    """What a pipeline engine calls a weight; BigScience's and Megatron-DeepSpeed's names are the same."""
    if weight.layer == EMBEDDING_LAYER and shape.tie_embeddings:
        return f"tied_modules.{TIED_KEY}.{weight.key}"
    return f"{weight.layer}.{weight.key}"


def single_stage_name(weight: Weight) -> str:
    """What the plain engine of ZeRO-2 and ZeRO-3 calls it."""
    return f"embedding.{weight.key}" if weight.layer == EMBEDDING_LAYER else weight.name


def universal_info(shape: GPTShape, *, pipelined: bool) -> dict[str, Any]:
    """What DeepSpeed's converter must know: which parameters every tensor rank has whole, and how others are cut.

    Rows of vocabulary padding take part in megalm's softmax, so they belong to the vocabulary here and are kept.
    """
    vocabulary: list[str] = []
    replicated: list[str] = []
    rows: list[str] = []
    for weight in weight_table(shape):
        pattern = _pattern(weight, shape, pipelined=pipelined)
        if weight.partition_dim is None:
            chosen = replicated
        elif weight.partition_dim == 1:
            chosen = rows
        elif weight.shape[0] == shape.vocab_rows and weight.name in ("word_embeddings.weight", "lm_head.weight"):
            chosen = vocabulary
        else:
            continue
        if pattern not in chosen:
            chosen.append(pattern)
    tied = [_pattern(weight, shape, pipelined=pipelined) for weight in weight_table(shape)[:1] if shape.tie_embeddings]
    return {
        "universal_checkpoint_version": VERSION,
        "original_vocab_size": shape.vocab_rows,
        "padded_vocab_size": shape.vocab_rows,
        "vocabulary_parameter_patterns": vocabulary,
        "pipeline_replicated_parameter_patterns": tied,
        "tp_replicated_parameter_patterns": replicated,
        "parameter_to_average_patterns": [],
        "parameter_with_row_parallelism_patterns": rows,
    }


def _pattern(weight: Weight, shape: GPTShape, *, pipelined: bool) -> str:
    """A regular expression for the parameter; the blocks have one in common."""
    name = pipeline_name(weight, shape) if pipelined else single_stage_name(weight)
    if not FIRST_BLOCK_LAYER <= weight.layer < FIRST_BLOCK_LAYER + shape.num_layers:
        return re.escape(name) + "$"
    return (r"\d+\." if pipelined else r"h\.\d+\.") + re.escape(weight.key) + "$"


def description(manifest: Manifest, train_state: dict[str, Any]) -> dict[str, Any]:
    """The value of DESCRIPTION_KEY; without what tells how the run came here, which no tensor depends on.

    Steps ahead that are to be left out stay: whoever goes on from a converter's copy has nothing else that says so.
    Raises: CheckpointError if nobody can read which they are.
    """
    own = (LINEAGE, ROLL_BACKS, SPIKE_WATCH)
    try:
        ahead = [entry for entry in parse_roll_backs(train_state.get(ROLL_BACKS)) if entry.last > manifest.step]
    except ValueError as error:
        raise CheckpointError(f"{layout.TRAIN_STATE} is damaged, {error}\n  take an earlier checkpoint") from error
    return {
        "step": manifest.step,
        "layout": dict(manifest.layout),
        "model": dict(manifest.model),
        "versions": dict(manifest.versions),
        "train_state": {
            **{name: value for name, value in train_state.items() if name not in own},
            **({ROLL_BACKS: to_json(ahead)} if ahead else {}),
        },
    }


def is_universal(folder: Path) -> bool:
    """Whether a folder is a universal checkpoint, whoever wrote it."""
    return (folder / layout.UNIVERSAL_FOLDER / layout.UNIVERSAL_OPTIMIZER).is_file()


def read_universal_manifest(folder: Path) -> tuple[Manifest, dict[str, Any] | None]:
    """The description of a universal checkpoint, and its progress where no train_state.json says it.

    megalm's own have a manifest with hashes. Those that DeepSpeed converted say in their copy of an engine-state file
    what they are: megalm's description, or the arguments of Megatron-DeepSpeed.
    Raises: CheckpointError if it is not there, or describes no model that megalm can build.
    """
    if (folder / layout.MANIFEST).exists():
        return read_manifest(folder), None
    path = folder / layout.model_file(0)
    if not path.is_file():
        path = folder / layout.sharded_model_file(dp_rank=0, mp_rank=0)  # what there is under ZeRO-3
    state = read_with_stand_ins(path, mmap=True)
    stored = state.get(DESCRIPTION_KEY) if isinstance(state, dict) else None
    if isinstance(stored, dict):
        try:
            sizes = {**stored["layout"], "origin": ORIGIN}
            model, found = dict(stored["model"]), dict(stored["versions"])
            manifest = Manifest(step=int(stored["step"]), layout=sizes, model=model, versions=found)
            progress = dict(stored["train_state"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} does not describe its checkpoint: {error}") from error
    elif isinstance(state, dict) and isinstance(state.get("args"), InertState):
        foreign = BigScienceCheckpoint(folder)
        manifest, progress = foreign.manifest(tp_size=1), dict(foreign.train_state())
    else:
        raise CheckpointError(f"{path} says neither of which model nor of which run this universal checkpoint is")
    return _with_stored_rows(manifest, folder), progress


def _with_stored_rows(manifest: Manifest, folder: Path) -> Manifest:
    """The manifest with the vocabulary rows that there are: converters may have stripped the padding."""
    for name in (f"tied_modules.{TIED_KEY}", "1", "embedding"):
        path = folder / layout.universal_file(f"{name}.word_embeddings.weight", MASTER)
        if path.is_file():
            rows = _read_param(path)
            if rows.dim() == 2:
                return replace(manifest, model={**manifest.model, "pad_vocab_size_to": rows.size(0)})
    return manifest


@dataclass
class UniversalLayers(LayerFiles):
    """The weights of a universal checkpoint, in the place of layer files of one tensor rank.

    There is fp32 alone. Where it is the master of what a run computed with, the weights are its rounding, as in the
    layer files of that run.
    """

    dtype: str | None = None
    """fp32, bf16 or fp16: what the run computed in."""

    def __post_init__(self) -> None:
        self.tp_size = 1
        has_moments = state_file(self.folder, self.shape, weight_table(self.shape)[0], MOMENTS[0]).is_file()
        self._rounded = _DTYPES.get(self.dtype) if has_moments else None

    def part(self, weight: Weight, state: dict[str, Any], rank: int) -> Tensor:
        """A weight, whole.

        Raises: CheckpointError if it is missing, or of another shape.
        """
        found = super().part(weight, state, rank)
        return found if self._rounded is None else found.to(self._rounded)

    def read_layer(self, index: int) -> list[dict[str, Any]]:
        """One layer's weights by key; tensors are read when they are touched."""
        weights = [weight for weight in weight_table(self.shape) if weight.layer == index]
        return [{weight.key: read_state(self.folder, self.shape, weight, MASTER) for weight in weights}]

    def file_of(self, weight: Weight, rank: int) -> Path:
        return state_file(self.folder, self.shape, weight, MASTER)


class UniversalOptimizer(OptimizerFiles):
    """The optimizer states of a universal checkpoint."""

    def __init__(self, layers: UniversalLayers) -> None:
        super().__init__(layers)
        self._model_ranks = [0]

    @property
    def exists(self) -> bool:
        """Whether there are moments."""
        weight = weight_table(self._layers.shape)[0]
        return state_file(self._folder, self._layers.shape, weight, MOMENTS[0]).is_file()

    def loss_scaler(self) -> dict[str, Any] | None:
        """Attributes of the fp16 loss scaler, if one was saved."""
        scaler = self._common().get("loss_scaler")
        return dict(vars(scaler)) if isinstance(scaler, InertState) else None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What each group of parameters is optimised with."""
        groups = self._common().get("param_groups")
        return [{key: value for key, value in group.items() if key != "params"} for group in groups or []]

    def _common(self) -> dict[str, Any]:
        path = self._folder / layout.UNIVERSAL_FOLDER / layout.UNIVERSAL_OPTIMIZER
        state = read_with_stand_ins(path, mmap=True) if path.is_file() else {}
        return state if isinstance(state, dict) else {}

    def _read_rank(self, mp_rank: int) -> Iterator[tuple[str, StateReader]]:
        shape = self._layers.shape

        def reader(weight: Weight) -> StateReader:
            def read() -> LocalState:
                keys = [key for key in (MASTER, *MOMENTS) if state_file(self._folder, shape, weight, key).is_file()]
                pieces = {key: Pieces((read_state(self._folder, shape, weight, key).reshape(-1),)) for key in keys}
                return LocalState(pieces, self._step(weight))

            return read

        for weight in weight_table(shape):
            yield weight.name, reader(weight)

    def _step(self, weight: Weight) -> float:
        path = state_file(self._folder, self._layers.shape, weight, "step")
        return float(read_tensors(path)) if path.is_file() else self._common_step

    @cached_property
    def _common_step(self) -> float:
        """The number of updates where no parameter has its own: ZeRO-3's converter keeps one rank's states for it."""
        common = self._common()
        if "base_optimizer_state_step" in common:
            return float(common["base_optimizer_state_step"])
        base = common.get("optimizer_state_dict")
        states = list(base["state"].values()) if isinstance(base, dict) else []
        return float(next((state["step"] for state in [*states, *self.parameter_groups()] if "step" in state), 0))


def state_file(folder: Path, shape: GPTShape, weight: Weight, key: str) -> Path:
    """Where one state of a weight lies, by whichever name a trainer has for it; need not exist."""
    names = (pipeline_name(weight, shape), f"{weight.layer}.{weight.key}", single_stage_name(weight), weight.name)
    for name in names:
        path = folder / layout.universal_file(name, key)
        if path.parent.is_dir():
            return path
    return folder / layout.universal_file(names[0], key)


def read_state(folder: Path, shape: GPTShape, weight: Weight, key: str) -> Tensor:
    """One state of a weight, whole.

    Raises: CheckpointError if it is missing, or not of the model's shape.
    """
    path = state_file(folder, shape, weight, key)
    tensor = _read_param(path)
    if tensor.dim() == 1 and tensor.numel() == weight.numel:  # as ZeRO-3's are converted
        tensor = tensor.view(weight.shape)
    if tuple(tensor.shape) != weight.shape or not tensor.is_floating_point():
        raise CheckpointError(
            f"{path} holds {tensor.dtype} of shape {list(tensor.shape)}, and {weight.name} of this model is "
            f"{list(weight.shape)}"
        )
    return tensor


def _read_param(path: Path) -> Tensor:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing from the universal checkpoint")
    stored = read_tensors(path, mmap=True)
    tensor = stored.get(PARAM) if isinstance(stored, dict) else stored
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{path} holds no parameter")
    return tensor
