"""Reading ahead in threads: documents that will be needed are tokenised, and whole optimiser steps are drawn, before anyone waits for them.

Threads, not processes: tokenisers work outside Python's lock, nothing has to be copied between processes, and no child can be lost. What comes out is
the same, in the same order, for any number of threads.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch

#: Pieces of work that each thread has before it, so that none is idle while another's is waited for.
_PER_THREAD = 2

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """A number of threads, started when there is something to do; with 0 all is done where it is asked for."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ThreadPoolExecutor | None = None

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """``function`` of every item, in their order; the threads are a bounded number of items ahead.

        ``items`` is walked by the caller's thread alone. What a thread raises is raised here, at its item's turn.
        """
        if self.count == 0:
            yield from map(function, items)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="minitron-data")
        waiting: deque[Future[Result]] = deque()
        source = iter(items)
        try:
            for item in source:
                waiting.append(self._pool.submit(function, item))
                if len(waiting) > _PER_THREAD * self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class Batches(Protocol):
    """Micro-batches of one optimiser step after another, from a place that can be written down."""

    def next(self) -> list[dict[str, torch.Tensor]]:
        """This rank's micro-batches of the next step."""

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""


class BatchesAhead:
    """Batches that a thread draws while the step before is computed.

    The state is that of the batch last handed out, not of the last one drawn. Nobody else may touch the text meanwhile: ``close`` ends the thread.
    """

    def __init__(self, inner: Batches, *, num_steps: int = 2) -> None:
        """``num_steps`` is how many steps are kept drawn."""
        self._inner, self._num_steps = inner, num_steps
        self._state = inner.state_dict()
        self._thread: threading.Thread | None = None

    def next(self) -> list[dict[str, torch.Tensor]]:
        """The next step's micro-batches; what went wrong while drawing them is raised here."""
        if self._thread is None:
            self._drawn: queue.Queue[tuple[Any, dict[str, Any]]] = queue.Queue(self._num_steps)
            self._stopping = threading.Event()
            self._thread = threading.Thread(target=self._draw, args=(self._drawn, self._stopping), name="minitron-batches", daemon=True)
            self._thread.start()
        batch, state = self._drawn.get()
        if isinstance(batch, Exception):
            self.close()
            raise batch
        self._state = state
        return batch  # type: ignore[no-any-return]

    def state_dict(self) -> dict[str, Any]:
        """Where the batch last handed out ends."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the batch after the one the state was taken at; what was drawn ahead is forgotten."""
        self.close()
        self._inner.load_state_dict(state)
        self._state = self._inner.state_dict()

    def close(self) -> None:
        """End the thread and go back to the batch last handed out; drawing begins again with the next call."""
        if self._thread is None:
            return
        self._stopping.set()
        while self._thread.is_alive():  # it may be waiting for room
            while not self._drawn.empty():
                self._drawn.get_nowait()
            self._thread.join(0.05)
        self._thread = None
        self._inner.load_state_dict(self._state)

    def _draw(self, drawn: queue.Queue[tuple[Any, dict[str, Any]]], stopping: threading.Event) -> None:
        while not stopping.is_set():
            try:
                batch: Any = self._inner.next()
            except Exception as error:  # carried over to the thread that waits
                batch = error
            drawn.put((batch, self._inner.state_dict()))
            if isinstance(batch, Exception):
                return
