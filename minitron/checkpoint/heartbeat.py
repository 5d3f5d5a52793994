"""Signs of life of every rank, so that the others can name the one that has fallen silent."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minitron import dist, log
from minitron.checkpoint.processes import identity, is_running, state
from minitron.errors import LaunchError

RANKS = ".ranks"
#: Words in the messages of collectives that fail because of another rank.
_BROKEN = ("gloo", "nccl", "connection", "timed out", "timeout", "socket", "peer")


class Heartbeat:
    """A thread that writes, every few seconds, who this rank is and how far it has come, into a file that all ranks see.

    A process that is killed or stopped stops beating with all its threads. ``also`` is called at every beat.
    """

    def __init__(self, folder: Path, *, interval: float = 2.0, also: Callable[[], None] = lambda: None) -> None:
        self._folder, self._interval, self._also = folder / RANKS, interval, also
        self._rank, self._world = dist.rank(), dist.world_size()
        self._over = threading.Event()
        self._beats = 0

    def start(self) -> None:
        """Beat from now on."""
        if self._world > 1:
            self._folder.mkdir(parents=True, exist_ok=True)
        self._beat()
        threading.Thread(target=self._work, name="heartbeat", daemon=True).start()

    def stop(self) -> None:
        """Beat no more."""
        self._over.set()

    def _work(self) -> None:
        while not self._over.wait(self._interval):
            self._beat()

    def _beat(self) -> None:
        self._also()
        if self._world == 1:
            return
        self._beats += 1
        path = self._path(self._rank)
        partial = path.with_name(f"{path.name}.partial")
        try:
            partial.write_text(json.dumps({**identity(), "beats": self._beats, "at": log.position()}))
            os.replace(partial, path)
        except OSError:  # a full disk must not be reported by its heartbeat
            pass

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"

    def _read(self, rank: int) -> dict[str, Any]:
        try:
            return dict(json.loads(self._path(rank).read_text()))
        except (OSError, ValueError, TypeError):
            return {}

    def explain(self, error: RuntimeError) -> LaunchError | None:
        """An error that names the silent ranks, where a collective has failed because of them; None where it is about something else.

        Waits for up to three beats, because only time tells a slow rank of another host from a dead one.
        """
        if self._world == 1 or not any(word in str(error).lower() for word in _BROKEN):
            return None
        others = [rank for rank in range(self._world) if rank != self._rank]
        first = {rank: self._read(rank) for rank in others}
        end = time.monotonic() + 3 * self._interval
        silent: dict[int, str] = {}
        while not silent and time.monotonic() < end:
            time.sleep(0.1)
            silent = {rank: reason for rank, row in first.items() if (reason := _fate(row))}
        if not silent:
            silent = {rank: "gives no sign of life" for rank, row in first.items() if self._read(rank) == row}
        if silent:
            told = "; ".join(f"rank {rank} ({_who(first[rank])}) {reason}" for rank, reason in sorted(silent.items()))
        else:
            places = ", ".join(f"rank {rank} at {self._read(rank).get('at') or 'its start'}" for rank in others)
            told = f"no rank is silent; {places}, this one at {log.position() or 'its start'}"
        reason = str(error).strip().splitlines()[-1]
        return LaunchError(f"rank {self._rank} stops, because {told}; the same command goes on from the last checkpoint ({reason})")


def _fate(row: dict[str, Any]) -> str:
    """What has become of a process of this host; empty when it runs, or is another host's."""
    if row.get("host") != platform.node():
        return ""
    if not is_running(row):
        return "is gone"
    return "is stopped" if state(row["process"]) in ("T", "t") else ""


def _who(row: dict[str, Any]) -> str:
    if not row:
        return "never heard of"
    return f"process {row.get('process')} on host {row.get('host')}" + (f", last at {row['at']}" if row.get("at") else "")
