"""C: broken lines of JSON and damaged archives, through the tool's own path from files to corpora."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from megalm.data.inputs import find_sources
from megalm.data.preprocess import Job, Recipe, preprocess
from megalm.errors import DataError
from tests.faults.report import Figures
from tests.support.damaged_input import ARCHIVE_DAMAGES, BROKEN, GOOD

RECIPE = Recipe(encode=lambda text: list(text.encode()), vocab_size=257, dtype=np.dtype("u2"), eod_id=256)


def answer(path: Path, output: Path, *, skip_bad_lines: bool = False) -> str:
    """What the user is told about an input that cannot be read whole; nothing may be published."""
    with pytest.raises(DataError) as caught:
        preprocess(Job(find_sources([str(path)]), str(output), workers=0, recipe=RECIPE, skip_bad_lines=skip_bad_lines))
    assert not list(output.parent.glob(f"{output.name}_text_document.*"))
    return str(caught.value)


def test_broken_lines_of_json(tmp_path: Path, figures: Figures) -> None:
    with figures.count("C", "broken lines of JSON: file, line and byte named; skipped and listed if asked") as count:
        for number, (kind, (line, reason)) in enumerate(BROKEN.items()):
            with count.case(kind):
                path = tmp_path / f"{number}.jsonl"
                path.write_bytes(GOOD + line + b"\n" + GOOD)
                said = answer(path, tmp_path / f"{number}_stops")
                assert path.name in said
                assert "line 2" in said
                assert f"byte {len(GOOD):,}" in said, said
                assert re.search(reason, said), said
                output = tmp_path / f"{number}_goes_on"
                skipped = Job(find_sources([str(path)]), str(output), workers=0, recipe=RECIPE, skip_bad_lines=True)
                assert preprocess(skipped).documents == 2
                listed = [json.loads(one) for one in Path(f"{output}.bad_lines.jsonl").read_text().splitlines()]
                assert [one["line"] for one in listed] == [2]


def test_damaged_archives(tmp_path: Path, figures: Figures) -> None:
    line = (json.dumps({"text": os.urandom(40_000).hex()}) + "\n").encode()
    with figures.count("C", "damaged archives: named, whatever is skipped") as count:
        for number, (kind, damage) in enumerate(ARCHIVE_DAMAGES.items()):
            with count.case(kind):
                path = tmp_path / f"{number}.jsonl.gz"
                path.write_bytes(damage(gzip.compress(line)))
                said = answer(path, tmp_path / f"{number}_out", skip_bad_lines=True)
                assert re.search(rf"{number}\.jsonl\.gz (is damaged after byte|is empty)", said), said
