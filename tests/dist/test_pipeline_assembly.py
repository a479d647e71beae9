"""The pipeline is the same model as `GPT`, cut where it should be and stored under the names it should have."""

from __future__ import annotations

import pytest

from megalm.models.gpt.plan import DocumentRules
from megalm.models.gpt.shape import gpt_shape
from megalm.models.gpt.weights import weight_table
from tests.dist.pipeline_cases import (
    PARTITION,
    Comparison,
    Stage,
    compare_with_model,
    describe_stage,
    train_fused,
    train_with_documents,
)
from tests.support.ranks import run_ranks
from tests.unit.models import small

pytestmark = pytest.mark.dist

DOCUMENTS = DocumentRules(eod_id=3, reset_positions=True, reset_attention=True)
CASES = {
    "bloom": (small.bloom(), None),
    "gpt2": (small.gpt2(), None),
    "untied": (small.gpt2(tie_embeddings=False), None),
    "documents": (small.gpt2(), DOCUMENTS),
}


@pytest.fixture(scope="module")
def comparisons() -> dict[str, Comparison]:
    (found,) = run_ranks(compare_with_model, 1, CASES)
    return found


@pytest.mark.parametrize("case", CASES)
def test_pipeline_of_one_stage_equals_gpt_bit_for_bit(comparisons: dict[str, Comparison], case: str) -> None:
    comparison = comparisons[case]
    assert comparison.names_equal
    assert comparison.loss_bits_equal
    assert comparison.grads_different == []
    assert comparison.grads_bit_equal, "no gradient was compared"


@pytest.mark.parametrize("pp", [1, 2])
def test_blocks_of_a_stage_leave_additions_to_each_other_and_send_sums(pp: int) -> None:
    for (separate, fused), left in run_ranks(train_fused, pp, pp):
        assert left == [True] * (4 // pp - 1) + [False]
        # fp32 sums of the same numbers in another order, over three updates.
        assert fused == pytest.approx(separate, rel=1e-5)
        assert separate[2] < separate[0]


@pytest.fixture(scope="module")
def two_stages() -> list[Stage]:
    return run_ranks(describe_stage, 2, 2, 4, PARTITION, True)


def test_type_partition_counts_embedding_blocks_and_head(two_stages: list[Stage]) -> None:
    # Layers 1, 3 to 6 and 9 match: three of the six to each stage.
    assert two_stages[0].stages == [range(5), range(5, 11)]
    assert two_stages[0].class_names == [
        "function",
        "EmbeddingPipe",
        "function",
        "ParallelTransformerLayerPipe",
        "ParallelTransformerLayerPipe",
    ]


def test_layer_files_and_keys_are_the_table_s_and_the_tied_head_has_none(two_stages: list[Stage]) -> None:
    expected: dict[int, set[str]] = {}
    for weight in weight_table(gpt_shape(small.bloom(num_layers=4))):
        expected.setdefault(weight.layer, set()).add(weight.key)
    found = {layer: set(keys) for stage in two_stages for layer, keys in stage.files.items()}
    assert found == expected
    assert set(found) == {1, 3, 4, 5, 6, 8}


def test_last_stage_holds_the_tied_weight_alone_and_leaves_its_norm_to_the_first(two_stages: list[Stage]) -> None:
    first, last = two_stages
    assert first.counted_elsewhere == []
    assert last.counted_elsewhere == ["word_embeddings.weight"]
    assert first.word_embeddings == last.word_embeddings != []
    assert set(first.names) & set(last.names) == {"word_embeddings.weight"}
    table = {weight.name for weight in weight_table(gpt_shape(small.bloom(num_layers=4)))}
    assert set(first.names) | set(last.names) == table


def test_documents_apart_train_the_same_on_two_stages_as_on_one() -> None:
    (alone,) = run_ranks(train_with_documents, 1, 1)
    for losses in run_ranks(train_with_documents, 2, 2):
        # The same operations; the tied gradient is summed in another order.
        assert losses == pytest.approx(alone, rel=1e-6)
    assert alone[2] < alone[0] - 0.1, "a run that does not learn compares nothing"


def test_an_untied_head_has_a_file_and_no_copy() -> None:
    first, last = run_ranks(describe_stage, 2, 2, 2, "parameters", False)
    assert last.files[7] == ["weight"]
    assert set(first.names) & set(last.names) == set()
    # 4,608 parameters of each embedding against 28,272 of a block: a block and an embedding to each stage.
    assert first.stages == [range(4), range(4, 9)]
