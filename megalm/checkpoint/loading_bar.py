"""transformers' progress bars, which would stand between the lines of megalm's tools."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def without_loading_bar() -> Iterator[None]:
    """Let transformers load a model without drawing a bar; afterwards it does as it did before."""
    from transformers.utils import logging

    drew = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drew:
            logging.enable_progress_bar()
