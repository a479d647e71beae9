from __future__ import annotations

from pathlib import Path

import numpy as np

from megalm.config.data import DataConfig
from megalm.data.build import build_datasets
from megalm.data.indexed import IndexedDataset
from megalm.data.indexed_writer import IndexedWriter
from megalm.data.trace import trace


def test_pieces_of_a_blended_sample_give_its_tokens(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for name in "ab":
        with IndexedWriter(tmp_path / name, "u2") as writer:
            for _ in range(60):
                writer.add_sentences([draw.integers(0, 999, draw.integers(1, 12)) for _ in range(draw.integers(1, 4))])
    words = ("1", str(tmp_path / "a"), "2", str(tmp_path / "b"))
    data = DataConfig(data_path=words, seq_length=16, split="1,0,0")
    source = build_datasets(data, num_samples={"train": 50}, seed=1).train
    assert source is not None
    corpora = {str(tmp_path / name): IndexedDataset(tmp_path / name) for name in "ab"}
    seen = set()
    for number in range(50):
        pieces = trace(source, number)
        found = [corpora[p.prefix].get(p.sequence, p.offset, p.length) for p in pieces]
        assert np.concatenate(found).tolist() == source[number].tolist()
        assert [p.position for p in pieces] == [sum(q.length for q in pieces[:i]) for i in range(len(pieces))]
        for p in pieces:
            bounds = corpora[p.prefix].document_index
            assert bounds[p.document] <= p.sequence < bounds[p.document + 1]
            seen.add(p.prefix)
    assert len(seen) == 2
