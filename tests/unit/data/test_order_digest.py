from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalm.config.data import DataConfig
from megalm.data.build import build_datasets
from megalm.data.order_digest import order_digest
from megalm.data.source import SampleSource
from tests.support.tiny_run import write_corpus


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folders = [tmp_path_factory.mktemp(name) for name in "ab"]
    return write_corpus(folders[0], num_documents=20), write_corpus(folders[1], num_documents=30, seed=1)


def source(num_samples: int, *, words: tuple[str, ...], seed: int = 1, **fields: Any) -> SampleSource:
    data = DataConfig(**({"data_path": words, "seq_length": 16, "split": "1,0,0"} | fields))
    found = build_datasets(data, num_samples={"train": num_samples}, seed=seed).train
    assert found is not None
    return found


@given(
    first=st.integers(1, 300),
    second=st.integers(1, 300),
    order=st.sampled_from(["bigscience", "megatron-core"]),
    blended=st.booleans(),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sources_with_one_digest_have_the_same_samples(
    prefixes: tuple[str, str], first: int, second: int, order: str, blended: bool
) -> None:
    words = ("1", prefixes[0], "2", prefixes[1]) if blended else prefixes[:1]
    short, long = (source(count, words=words, sample_order=order) for count in sorted((first, second)))
    if order_digest(short) == order_digest(long):
        for i in range(min(first, second)):
            assert np.array_equal(short[i], long[i])


def test_more_samples_keep_the_digest_until_an_epoch_is_added(prefixes: tuple[str, str]) -> None:
    words = prefixes[:1]
    in_epoch = len(source(1, words=words))
    one = order_digest(source(1, words=words))
    assert order_digest(source(in_epoch, words=words)) == one
    assert order_digest(source(in_epoch + 1, words=words)) != one


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"seq_length": 15},
        {"split": "9,1,0"},
        {"other": "second"},
        {"other": "blend"},
        {"other": "weights"},
    ],
    ids=str,
)
def test_whatever_changes_the_samples_changes_the_digest(prefixes: tuple[str, str], change: Mapping[str, Any]) -> None:
    a, b = prefixes
    blend = ("1", a, "2", b)
    words = {None: blend, "second": ("1", b, "2", a), "blend": (a,), "weights": ("1", a, "3", b)}
    fields = dict(change)
    changed = source(20, words=words[fields.pop("other", None)], **fields)
    assert order_digest(changed) != order_digest(source(20, words=blend))


def test_names_of_files_play_no_part(prefixes: tuple[str, str], tmp_path: Path) -> None:
    moved = write_corpus(tmp_path, num_documents=20)
    assert order_digest(source(9, words=(moved,))) == order_digest(source(9, words=prefixes[:1]))


def test_source_of_unknown_order_is_refused() -> None:
    with pytest.raises(TypeError, match="list is not known"):
        order_digest([])  # type: ignore[arg-type]
