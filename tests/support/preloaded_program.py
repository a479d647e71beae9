"""Imported once by the fork server of `jobs`: what the program would import in every rank."""

from __future__ import annotations

import megalm.checkpoint.background  # noqa: F401
import megalm.checkpoint.load  # noqa: F401
import megalm.checkpoint.save  # noqa: F401
import megalm.train.build  # noqa: F401
import megalm.train.loop  # noqa: F401
