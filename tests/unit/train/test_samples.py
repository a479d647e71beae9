from __future__ import annotations

from dataclasses import replace

from megalm.train.samples import sample_counts, samples_of_steps
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
