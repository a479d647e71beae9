"""Rows of tensors, and the number of programs that go down them."""

from __future__ import annotations

import pytest
import torch

from megalm.kernels import rows
from megalm.kernels.rows import as_rows, num_strips


def test_rows_are_a_view_unless_their_elements_are_apart() -> None:
    x = torch.arange(24.0).view(2, 3, 4)
    assert as_rows(x).data_ptr() == x.data_ptr()
    wide = torch.arange(30.0).view(5, 6)[:, :4]
    assert as_rows(wide).data_ptr() == wide.data_ptr()
    assert as_rows(wide).stride() == (6, 1)
    turned = as_rows(torch.arange(12.0).view(3, 4).t())
    assert turned.is_contiguous()
    assert turned[1].tolist() == [1.0, 5.0, 9.0]


@pytest.mark.parametrize(
    "num_tiles, resident, num_columns, expected",
    [
        (2048, 4, 16, 33),  # bias-GELU of BLOOM-1b7 on an H100: 528 programs, four on each of 132 multiprocessors
        (8192, 2, 1, 264),  # LayerNorm
        (5, 2, 1, 5),  # never more than there are tiles
        (100, 1, 500, 1),  # never none
    ],
)
def test_strips_fill_a_gpu_once(
    num_tiles: int, resident: int, num_columns: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_processors", lambda device: 132)
    found = num_strips(num_tiles, torch.device("cuda"), resident=resident, num_columns=num_columns)
    assert found == expected
    assert num_strips(num_tiles, torch.device("cpu"), resident=resident, num_columns=num_columns) == 2
