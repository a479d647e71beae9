from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data import shuffle as module
from megalm.data.shuffle import shuffle


def check(length: int, seed: int, dtype: type = np.int32) -> None:
    theirs, ours = np.arange(length, dtype=dtype), np.arange(length, dtype=dtype)
    their_random, our_random = np.random.RandomState(seed), np.random.RandomState(seed)
    their_random.randint(1 << 20, size=seed % 700)
    our_random.randint(1 << 20, size=seed % 700)
    their_random.shuffle(theirs)
    shuffle(our_random, ours)
    assert np.array_equal(ours, theirs)
    # The next shuffle of the same generator must go on from the same number.
    assert their_random.randint(1 << 30) == our_random.randint(1 << 30)


@given(st.integers(0, 5_000), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_equal_to_numpy_with_blocks_from_the_first_element_on(length: int, seed: int) -> None:
    """A short tail makes short arrays take the path of long ones, with a conflict in nearly every block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TAIL", 300)
        check(length, seed)


@pytest.mark.parametrize("length", [2**19 - 1, 2**19 + 1, 2**20, 2**20 + 1, 1_700_000])
@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64])
def test_equal_to_numpy_on_long_arrays(length: int, dtype: type) -> None:
    check(length, length, dtype)
