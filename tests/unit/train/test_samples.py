from __future__ import annotations

from dataclasses import replace

from megalm.train.samples import sample_counts, samples_of_steps
from megalm.train.schedule import BatchSize
from tests.support.checkpoints import bloom_config


def test_steps_of_a_ramped_run_consume_every_sample_once() -> None:
    config = bloom_config()
    training = replace(
        config.training, micro_batch_size=2, global_batch_size=8, rampup_batch_size=(2, 2, 30), train_iters=40
    )
    steps = list(samples_of_steps(replace(config, training=training), 1, 40, dp_size=1))
    assert [number for _, numbers in steps for number in numbers] == list(range(steps[-1][1].stop))
    assert [len(numbers) for _, numbers in steps[:3]] == [2, 2, 2]
    assert len(steps[-1][1]) == 8
    assert list(samples_of_steps(replace(config, training=training), 17, 18, dp_size=1)) == steps[16:18]
    assert sample_counts(replace(config, training=training), dp_size=1)["train"] == steps[-1][1].stop


def test_steps_left_are_of_the_present_batch_whatever_the_run_had_before() -> None:
    training = replace(bloom_config().training, train_iters=None, train_samples=68)
    larger, smaller = (BatchSize(final=size, start=size, increment=0, ramp_samples=0) for size in (4, 1))
    assert larger.steps_of(training, step=8, consumed=16) == 13
    assert smaller.steps_of(training, step=8, consumed=16) == 52
    assert larger.steps_of(training, step=99, consumed=70) == 0
    counted = replace(training, train_iters=20, train_samples=None)
    assert larger.steps_of(counted, step=8, consumed=16) == 12
    assert larger.steps_of(counted, step=21, consumed=16) == 0
