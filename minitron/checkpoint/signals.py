"""SIGTERM and SIGUSR1 ask for a checkpoint and a clean stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from minitron import dist


class StopSignal:
    """Set by a signal on any rank; every rank sees it at the same step."""

    def __init__(self) -> None:
        self._requested = False

    def install(self) -> None:
        """Handle SIGTERM and SIGUSR1 from now on (main thread only)."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    def requested(self) -> bool:
        """Whether any rank was asked to stop; all ranks must call this together."""
        return dist.any_rank(self._requested)
