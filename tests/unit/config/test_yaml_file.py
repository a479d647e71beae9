from __future__ import annotations

from pathlib import Path

import pytest

from megalm.config.parse import parse_command_line
from megalm.config.root import option_table
from megalm.config.settings import Settings
from megalm.config.yaml_file import config_from_yaml, config_to_yaml, load_file
from megalm.errors import ConfigError
from tests.support import launch_lines
from tests.unit.config.arguments import smallest


def failures_of(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    settings = Settings()
    load_file(str(path), settings)
    return [str(failure).replace(f"{tmp_path}/", "") for failure in settings.failures]


def test_dump_loads_back_equal_and_names_where_values_came_from(tmp_path: Path) -> None:
    launch_lines.write_files(tmp_path)
    for line in (launch_lines.BLOOM_176B, launch_lines.GPT_13B_FP16, launch_lines.TINY_BY_ITERATIONS):
        config = parse_command_line(launch_lines.words(line, tmp_path))
        text = config_to_yaml(config)
        assert config_from_yaml(text) == config
        assert "  tp: 4  # --tensor-model-parallel-size" in text or line != launch_lines.BLOOM_176B
        assert all(f"  {path.partition('.')[2]}:" in text for path in option_table())


@pytest.mark.parametrize(
    "word", ["output.save=/a: b # c", "output.save=[x]", "output.save='q'", "output.save=\u00e9\n", "training.lr=1e-07"]
)
def test_dump_keeps_awkward_values(word: str) -> None:
    config = smallest(word)
    assert config_from_yaml(config_to_yaml(config)) == config


def test_dump_loads_as_a_preset(tmp_path: Path) -> None:
    config = smallest("--seed", "5")
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    again = parse_command_line(["--config", str(tmp_path / "config.yaml")])
    assert again == config
    assert again.source("training.seed").startswith(f"{tmp_path}/config.yaml:")


def test_stored_configuration_that_lacks_a_required_field_is_refused() -> None:
    with pytest.raises(ConfigError, match="model.hidden_size is not set"):
        config_from_yaml("model:\n  num_layers: 2\n  num_heads: 2\n")


def test_base_is_relative_to_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "root.yaml").write_text("training: {lr: 1e-3, seed: 1}\n")
    (tmp_path / "deep" / "mid.yaml").write_text("base: ../root.yaml\ntraining:\n  seed: 2\n")
    (tmp_path / "run.yaml").write_text("training.clip_grad: 0.5\nbase: [deep/mid.yaml]\n")
    settings = Settings()
    load_file(str(tmp_path / "run.yaml"), settings)
    assert settings.failures == []
    assert settings.values == {"training.lr": 1e-3, "training.seed": 2, "training.clip_grad": 0.5}
    assert settings.source("training.seed") == f"{tmp_path}/deep/mid.yaml:3"
    assert settings.source("training.clip_grad") == f"{tmp_path}/run.yaml:1"


def test_each_mistake_in_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    text = "model:\n  num_layer: 2\n  num_heads: two\ntraining:\n  lr: true\n  seed: 1\n  seed: 2\n"
    text += "shape:\n  x: 1\nbase: 3\n"
    found = failures_of(tmp_path, text)
    assert any(
        "model.num_layer is not a setting" in one and "run.yaml:2" in one and "num_layers" in one for one in found
    )
    assert any("model.num_heads = 'two'" in one and "run.yaml:3" in one for one in found)
    assert any("training.lr = True: expected a finite number" in one and "run.yaml:5" in one for one in found)
    assert any("seed is set twice" in one and "run.yaml:6 and run.yaml:7" in one for one in found)
    assert any("shape is not a setting" in one and "run.yaml:8" in one for one in found)
    assert any("base = 3 must be a path" in one for one in found)
    assert len(found) == 6


def test_file_that_is_not_yaml_or_not_sections_is_refused(tmp_path: Path) -> None:
    assert "is not YAML" in failures_of(tmp_path, "model: [1,\n")[0]
    assert "must hold sections" in failures_of(tmp_path, "- 1\n")[0]
    assert "model must be a section" in failures_of(tmp_path, "model: 3\n")[0]
    assert failures_of(tmp_path, "") == []
    assert failures_of(tmp_path, "model:\n") == []


def test_base_that_leads_back_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: run.yaml\n")
    assert "is a base of itself" in failures_of(tmp_path, "base: a.yaml\n")[0]


def test_missing_base_is_refused(tmp_path: Path) -> None:
    assert "cannot read the configuration" in failures_of(tmp_path, "base: nowhere.yaml\n")[0]
