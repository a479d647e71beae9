from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path

import pytest

from megalm.tokenizers.train import train_byte_level_bpe

TEXTS = [
    "def main(arguments):\n    return [value for value in arguments if value is not None]\n",
    "The quick brown fox doesn't jump; it's the lazy dog's turn, they've said. 1234 5678 90\n",
    "class Reader:\n\tdef __init__(self, path: str) -> None:\n\t\tself.path = path   # the    path\n",
    "Über Größe, naïve café, Ελληνικά, русский текст, 中文字符 日本語 한국어 👍👍\n",
] * 8 + inspect.getsource(argparse).split("\n\n")


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    train_byte_level_bpe(TEXTS, folder, vocab_size=700)
    return folder


@pytest.fixture(scope="session")
def gpt2_files(bpe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """vocab.json and merges.txt of the same tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2")
    model = json.loads((bpe_folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return folder / "vocab.json", folder / "merges.txt"
