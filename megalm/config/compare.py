"""What changed between the configuration of a checkpoint and that of the run that loads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megalm.config.checks_layout import padded_vocab_size
from megalm.config.root import Config

MODEL_PATHS = (
    "model.num_layers", "model.hidden_size", "model.num_heads", "model.position_embedding", "model.embed_layernorm",
    "model.activation", "model.glu_activation", "model.tie_embeddings", "model.layernorm_epsilon",
)  # fmt: skip
SCHEDULE_PATHS = (
    "training.lr", "training.min_lr", "training.lr_decay_style", "training.lr_decay_iters", "training.lr_decay_samples",
    "training.lr_warmup_fraction", "training.lr_warmup_iters", "training.lr_warmup_samples",
)  # fmt: skip
ORDER_PATHS = (
    "data.data_path", "data.train_weighted_split_paths", "data.split", "data.seq_length", "data.sample_order",
    "training.seed", "training.train_iters", "training.train_samples", "training.global_batch_size",
    "training.micro_batch_size", "training.rampup_batch_size",
)  # fmt: skip
OF_ONE_START = ("output.load", "training.eval_only")
"""What says how one start goes on, and nothing of the run."""
DERIVED_PATHS = ("model.ffn_hidden_size", "model.max_position_embeddings", "model.pad_vocab_size_to")


STANDS_FOR = {
    "training.lr_decay_iters": "training.train_iters",
    "training.lr_decay_samples": "training.train_samples",
    "model.max_position_embeddings": "data.seq_length",
}
"""What decides a size where it is not given."""


@dataclass(frozen=True)
class Difference:
    """One value that differs. `changes_model`: the stored weights do not fit, or mean something else, in this model."""

    path: str
    stored: Any
    current: Any
    source: str
    changes_model: bool

    @property
    def changes_schedule(self) -> bool:
        """Whether the learning rate follows another course from here on."""
        return self.path in SCHEDULE_PATHS

    @property
    def changes_order(self) -> bool:
        """Whether the order of samples may depend on it."""
        return self.path in ORDER_PATHS

    def __str__(self) -> str:
        return f"{self.path}: {self.stored} in the checkpoint, {self.current} now ({self.source})"


def differences(stored: Config, current: Config) -> list[Difference]:
    """Every path whose value differs; sizes that are derived when not given are compared as derived."""
    found = []
    stored_values, current_values = _effective(stored), _effective(current)
    for path, was in stored_values.items():
        now = current_values[path]
        if was == now or path in OF_ONE_START:
            continue
        unknown_vocab = path == "model.pad_vocab_size_to" and None in (was, now)
        changes_model = path in MODEL_PATHS or (path in DERIVED_PATHS and not unknown_vocab)
        decides = path if current.get(path) is not None else STANDS_FOR.get(path, path)
        found.append(Difference(path, was, now, current.source(decides), changes_model))
    return found


def _effective(config: Config) -> dict[str, Any]:
    values = config.values()
    # The decay lasts as long as the training when it is not given, so that a longer run has another schedule.
    training = config.training
    values["training.lr_decay_iters"] = training.lr_decay_iters or training.train_iters
    values["training.lr_decay_samples"] = training.lr_decay_samples or training.train_samples
    if training.lr_decay_style == "constant" and training.lr_warmup_fraction is None:
        unused = ("training.lr_decay_iters", "training.lr_decay_samples", "training.min_lr")
        values.update(dict.fromkeys(unused))
    values["model.ffn_hidden_size"] = config.model.ffn_size
    values["model.pad_vocab_size_to"] = padded_vocab_size(config, None)
    learned = config.model.position_embedding == "learned"
    rows = config.model.max_position_embeddings or config.data.seq_length
    values["model.max_position_embeddings"] = rows if learned else None
    return values
