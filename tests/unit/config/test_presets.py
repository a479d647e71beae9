from __future__ import annotations

from pathlib import Path

import pytest

from megalm.config.checks import check
from megalm.config.model import ModelConfig
from megalm.config.parse import parse_command_line
from megalm.config.root import Config

ROOT = Path(__file__).resolve().parents[3]
PRESETS = sorted((ROOT / "configs").rglob("*.yaml"))
BLOOM = {
    "560m": 559_214_592,
    "1b1": 1_065_314_304,
    "1b7": 1_722_408_960,
    "3b": 3_002_557_440,
    "7b1": 7_069_016_064,
    "176b": 176_247_271_424,
}
# With GPT-2's 50,257 tokens and no padding: 125m, 350m, 774m and 1b5 are the published counts of GPT-2's four sizes.
GPTMEG = {
    "125m": 124_439_808,
    "350m": 354_823_168,
    "774m": 774_030_080,
    "1b3": 1_313_626_112,
    "1b5": 1_557_611_200,
    "2b7": 2_648_931_840,
    "6b7": 6_654_210_048,
}


def load(path: Path) -> Config:
    """A preset with the least that a command line must add to it."""
    words = ["--config", str(path), "--data-path", "corpus", "--tokenizer-name-or-path", "tokenizer"]
    has_length = "train_samples" in path.read_text()
    return parse_command_line(words if has_length else [*words, "--train-iters", "100"])


def num_parameters(model: ModelConfig, *, seq_length: int, rows: int) -> int:
    """Parameters of a tied GPT, written out from its layers' shapes."""
    h, f = model.hidden_size, model.ffn_size
    norm = 2 * h
    attention = (3 * h * h + 3 * h) + (h * h + h)
    mlp = (h * f + f) + (f * h + h)
    positions = (model.max_position_embeddings or seq_length) * h if model.position_embedding == "learned" else 0
    embedding = rows * h + positions + (norm if model.embed_layernorm else 0)
    return embedding + model.num_layers * (attention + mlp + 2 * norm) + norm


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: str(path.relative_to(ROOT)))
def test_preset_loads_through_the_command_line_and_passes_every_check(path: Path) -> None:
    config = load(path)
    world_size = max(config.parallel.tp * config.parallel.pp, 384 if "384" in path.name else 1)
    check(config, world_size=world_size, device_type="cuda", vocab_size=4096)


@pytest.mark.parametrize("size", BLOOM)
def test_bloom_preset_has_the_published_parameter_count(size: str) -> None:
    config = load(ROOT / f"configs/bloom/{size}.yaml")
    model = config.model
    assert num_parameters(model, seq_length=config.data.seq_length, rows=model.padded_vocab_size) == BLOOM[size]
    assert (model.position_embedding, model.embed_layernorm, model.tie_embeddings) == ("alibi", True, True)
    assert (model.activation, model.layernorm_epsilon) == ("gelu_tanh", 1e-5)
    assert f"{BLOOM[size]:,}" in (ROOT / f"configs/bloom/{size}.yaml").read_text()


@pytest.mark.parametrize("size", GPTMEG)
def test_gptmeg_preset_has_the_parameter_count_of_its_shape(size: str) -> None:
    config = load(ROOT / f"configs/gptmeg/{size}.yaml")
    assert num_parameters(config.model, seq_length=config.data.seq_length, rows=50_257) == GPTMEG[size]
    assert (config.model.position_embedding, config.model.embed_layernorm) == ("learned", False)


def test_every_size_is_counted() -> None:
    published = {path.stem for path in (ROOT / "configs/bloom").iterdir()} - {"quickstart"}
    assert published == set(BLOOM)
    assert {path.stem for path in (ROOT / "configs/gptmeg").iterdir()} == {*GPTMEG, "tiny"}


def test_bloom_176b_cluster_preset_is_the_layout_it_was_trained_with() -> None:
    config = load(ROOT / "configs/cluster/bloom-176b-384xa100.yaml")
    assert (config.parallel.tp, config.parallel.pp, config.parallel.zero_stage) == (4, 12, 1)
    assert config.parallel.pipeline_partition == "type:transformer|embedding"
    assert (config.training.rampup_batch_size, config.training.global_batch_size) == ((192, 16, 9_765_625), 2048)
    assert config.source("model.num_layers").endswith("bloom/176b.yaml:4")
    assert config.source("model.position_embedding").endswith("bloom/560m.yaml:7")
