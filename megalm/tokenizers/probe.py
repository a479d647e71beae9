"""A text by which two tokenizers are told apart, whatever files they were read from."""

from __future__ import annotations

from megalm.tokenizers.null import NullTokenizer
from megalm.tokenizers.protocol import Tokenizer

PROBE = (
    "The quick brown fox didn't jump over 1,234,567 lazy dogs; it walked.\n"
    "def mean(values):\n\treturn sum(values) / len(values)  # 3.14159 != 0x7f\n\n"
    "  Größe, cœur, niño, żółw, Привет, мир! γειά σου, "
    "שלום עולם, مرحبا, "
    "नमस्ते, สวัสดี, 你好,世界。こんにちは, 안녕 "
    "\U0001f600\U0001f680   end\n"
)
"""Words, numbers, code, white space, and scripts: a text of which different vocabularies make different ids. Sidecars
hold its ids, so it must never change."""


def probe_ids(tokenizer: Tokenizer) -> list[int] | None:
    """The ids of the probe; None for ids that no tokenizer made."""
    return None if isinstance(tokenizer, NullTokenizer) else tokenizer.encode(PROBE)
