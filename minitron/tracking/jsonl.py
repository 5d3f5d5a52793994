"""Metrics as lines of JSON in the run's own folder: the record that reports and tests read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron.tracking.member import RunInfo

FILE_NAME = "metrics.jsonl"


class JsonlTracker:
    """Appends one line a step to ``metrics.jsonl``, whole before the next step begins."""

    def __init__(self, run: RunInfo) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        path = run.folder / FILE_NAME
        _cut_torn_line(path)
        self._file = open(path, "a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one step."""
        values = {name: value if isinstance(value, (int, str)) else float(value) for name, value in metrics.items() if name != "step"}
        self._file.write(json.dumps({"step": int(step), **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Flush and leave."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; what a killed run left half-written is passed over."""
    if not path.is_file():
        return []
    rows = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            row = _parsed(line)
            if row is not None:
                rows.append(row)
    return rows


def truncate_after(path: Path, step: int) -> int:
    """Cut off the lines of steps after ``step`` (and a torn last line), before a resumed run opens the file. Returns how many went."""
    if not path.is_file():
        return 0
    removed = 0
    aside = path.with_name(path.name + ".partial")
    with open(path, encoding="utf-8", errors="replace") as source, open(aside, "w", encoding="utf-8") as target:
        for line in source:
            row = _parsed(line)
            if row is not None and row["step"] <= step:
                target.write(line)
            else:
                removed += 1
        target.flush()
        os.fsync(target.fileno())
    os.replace(aside, path)
    return removed


def _parsed(line: str) -> dict[str, Any] | None:
    if not line.endswith("\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _cut_torn_line(path: Path) -> None:
    """A line without its end would swallow the first line appended to it."""
    if not path.is_file() or not path.stat().st_size:
        return
    with open(path, "rb+") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            file.truncate(whole)
