"""Who a process is, and whether it still runs."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def identity() -> dict[str, Any]:
    """This process: host, number, and when the system started it, because numbers are used again."""
    return {"host": platform.node(), "process": os.getpid(), "started": started(os.getpid())}


def started(process: int) -> str:
    """The start of a process in the system's own count; empty where the system does not say, or there is no such process."""
    fields = _fields(process)
    return fields[19] if len(fields) > 19 else ""


def state(process: int) -> str:
    """The system's letter: R or S runs, T is stopped, Z is dead and not yet buried; empty as for :func:`started`."""
    return (_fields(process) or [""])[0]


def is_running(owner: Mapping[str, Any]) -> bool:
    """Whether a process of this host, as :func:`identity` names it, exists and is not dead."""
    process = owner.get("process")
    if not isinstance(process, int) or process <= 0:
        return False
    if Path("/proc/self/stat").exists():
        return state(process) not in ("", "Z", "X") and started(process) == owner.get("started")
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _fields(process: int) -> list[str]:
    """What follows the name in ``/proc/<process>/stat``; the name may hold spaces and brackets."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
