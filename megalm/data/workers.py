"""Worker processes that tokenize blocks."""

from __future__ import annotations

import multiprocessing
import queue
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from megalm.data.documents import Block
from megalm.data.encoding import Encoded, Recipe, encode_block
from megalm.errors import DataError

READ_AHEAD = 2
"""Blocks on their way for each worker, the one that it works on among them."""

AHEAD_BYTES = 256 << 20
"""Text of the blocks on their way above which there is one more than workers, so that ids waiting for their turn do not
fill the memory."""


def encode_in_order(parts: Iterable[Block], recipe: Recipe, *, workers: int) -> Iterator[tuple[Block, Encoded]]:
    """Blocks through `workers` processes; results in the order of the blocks.

    Each process is forked with the tokenizer that the parent has built, so that only blocks and packed ids are pickled.
    A thread for each does the waiting, so that sending and receiving cannot block one another.
    """
    pool = [_Worker(recipe) for _ in range(workers)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in pool:
        idle.put(worker)

    def encode(block: Block) -> Encoded:
        worker = idle.get()
        try:
            return worker.encode(block)
        finally:
            idle.put(worker)

    waiting: deque[tuple[Block, Future[Encoded]]] = deque()
    threads = ThreadPoolExecutor(workers)
    size = 0
    try:
        for block in parts:
            waiting.append((block, threads.submit(encode, block)))
            size += block.size
            while len(waiting) > (workers if size > AHEAD_BYTES else workers * READ_AHEAD):
                done, future = waiting.popleft()
                size -= done.size
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        for _, future in waiting:
            future.cancel()
        for worker in pool:
            worker.stop()
        threads.shutdown(wait=True)
        for block, _ in waiting:
            block.discard()


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, recipe: Recipe) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._pipe, recipe), daemon=True)
        self._process.start()
        theirs.close()

    def encode(self, block: Block) -> Encoded:
        """Have a block encoded; an error there is raised here."""
        try:
            self._pipe.send(block)
            answer = self._receive()
        except (EOFError, OSError) as error:
            self._process.join(1)
            raise DataError(
                f"a worker process died with exit code {self._process.exitcode}; -9 mostly means out of memory\n"
                "  --resume continues; use fewer --workers, or a machine with more memory"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        encoded: Encoded = answer
        return encoded

    def _receive(self) -> Encoded | Exception:
        """An answer; token ids come by themselves, straight into their array."""
        answer: Encoded | Exception = self._pipe.recv()
        if isinstance(answer, Encoded):
            for packed in answer.packed.values():
                packed.tokens = np.empty(int(packed.lengths.sum(dtype=np.int64)), packed.tokens.dtype)
                if len(packed.tokens):
                    self._pipe.recv_bytes_into(packed.tokens.view(np.uint8).data)
        return answer

    def stop(self) -> None:
        """End the process, at once if it is in the middle of a block."""
        self._process.terminate()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection[Any, Any], parents: Connection[Any, Any], recipe: Recipe) -> None:
    """Encode blocks until the parent goes away."""
    # Without this the process would hold the parent's end open and never see that the parent died.
    parents.close()
    while True:
        try:
            block = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        answer: Encoded | Exception
        try:
            answer = encode_block(block, recipe)
        except KeyboardInterrupt:
            return
        # Whatever it is, the parent raises it in the order of the blocks.
        except Exception as error:
            answer = error
        try:
            _send(pipe, answer)
        except OSError:
            return


def _send(pipe: Connection[Any, Any], answer: Encoded | Exception) -> None:
    """Send an answer, its token ids without a copy: of a long document they are a hundred megabytes."""
    tokens = []
    if isinstance(answer, Encoded):
        for packed in answer.packed.values():
            tokens.append(packed.tokens)
            packed.tokens = np.empty(0, packed.tokens.dtype)
    pipe.send(answer)
    for part in tokens:
        if len(part):
            pipe.send_bytes(part.view(np.uint8).data)
