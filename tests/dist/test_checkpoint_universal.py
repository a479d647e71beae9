"""DeepSpeed's universal checkpoints, both ways, with DeepSpeed's own loader and converter on the other side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.checkpoint import layout
from megalm.checkpoint.find import find_checkpoint
from megalm.checkpoint.reshape import reshape_checkpoint
from megalm.checkpoint.universal_writer import write_universal
from tests.dist.test_checkpoint_layouts import consolidated, load_and_save_again, train_and_save
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist


@pytest.fixture(autouse=True)
def _some_with_full_alone(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("slow") and not request.config.getoption("--full"):
        pytest.skip("seconds each: run with --full")


def options_of(*, tp: int = 1, pp: int = 1, zero_stage: int = 1, dtype: str = "bf16") -> dict[str, Any]:
    sizes = {"tp": tp, "pp": pp, "zero_stage": zero_stage, "dtype": dtype}
    return {**sizes, "hidden_dropout": 0.0, "attention_dropout": 0.0}


@pytest.fixture(scope="module")
def bf16_tp2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run's folder, and its losses after the checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    return folder, run_ranks(train_and_save, 2, str(folder), options_of(tp=2))[0]


def load_by_deepspeed(folder: str, options: dict[str, Any], target: str) -> list[str]:
    """Stock DeepSpeed loads a universal folder; then megalm saves, and two steps are trained."""
    from megalm.checkpoint.save import save_checkpoint
    from tests.support.training import TinyRun, tiny_config

    config = tiny_config(**options)
    run = TinyRun(config)
    raw = run.engine.raw
    raw._config.load_universal_checkpoint = True
    path, _ = raw.load_checkpoint(folder)
    assert path is not None
    assert raw.global_steps == 3
    save_checkpoint(raw, target, {"step": 3, "consumed_samples": 12}, config=config, topology=run.topology)
    return run.train(3, 5)


def convert_by_deepspeed(source: Path, target: Path) -> None:
    """What `python -m deepspeed.checkpoint.ds_to_universal` does."""
    from deepspeed.checkpoint.ds_to_universal import main

    flags = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    files = {"input_folder": str(source), "output_folder": str(target)}
    main(argparse.Namespace(**files, **flags, inject_missing_state=False))


def assert_equal(first: Path, second: Path) -> None:
    ours, theirs = consolidated(first), consolidated(second)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def assert_same_layer_files(back: Path, native: Path) -> None:
    assert_equal(back, native)
    for path in native.glob("layer_*"):
        ours, theirs = (torch.load(folder / path.name) for folder in (back, native))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)


def check_loaded_by_deepspeed(
    tmp_path: Path, run: Path, losses: list[str], world_size: int, options: dict[str, Any]
) -> None:
    native = run / "global_step3"
    universal = write_universal(native, tmp_path / "universal")
    assert (tmp_path / "universal" / layout.LATEST_UNIVERSAL).read_text() == "global_step3"
    assert_equal(universal, native)
    arguments = (str(tmp_path / "universal"), options, str(tmp_path / "loaded"))
    continued = run_ranks(load_by_deepspeed, world_size, *arguments)[0]
    assert_equal(tmp_path / "loaded" / "global_step3", native)
    # The same sums in another order; bf16 rounds to 8 bits.
    tolerance = 2e-2 if options["dtype"] == "bf16" else 1e-5
    for ours, theirs in zip(losses, continued, strict=True):
        assert float.fromhex(theirs) == pytest.approx(float.fromhex(ours), rel=tolerance)


def check_converted_by_deepspeed(tmp_path: Path, run: Path, options: dict[str, Any]) -> None:
    native = run / "global_step3"
    convert_by_deepspeed(native, tmp_path / "universal" / "global_step3_universal")
    found = find_checkpoint(tmp_path / "universal", warn=str)
    assert found.name == "global_step3_universal"
    assert_equal(found, native)
    pairs = [(str(tmp_path / "universal"), str(tmp_path / "loaded"))]
    run_ranks(load_and_save_again, 2, pairs, options)
    loaded = tmp_path / "loaded" / "global_step3"
    assert_equal(loaded, native)
    states = [json.loads((folder / layout.TRAIN_STATE).read_text()) for folder in (native, loaded)]
    assert states[0] == states[1] == {"step": 3, "consumed_samples": 12}


def test_stock_deepspeed_loads_what_megalm_wrote(tmp_path: Path, bf16_tp2: tuple[Path, list[str]]) -> None:
    check_loaded_by_deepspeed(tmp_path, *bf16_tp2, 2, options_of(pp=2))


def test_what_deepspeed_converted_loads_at_another_layout(tmp_path: Path, bf16_tp2: tuple[Path, list[str]]) -> None:
    check_converted_by_deepspeed(tmp_path, bf16_tp2[0], options_of(pp=2))


def test_a_universal_folder_converts_back(tmp_path: Path, bf16_tp2: tuple[Path, list[str]]) -> None:
    native = bf16_tp2[0] / "global_step3"
    universal = write_universal(native, tmp_path / "universal")
    back = reshape_checkpoint(universal, tmp_path / "back", tp_size=2, pp_size=2)
    assert_equal(back, native)
    for path in native.glob("layer_*"):
        ours, theirs = (torch.load(folder / path.name) for folder in (back, native))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)


@pytest.mark.slow
def test_stock_deepspeed_loads_fp32_without_zero_into_zero_1_at_tp2(tmp_path: Path) -> None:
    losses = run_ranks(train_and_save, 1, str(tmp_path / "run"), options_of(zero_stage=0, dtype="fp32"))[0]
    check_loaded_by_deepspeed(tmp_path, tmp_path / "run", losses, 2, options_of(tp=2, dtype="fp32"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "world_size, sizes",
    [
        pytest.param(4, {"tp": 2, "pp": 2}, id="bf16-tp2-pp2"),
        pytest.param(2, {"zero_stage": 2, "dtype": "fp32"}, id="fp32-zero2-dp2"),
        pytest.param(2, {"zero_stage": 3, "dtype": "fp32"}, id="fp32-zero3-dp2"),
    ],
)
def test_deepspeed_converts_every_engine(tmp_path: Path, world_size: int, sizes: dict[str, Any]) -> None:
    run_ranks(train_and_save, world_size, str(tmp_path / "run"), options_of(**sizes))
    check_converted_by_deepspeed(tmp_path, tmp_path / "run", options_of(pp=2, dtype=options_of(**sizes)["dtype"]))
