"""The device that tests of Triton kernels run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support import triton_device as support


@pytest.fixture
def triton_device() -> Iterator[torch.device]:
    """A GPU, or the CPU with Triton's interpreter; the modules of the kernels must be imported before."""
    if not support.INSTALLED:
        pytest.skip(support.ABSENT)
    with support.triton_device() as device:
        yield device
