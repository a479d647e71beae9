"""Positions, documents and ALiBi's slopes."""

from __future__ import annotations

import pytest
import torch

from megalm.kernels.alibi import alibi_slopes
from megalm.kernels.attention.masks import square_mask
from megalm.models.blocks.positions import (
    AlibiSlopes,
    absolute_positions,
    document_positions,
    document_starts,
)
from megalm.topology.group import SOLO, Group

EOD = 9
TOKENS = torch.tensor([[1, 2, EOD, 3, EOD, EOD, 4], [EOD, 1, 2, 3, 4, 5, EOD]]).t()


def test_absolute_positions_count_from_zero() -> None:
    assert absolute_positions(TOKENS).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_positions_start_again_after_an_end_of_document() -> None:
    assert document_positions(TOKENS, EOD).t().tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 0, 1, 2, 3, 4, 5]]


def test_an_end_of_document_belongs_to_its_own_document() -> None:
    assert document_starts(TOKENS, EOD).t().tolist() == [[0, 0, 0, 3, 3, 5, 6], [0, 1, 1, 1, 1, 1, 1]]


def test_starts_hide_exactly_earlier_documents() -> None:
    mask = square_mask(document_starts(TOKENS, EOD).t())
    assert mask.shape == (2, 1, 7, 7)
    assert mask[1, 0, 1].tolist() == [True] + 6 * [False]
    assert mask[0, 0, 3].tolist() == [True, True, True, False, False, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_slopes_stay_fp32_when_the_model_is_cast(dtype: torch.dtype) -> None:
    module = AlibiSlopes(6, tp=SOLO).to(dtype)
    assert torch.equal(module(), alibi_slopes(6))
    assert module().dtype == torch.float32


def test_slopes_follow_the_model_to_another_device() -> None:
    assert AlibiSlopes(6, tp=SOLO).to("meta")().device.type == "meta"


def test_slopes_are_in_no_checkpoint() -> None:
    assert AlibiSlopes(6, tp=SOLO).state_dict() == {}


def test_ranks_divide_the_slopes_in_order() -> None:
    parts = [AlibiSlopes(6, tp=Group(rank, 3, None, (0, 1, 2)))() for rank in range(3)]
    assert torch.equal(torch.cat(parts), alibi_slopes(6))
