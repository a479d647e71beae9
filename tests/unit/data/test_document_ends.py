"""What ends with a document: masks and positions against the rules of Megatron's `get_ltor_masks_and_position_ids`.

The slow version says them one position at a time: an end of document at i still belongs to its document; with
`reset_attention_mask` no query after i sees a key up to i; with `reset_position_ids` positions after i count from 0;
with `eod_mask_loss` what is predicted from i does not count. Each flag acts alone.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data.batches import make_batch
from megalm.errors import KernelError
from megalm.kernels import backend
from megalm.kernels.attention.masks import causal_mask, square_mask
from megalm.models.blocks.positions import absolute_positions, document_positions, document_starts
from megalm.models.gpt.build import build_model, choose_kernels, plan_gpt
from megalm.models.gpt.plan import DocumentRules, GPTPlan
from tests.unit.models import small

EOD = 0
CPU = torch.device("cpu")


def slow_masks(
    row: list[int], *, reset_position_ids: bool, reset_attention_mask: bool, eod_mask_loss: bool
) -> tuple[list[list[bool]], list[float], list[int]]:
    """Forbidden (query, key) pairs, loss mask and positions of one row of tokens."""
    length = len(row)
    forbidden = [[key > query for key in range(length)] for query in range(length)]
    loss_mask, positions = [1.0] * length, list(range(length))
    previous = 0
    for i in (i for i, token in enumerate(row) if token == EOD):
        if eod_mask_loss:
            loss_mask[i] = 0.0
        for query in range(i + 1, length):
            if reset_attention_mask:
                for key in range(i + 1):
                    forbidden[query][key] = True
            if reset_position_ids:
                positions[query] -= i + 1 - previous
        previous = i + 1
    return forbidden, loss_mask, positions


rows = st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=3)


@given(rows, st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_each_flag_does_what_the_other_trainer_does(
    rows: list[list[int]], reset_position_ids: bool, reset_attention_mask: bool, eod_mask_loss: bool
) -> None:
    batch = make_batch([np.array(row) for row in rows], masked_eod_id=EOD if eod_mask_loss else None)
    plan = _plan(DocumentRules(EOD, reset_positions=reset_position_ids, reset_attention=reset_attention_mask))
    tokens = batch.tokens.t()  # [b, s] -> [s, b]
    positions = plan.positions(tokens).expand(tokens.shape)
    hidden = causal_mask(len(tokens), CPU).expand(len(rows), 1, -1, -1)
    if plan.reset_attention:
        hidden = hidden | square_mask(document_starts(tokens, EOD).t())
    for at, row in enumerate(rows):
        forbidden, loss_mask, expected = slow_masks(
            row[:-1],
            reset_position_ids=reset_position_ids,
            reset_attention_mask=reset_attention_mask,
            eod_mask_loss=eod_mask_loss,
        )
        assert positions[:, at].tolist() == expected
        assert batch.loss_mask[at].tolist() == loss_mask
        assert hidden[at, 0].tolist() == forbidden


def test_without_rules_positions_are_absolute() -> None:
    tokens = torch.tensor([[1], [EOD], [2]])
    assert _plan(None).positions(tokens).tolist() == absolute_positions(tokens).tolist() == [[0], [1], [2]]
    assert document_positions(tokens, EOD).tolist() == [[0], [1], [0]]


def _plan(rules: DocumentRules | None) -> GPTPlan:
    return plan_gpt(small.gpt2(), documents=rules)


# The table of cores is private to the choice; one that is added must be in this test.
@pytest.mark.parametrize("attention", ["auto", *backend._CANDIDATES["attention"]])
@pytest.mark.parametrize("position", ["alibi", "learned"])
def test_every_attention_core_keeps_documents_apart(attention: str, position: str) -> None:
    model = small.bloom() if position == "alibi" else small.gpt2()
    rules = DocumentRules(EOD, reset_positions=True, reset_attention=True)
    try:
        kernels, _ = choose_kernels(model, device=CPU, attention=attention, dtype=torch.float32, documents=rules)
    except KernelError as error:
        pytest.skip(str(error))
    module = build_model(plan_gpt(model, kernels=kernels, documents=rules), seed=3).eval()
    small.randomise(module)
    tokens = torch.randint(1, 90, (2, 20), generator=torch.Generator().manual_seed(1))
    tokens[0, [3, 4, 15]] = EOD
    tokens[1, 10] = EOD
    whole = module(tokens)
    for row, cuts in ((0, [0, 4, 5, 16, 20]), (1, [0, 11, 20])):
        alone = [module(tokens[row : row + 1, a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
        # The same sums in kernels of other sizes.
        torch.testing.assert_close(whole[row : row + 1], torch.cat(alone, dim=1), rtol=0.0, atol=1e-5)
