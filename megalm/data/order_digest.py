"""Whether two runs read the same samples in the same order, told by a few characters that a checkpoint can keep."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from megalm.data.blend import Blend
from megalm.data.gpt_dataset import GPTDataset
from megalm.data.source import SampleSource


def order_digest(source: SampleSource) -> str:
    """Equal for two sources whose samples are the same, as far as the shorter one goes.

    More samples keep the order as long as no corpus is read once more than before. File names play no part, and of the
    corpora's content only the lengths of their sequences do.
    Raises: TypeError for sources whose order is not known.
    """
    return hashlib.sha256(json.dumps(_fields(source)).encode()).hexdigest()[:16]


def _fields(source: SampleSource) -> list[Any]:
    if isinstance(source, Blend):
        return [source.weights, [_fields(part) for part in source.datasets]]
    if isinstance(source, GPTDataset):
        return source.order_fields()
    raise TypeError(f"the order of a {type(source).__name__} is not known")
