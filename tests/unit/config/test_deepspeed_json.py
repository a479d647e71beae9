from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalm.config.checks import check
from megalm.config.deepspeed_json import NEVER, deepspeed_json
from megalm.config.root import Config
from megalm.errors import ConfigError
from tests.unit.config.arguments import smallest


def with_file(folder: Path, content: dict[str, Any], *more: str, without: tuple[str, ...] = ()) -> Config:
    path = folder / "ds.json"
    path.write_text(json.dumps(content))
    return smallest("--deepspeed_config", str(path), *more, without=without)


def test_batch_is_the_final_global_batch() -> None:
    built = deepspeed_json(smallest("--global-batch-size", "24"), dp_size=3)
    assert built["train_batch_size"] == 24
    assert built["train_micro_batch_size_per_gpu"] == 2
    assert built["gradient_accumulation_steps"] == 4
    assert deepspeed_json(smallest(), dp_size=3)["train_batch_size"] == 6


@pytest.mark.parametrize("stage, expected", [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_bf16_keeps_fp32_masters_and_gradients(stage: int, expected: int) -> None:
    built = deepspeed_json(smallest("--bf16", "--zero-stage", str(stage)), dp_size=1)
    assert built["bf16"] == {"enabled": True, "immediate_grad_update": True}
    assert built["data_types"] == {"grad_accum_dtype": "fp32"}
    assert built["zero_optimization"]["stage"] == expected


def test_fp16_scale_is_dynamic_unless_fixed() -> None:
    built = deepspeed_json(smallest("--fp16", "--initial-loss-scale", "4096"), dp_size=1)
    assert built["fp16"] == {
        "enabled": True, "loss_scale": 0, "initial_scale_power": 12, "loss_scale_window": 1000, "hysteresis": 2,
        "min_loss_scale": 1.0,
    }  # fmt: skip
    assert deepspeed_json(smallest("--fp16", "--loss-scale", "8"), dp_size=1)["fp16"]["loss_scale"] == 8
    assert "fp16" not in deepspeed_json(smallest(), dp_size=1)


def test_file_sets_what_flags_left_open_and_passes_on_the_rest(tmp_path: Path) -> None:
    content = {
        "train_batch_size": 16,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000},
        "bf16": {"enabled": "auto"},
        "steps_per_print": 7,
        "gradient_accumulation_steps": "auto",
    }
    config = with_file(tmp_path, content)
    assert (config.training.global_batch_size, config.training.clip_grad, config.parallel.zero_stage) == (16, 0.5, 1)
    assert config.source("training.global_batch_size") == f"{tmp_path}/ds.json: train_batch_size"
    built = deepspeed_json(config, dp_size=1)
    assert built["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 1000}
    assert (built["steps_per_print"], built["gradient_accumulation_steps"]) == (7, 8)
    assert "bf16" not in built


def test_file_that_contradicts_a_flag_is_refused_and_both_are_named(tmp_path: Path) -> None:
    content = {"train_batch_size": 16, "fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    with pytest.raises(ConfigError) as raised:
        with_file(tmp_path, content, "--global-batch-size", "8", "--bf16", "--zero-stage", "1")
    message = str(raised.value)
    assert "training.global_batch_size = 8 contradicts 16" in message
    assert f"set by --global-batch-size; the other in {tmp_path}/ds.json: train_batch_size" in message
    assert "training.dtype = bf16 contradicts fp16" in message
    assert message.startswith("2 settings")


def test_dtype_that_the_file_switches_off_is_a_contradiction(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="training.dtype = bf16 contradicts bf16.enabled = false"):
        with_file(tmp_path, {"bf16": {"enabled": False}}, "--bf16")
    assert with_file(tmp_path, {"bf16": {"enabled": False}, "fp16": {"enabled": False}}).training.dtype == "fp32"


@pytest.mark.parametrize(
    "content, expected",
    [
        ({"optimizer": {"type": "Adam"}}, "optimizer in a DeepSpeed configuration: the optimizer is set by --lr"),
        ({"pipeline": {"pipe_partitioned": True}}, "pipeline in a DeepSpeed configuration"),
        ({"train_batchsize": 4}, "nearest: train_batch_size"),
        ({"train_batch_size": "many"}, "expected an integer"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "fp16 and bf16 are both enabled"),
        ({"bf16": True}, "bf16 = True must be a block of keys"),
        ({"bf16": {"enabled": "true"}}, "bf16.enabled = 'true' is neither true nor false"),
        ({"zero_optimization": 1}, "zero_optimization = 1 must be a block of keys"),
        ({"zero_optimization": {"round_robin_gradients": True}}, "checkpoints that load wrong at another layout"),
        ({"fp16": {"initial_scale_power": 5000}}, "initial_scale_power = 5000: expected a power of two from 0 to 127"),
        ({"steps_per_print": 0}, "steps_per_print = 0 must be a whole number greater than 0"),
        ({"gradient_accumulation_steps": "4"}, "gradient_accumulation_steps = '4' must be a whole number"),
        ({"comms_logger": {"enabled": True}}, "comms_logger would miss the messages of tensor parallelism"),
        ({"flops_profiler": {"enabled": True}}, "flops_profiler prints nothing under ZeRO-0"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "needs parallel.zero_stage = 2 or more, not 0"),
    ],
)
def test_key_that_cannot_be_obeyed_is_refused(tmp_path: Path, content: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        with_file(tmp_path, content)
    assert expected in str(raised.value)


def test_instruments_that_are_off_or_work_are_accepted(tmp_path: Path) -> None:
    off = {"comms_logger": {"enabled": False}, "flops_profiler": {"enabled": False}}
    assert with_file(tmp_path, off).deepspeed == off
    on = {"flops_profiler": {"enabled": True}}
    assert with_file(tmp_path, on, "--zero-stage", "2").deepspeed == on
    timed = deepspeed_json(with_file(tmp_path, {"wall_clock_breakdown": True}), dp_size=1)
    assert timed["steps_per_print"] == 10
    assert deepspeed_json(smallest(), dp_size=1)["steps_per_print"] == NEVER


def test_refused_blocks_that_ask_for_nothing_are_accepted(tmp_path: Path) -> None:
    off = {"curriculum_learning": {"enabled": False, "curriculum_type": "seqlen"}, "tensorboard": {"enabled": False}}
    assert with_file(tmp_path, off) == smallest()
    sums = {"data_types": {"grad_accum_dtype": "fp32"}}
    assert with_file(tmp_path, sums, "--bf16") == smallest("--bf16")
    for content, more in (
        (sums | {"fp16": {"enabled": True}}, ()),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ("--bf16",)),
        ({"curriculum_learning": {"enabled": True}}, ()),
    ):
        with pytest.raises(ConfigError, match="in a DeepSpeed configuration"):
            with_file(tmp_path, content, *more)


def test_guards_of_16_bit_sums_are_refused_where_zero_lacks_them(tmp_path: Path) -> None:
    for content in ({"prescale_gradients": True}, {"gradient_predivide_factor": 2.0}):
        for stage in ("2", "3"):
            with pytest.raises(ConfigError, match=f"cannot be combined with ZeRO-{stage}"):
                with_file(tmp_path, content, "--zero-stage", stage)
        reducing = {**content, "zero_optimization": {"reduce_scatter": False}}
        assert with_file(tmp_path, reducing, "--zero-stage", "2").deepspeed == reducing
        assert with_file(tmp_path, content, "--zero-stage", "1").deepspeed == content


def test_guards_of_16_bit_sums_are_refused_where_sums_are_fp32(tmp_path: Path) -> None:
    for content in ({"prescale_gradients": True}, {"gradient_predivide_factor": 2.0}):
        with pytest.raises(ConfigError, match="bf16 gradients are summed in fp32"):
            with_file(tmp_path, content, "--bf16")
        narrow = {**content, "communication_data_type": "bf16"}
        assert with_file(tmp_path, narrow, "--bf16").deepspeed == narrow


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "twice.json").write_text('{"gradient_clipping": 1.0, "gradient_clipping": 0.5}')
    with pytest.raises(ConfigError, match="'gradient_clipping' stands twice in one block"):
        smallest("--deepspeed_config", str(tmp_path / "twice.json"))


def test_a_fixed_loss_scale_beside_a_dynamic_one_of_the_json_names_the_one_to_remove(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0, which is dynamic(.|\n)*remove --loss-scale"):
        with_file(tmp_path, {"fp16": {"enabled": True, "loss_scale": 0}}, "--fp16", "--loss-scale", "12")


def test_file_that_is_missing_or_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the DeepSpeed JSON \S+: No such file or directory\n"):
        smallest("--deepspeed_config", str(tmp_path / "absent.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read the DeepSpeed JSON"):
        smallest("--deepspeed_config", str(tmp_path / "broken.json"))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="must be a mapping"):
        smallest("--deepspeed_config", str(tmp_path / "list.json"))


@pytest.mark.parametrize(
    "key, value, least",
    [
        ("offload_optimizer", {"device": "cpu"}, 2),
        ("offload_param", {"device": "nvme", "nvme_path": "/scratch"}, 3),
        ("cpu_offload", True, 2),
    ],
)
def test_offload_that_the_stage_would_ignore_is_refused(tmp_path: Path, key: str, value: Any, least: int) -> None:
    content = {"zero_optimization": {key: value}}
    with pytest.raises(ConfigError, match=f"{key} needs parallel.zero_stage = {least} or more, not {least - 1}"):
        with_file(tmp_path, content, "--zero-stage", str(least - 1))
    assert with_file(tmp_path, content, "--zero-stage", str(least)).deepspeed == content
    with_file(tmp_path, {"zero_optimization": {key: {"device": "none"}}})


def test_gradient_accumulation_in_the_file_must_be_the_derived_one(tmp_path: Path) -> None:
    config = with_file(tmp_path, {"train_batch_size": 16, "gradient_accumulation_steps": 4})
    check(config, world_size=2, device_type="cpu", vocab_size=None)
    with pytest.raises(ConfigError, match="gradient_accumulation_steps = 4 is not .* = 8"):
        check(config, world_size=1, device_type="cpu", vocab_size=None)


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("--bf16",), ("--fp16", "--zero-stage", "2"), ("--bf16", "--zero-stage", "3")])
def test_deepspeed_accepts_what_is_built(words: tuple[str, ...]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    read = DeepSpeedConfig(deepspeed_json(smallest(*words, "--global-batch-size", "8"), dp_size=1))
    assert (read.train_batch_size, read.gradient_accumulation_steps) == (8, 4)
    assert read.bfloat16_config.enabled == ("--bf16" in words)
    assert read.float16_config.enabled == ("--fp16" in words)
    assert read.pipeline["pipe_partitioned"] is False
