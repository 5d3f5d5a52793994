"""Logging and progress. Rank 0 speaks; the other ranks only warn, into files of their own where a launch script names a folder for them."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class RankError:
    """What a rank said before it left. ``sentence``: the input was bad, and the text is one sentence; else it is the trace of a bug."""

    rank: int
    host: str
    sentence: bool
    text: str
    log: Path


#: Where this rank's log and its error lie; None without a folder for them.
_files: Path | None = None


def to_files(folder: Path) -> None:
    """Write this rank's log to ``rank-00003.log`` in a folder; rank 0 stays on the screen as well, the other ranks leave it.

    Logs of earlier runs are continued. A folder that cannot be written changes nothing: everything then goes to the screen.
    """
    global _files
    path = folder / f"rank-{dist.rank():05d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".error").unlink(missing_ok=True)  # of the attempt before a restart
        file = path.with_suffix(".log").open("a", buffering=1)
    except OSError:
        return
    _files = path
    if not dist.is_main():
        os.dup2(file.fileno(), 1)  # libraries that write by themselves are also to be found there
        os.dup2(file.fileno(), 2)
        return
    handler = logging.StreamHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger("minitron").addHandler(handler)


def tell_error(text: str, *, sentence: bool) -> None:
    """Say why this process leaves: on the screen or in this rank's log, and in a file that the launcher reads."""
    sys.stderr.write(text)
    sys.stderr.flush()
    if _files is None:
        return
    try:
        if dist.is_main():
            with _files.with_suffix(".log").open("a") as file:
                file.write(text)
        partial = _files.with_suffix(".error.partial")
        partial.write_text(json.dumps({"rank": dist.rank(), "host": platform.node(), "sentence": sentence, "text": text}))
        os.replace(partial, _files.with_suffix(".error"))
    except OSError:  # a full disk is not reported by its log
        pass


def read_errors(folder: Path) -> list[RankError]:
    """What the ranks of the last run said before they left, the first one first."""
    found = []
    for path in folder.glob("rank-*.error"):
        try:
            found.append((path.stat().st_mtime_ns, RankError(**json.loads(path.read_text()), log=path.with_suffix(".log"))))
        except (OSError, ValueError, TypeError):
            continue
    return [error for _, error in sorted(found, key=lambda row: row[0])]


def clear_errors(folder: Path) -> None:
    """Forget what the ranks of earlier runs said."""
    for path in folder.glob("rank-*.error"):
        path.unlink(missing_ok=True)


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
