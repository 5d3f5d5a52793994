"""Logging and progress. Rank 0 speaks; the other ranks only warn."""

from __future__ import annotations

import logging
import sys
import time

from minitron import dist


def get_logger(name: str) -> logging.Logger:
    """The logger of one module."""
    return logging.getLogger(name)


def setup(debug: bool = False) -> None:
    """Send log lines to stderr: everything on rank 0, warnings elsewhere."""
    level = logging.DEBUG if debug else logging.INFO
    handler = logging.StreamHandler(sys.stderr)
    rank = "" if dist.is_main() else f"[rank {dist.rank()}] "
    handler.setFormatter(logging.Formatter(f"{rank}%(message)s"))
    root = logging.getLogger("minitron")
    root.handlers[:] = [handler]
    root.setLevel(level if dist.is_main() else logging.WARNING)
    root.propagate = False


#: The place of the last progress that was made, for those who ask how far this process is.
_position = ""


def position() -> str:
    """How far this process is, as the last progress line would say it; empty before the first."""
    return _position


def duration(seconds: float) -> str:
    """Seconds as a person would say them: 8s, 3m05s, 2h14m."""
    whole = int(round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """Rate and ETA of a long loop: one rewritten line in a terminal, a plain line every few seconds elsewhere."""

    def __init__(self, what: str, *, total: int, unit: str = "step", done: int = 0, every_seconds: float = 10.0) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self._start_done, self._start = done, time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._every = 0.5 if self._terminal else every_seconds
        self._last = self._start if not self._terminal else 0.0
        self._logger = get_logger("minitron.progress")

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count finished units; speak when it is time to."""
        global _position
        self.done += count
        _position = f"{self.what} {self.done}/{self.total}"
        now = time.monotonic()
        if dist.is_main() and (now - self._last >= self._every or self.done >= self.total):
            self._last = now
            self._say(now, note)

    def _say(self, now: float, note: str) -> None:
        elapsed = max(now - self._start, 1e-9)
        rate = (self.done - self._start_done) / elapsed
        left = (self.total - self.done) / rate if rate > 0 else 0.0
        unit = self.unit if rate >= 1 else f"s/{self.unit}"
        speed = f"{rate:.1f} {unit}/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.1f} {unit}"
        tail = f"ETA {duration(left)}" if self.done < self.total else f"took {duration(elapsed)}"
        line = f"  {self.what} {self.done}/{self.total}  {speed}  {tail}" + (f"  {note}" if note else "")
        if self._terminal:
            end = "\n" if self.done >= self.total else ""
            sys.stderr.write(f"\r\x1b[2K{line}{end}")
            sys.stderr.flush()
        else:
            self._logger.info("%s", line)
