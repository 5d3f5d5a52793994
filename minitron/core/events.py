"""What happened to a run: a line for every start and every end, so that restarts and failures can be told of later."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minitron import dist
from minitron.errors import Interrupted, MinitronError

FILE = "events.jsonl"


@contextmanager
def attempt(folder: Path, **facts: Any) -> Iterator[None]:
    """A context that notes its start with some facts, and its end: ``complete``, ``stopped`` on request, ``refused`` or ``failed`` with the reason.

    A start without an end was killed. Only rank 0 writes.
    """
    _note(folder, event="started", **facts)
    outcome, reason = "complete", ""
    try:
        yield
    except Interrupted as interruption:
        outcome, reason = "stopped", str(interruption)
        raise
    except BaseException as error:
        outcome = "refused" if isinstance(error, MinitronError) else "failed"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise
    finally:
        _note(folder, event=outcome, **({"reason": reason} if reason else {}))


def _note(folder: Path, **facts: Any) -> None:
    if not dist.is_main():
        return
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    try:
        with (folder / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": now, **facts}, default=str) + "\n")
    except OSError:  # a full disk has an error of its own
        pass


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's events, oldest first."""
    path = folder / FILE
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "event" in row:
            found.append(row)
    return found
