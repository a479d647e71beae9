from __future__ import annotations

from megalm.config.compare import differences
from tests.unit.config.arguments import smallest


def test_equal_configurations_differ_in_nothing() -> None:
    assert differences(smallest(), smallest()) == []
    assert differences(smallest(), smallest("--load", "checkpoints", "--eval-only", "--split", "9,1,0")) != []
    assert differences(smallest(), smallest("--load", "checkpoints", "--eval-only")) == []


def test_shape_changes_the_model_and_learning_rate_does_not() -> None:
    found = {one.path: one for one in differences(smallest(), smallest("--num-layers", "6", "--lr", "1e-4"))}
    assert set(found) == {"model.num_layers", "training.lr"}
    assert found["model.num_layers"].changes_model
    assert not found["training.lr"].changes_model
    assert str(found["model.num_layers"]) == "model.num_layers: 4 in the checkpoint, 6 now (--num-layers)"


def test_size_written_out_equals_the_size_derived() -> None:
    assert differences(smallest(), smallest("--ffn-hidden-size", "256", "--max-position-embeddings", "32")) == []
    alibi = ("--position-embedding-type", "alibi")
    assert differences(smallest(*alibi), smallest(*alibi, "--max-position-embeddings", "64")) == []


def test_embedding_rows_count_not_the_tokens_before_padding() -> None:
    found = differences(smallest("--vocab-size", "500"), smallest("--vocab-size", "510"))
    assert [(one.path, one.changes_model) for one in found] == [("model.vocab_size", False)]
    found = differences(smallest("--vocab-size", "500"), smallest("--vocab-size", "513"))
    assert [one.path for one in found if one.changes_model] == ["model.pad_vocab_size_to"]


def test_vocabulary_that_only_one_side_knows_does_not_count_as_another_model() -> None:
    found = differences(smallest().with_vocab_size(500), smallest())
    assert not any(one.changes_model for one in found)


def test_longer_run_without_its_own_decay_has_another_schedule() -> None:
    found = differences(smallest(), smallest("--train-iters", "20"))
    assert [str(one) for one in found if one.changes_schedule] == [
        "training.lr_decay_iters: 10 in the checkpoint, 20 now (--train-iters)"
    ]
    found = differences(smallest("--lr-decay-iters", "8"), smallest("--lr-decay-iters", "8", "--train-iters", "20"))
    assert [(one.path, one.changes_schedule) for one in found] == [("training.train_iters", False)]


def test_constant_rate_has_no_decay_to_differ_in() -> None:
    constant = ("--lr-decay-style", "constant")
    longer = smallest(*constant, "--train-iters", "20", "--min-lr", "1e-6")
    assert [one.path for one in differences(smallest(*constant), longer)] == ["training.train_iters"]
    part = (*constant, "--lr-warmup-fraction", "0.5")
    found = differences(smallest(*part), smallest(*part, "--train-iters", "20"))
    assert [one.path for one in found if one.changes_schedule] == ["training.lr_decay_iters"]
