"""The board over a real store: what one rank writes the others read, and a store that is gone is no answer."""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist

from megalm.topology.board import StoreBoard
from megalm.topology.ports import free_port


def test_what_one_writes_the_others_read_and_the_first_claim_stands() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    one, other = (StoreBoard("127.0.0.1", store.port, prefix="run") for _ in range(2))
    elsewhere = StoreBoard("127.0.0.1", store.port, prefix="another run")
    assert other.read(["mark/0", "mark/1"]) == {}
    assert one.put("mark/0", "7 3 saving")
    assert other.read(["mark/0", "mark/1"]) == {"mark/0": "7 3 saving"}
    assert other.put("mark/1", "")
    assert one.read(["mark/0", "mark/1"]) == {"mark/0": "7 3 saving", "mark/1": ""}
    assert one.claim("hang", "0") == "0"
    assert other.claim("hang", "1") == "0"
    assert elsewhere.read(["hang"]) == {}


def test_a_store_that_is_not_there_is_no_answer_within_the_patience() -> None:
    board = StoreBoard("127.0.0.1", free_port(), prefix="run", patience_seconds=0.5)
    started = time.monotonic()
    assert board.read(["mark/0"]) is None
    assert board.put("mark/0", "text") is None
    assert board.claim("hang", "0") is None
    assert time.monotonic() - started < 5.0
