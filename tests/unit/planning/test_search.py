"""The layouts that a search finds."""

from __future__ import annotations

from megalm.config.model import ModelConfig
from megalm.planning.gpus import GPUS
from megalm.planning.job import Job
from megalm.planning.search import plans
from megalm.topology.layout import Layout

A100 = GPUS["a100-80gb"]


def bloom_176b() -> Job:
    model = ModelConfig(
        num_layers=70, hidden_size=14_336, num_heads=112, position_embedding="alibi", pad_vocab_size_to=250_880
    )
    return Job(model, 2048, 2048)


def test_plans_fit_use_all_gpus_and_come_by_their_time() -> None:
    found = plans(bloom_176b(), A100, num_gpus=384, gpus_per_host=8)
    assert Layout(tp=4, pp=12, dp=8) in [plan.spreading.layout for plan in found]
    assert all(plan.fits(A100) for plan in found)
    assert {plan.spreading.layout.world_size for plan in found} == {384}
    assert {plan.spreading.layout.tp for plan in found} <= {1, 2, 4, 8}
    times = [plan.parts.total for plan in found]
    assert times == sorted(times)
    assert len({plan.spreading.layout for plan in found}) == len(found)


def test_a_model_that_is_too_large_has_no_plan() -> None:
    assert plans(bloom_176b(), A100, num_gpus=8, gpus_per_host=8) == []


def test_a_batch_that_replicas_cannot_share_is_left_out() -> None:
    model = ModelConfig(num_layers=4, hidden_size=512, num_heads=8, pad_vocab_size_to=1024)
    found = plans(Job(model, 512, 6), A100, num_gpus=4, gpus_per_host=4)
    assert {plan.spreading.layout.dp for plan in found} == {1, 2}


def test_of_two_that_take_as_long_the_one_with_less_memory_is_found() -> None:
    model = ModelConfig(num_layers=24, hidden_size=2048, num_heads=16, pad_vocab_size_to=250_880)
    (plan,) = plans(Job(model, 2048, 64), GPUS["h100"], num_gpus=1, gpus_per_host=1)
    assert (plan.spreading.micro_batch_size, plan.spreading.recompute) == (1, "none")
