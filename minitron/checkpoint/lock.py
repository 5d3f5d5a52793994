"""One run in one run folder: a lock file that names its owner, and gives way when the owner is dead."""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from minitron.checkpoint.processes import identity, is_running
from minitron.errors import LaunchError
from minitron.log import get_logger

logger = get_logger(__name__)

LOCK = ".lock"
#: How long the lock of another host is watched for a beat; ten of the heartbeat's intervals.
WATCH_SECONDS = 20.0


class RunLock:
    """The lock of a run folder, held by rank 0. ``beat`` says that the owner lives; a lock of another host that does not beat is dead.

    Nothing compares clocks: whether a lock beats is watched for ``watch_seconds``, so that hosts that disagree about the time, or a clock that is
    set back, change nothing.
    """

    def __init__(self, run_dir: Path, *, watch_seconds: float | None = None) -> None:
        """``watch_seconds`` must be longer than a few beats (None: :data:`WATCH_SECONDS`)."""
        self._path, self._watch = run_dir / LOCK, WATCH_SECONDS if watch_seconds is None else watch_seconds
        self._mine = ""

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            LaunchError: another run holds it; its host and process are named.
        """
        text = json.dumps({**identity(), "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "token": os.urandom(8).hex()})
        for _ in range(10):
            try:
                with self._path.open("x") as file:
                    file.write(text)
            except FileExistsError:
                self._clear_dead()
                continue
            time.sleep(0.02)  # two that clear the same dead lock at once may each have removed the other's
            if self._read() == text:
                self._mine = text
                return
        raise LaunchError(f"{self._path} changes hands all the time: other runs are started in this run folder")

    def release(self) -> None:
        """Give the lock back."""
        if self._mine and self._read() == self._mine:
            self._path.unlink(missing_ok=True)
        self._mine = ""

    def beat(self) -> None:
        """Say that the owner lives."""
        try:
            os.utime(self._path)
        except OSError:  # the folder was removed or is out of reach for a moment: no reason to stop a training
            pass

    def _read(self) -> str:
        try:
            return self._path.read_text(errors="replace")
        except OSError:
            return ""

    def _clear_dead(self) -> None:
        """Remove a lock whose owner is dead.

        Raises:
            LaunchError: the owner lives.
        """
        text = self._read()
        owner = _owner(text)
        if owner.get("host") == platform.node():
            alive, where = is_running(owner), ""
        else:
            logger.info("%s belongs to host %s: watching for %.0f s whether it is in use", self._path, owner.get("host", "unknown"), self._watch)
            alive, where = self._beats(text), f" of host {owner.get('host', 'unknown')}"
        if alive:
            who = f"process {owner.get('process', '?')} on host {owner.get('host', '?')} since {owner.get('since', '?')}"
            raise LaunchError(f"{self._path.parent} is in use by {who}: wait for it, stop it, or give another run_dir")
        if where:
            logger.warning("the lock%s on %s has not been renewed for %.0f s and is taken over", where, self._path.parent, self._watch)
        if self._read() == text:
            self._path.unlink(missing_ok=True)

    def _beats(self, text: str) -> bool:
        """Whether the lock is renewed while we look."""
        before, end = self._touched(), time.monotonic() + self._watch
        while time.monotonic() < end:
            time.sleep(min(0.25, self._watch / 4))
            if self._read() != text:
                return False  # it has just been given back, or taken over by someone who will be met at the next try
            if self._touched() != before:
                return True
        return False

    def _touched(self) -> int:
        try:
            return self._path.stat().st_mtime_ns
        except OSError:
            return 0


def _owner(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
