"""What ranks tell each other beside their collectives: words under a key, in the store at which they met."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol


class Board(Protocol):
    """Everything answers within seconds, with None where the store does not."""

    def put(self, key: str, text: str) -> bool | None:
        """Write a text, which `read` of every rank then finds."""
        ...

    def read(self, keys: Sequence[str]) -> dict[str, str] | None:
        """Those of `keys` that were written, and their texts."""
        ...

    def claim(self, key: str, text: str) -> str | None:
        """Write a text unless somebody has; what stands there then."""
        ...


class StoreBoard:
    """A `Board` over a connection of its own to the TCPStore of torch.distributed.

    The process that holds the store may be stopped, and a call then never returns. So a thread makes the calls, and the
    others wait for it as long as they have patience.
    """

    def __init__(
        self, host: str, port: int, *, prefix: str, patience_seconds: float = 5.0, kept: object = None
    ) -> None:
        """`kept` holds the store, where this process does, for as long as there is a board."""
        self._address = (host, port)
        self._kept = kept
        self._prefix = prefix
        self._patience = patience_seconds
        self._requests: queue.SimpleQueue[tuple[Callable[[Any], Any], queue.SimpleQueue[Any]]] = queue.SimpleQueue()
        self._is_busy = False
        threading.Thread(target=self._serve, name="megalm board", daemon=True).start()

    def put(self, key: str, text: str) -> bool | None:
        return self._ask(lambda store: store.set(key, text) or True)

    def read(self, keys: Sequence[str]) -> dict[str, str] | None:
        return self._ask(lambda store: _read(store, list(keys)))

    def claim(self, key: str, text: str) -> str | None:
        return self._ask(lambda store: store.compare_set(key, "", text).decode())

    def _ask(self, work: Callable[[Any], Any]) -> Any:
        if self._is_busy:  # It still waits for an earlier answer.
            return None
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._is_busy = True
        self._requests.put((work, answer))
        try:
            return answer.get(timeout=self._patience)
        except queue.Empty:
            return None

    def _serve(self) -> None:
        store: Any = None
        while True:
            work, answer = self._requests.get()
            found = None
            try:
                store = store or self._connected()
                found = work(store)
            except Exception:  # The store is gone, in any of the ways that torch tells it.
                store = None
            self._is_busy = False
            answer.put(found)

    def _connected(self) -> Any:
        from torch.distributed import PrefixStore, TCPStore

        host, port = self._address
        timeout = timedelta(seconds=self._patience)
        return PrefixStore(self._prefix, TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False))


def _read(store: Any, keys: list[str]) -> dict[str, str]:
    """All at once where all are there: a rank of hundreds asks for the words of the others every few seconds."""
    found = keys if store.check(keys) else [key for key in keys if store.check([key])]
    return {key: text.decode() for key, text in zip(found, store.multi_get(found), strict=True)} if found else {}
