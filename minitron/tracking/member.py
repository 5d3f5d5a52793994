"""What every tracker is told about the run, and the one tracker that stands for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.core.protocols import Tracker


@dataclass(frozen=True)
class RunInfo:
    """The run that metrics belong to. ``step`` is the one to go on from, 0 for a fresh start; ``job`` the stage at work."""

    folder: Path
    run_name: str
    group: str | None
    config: dict[str, Any]
    step: int = 0
    job: str | None = None


class CompositeTracker:
    """Forwards to its members; empty on all ranks but the first.

    Metrics go to all of them. Tables, curves of candidates and references to folders go to those that can show such things.
    """

    def __init__(self, members: Sequence[Tracker]) -> None:
        self.members = tuple(members)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Give the metrics of one step to every member."""
        for member in self.members:
            member.log(step, metrics)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of one kind, as of candidates."""
        self._to_those_with("table", name, rows)

    def curve(self, name: str, points: Sequence[Mapping[str, float]], facts: Mapping[str, Any]) -> None:
        """The metrics of one of several trainings beside each other, over its steps, and what is known of it."""
        self._to_those_with("curve", name, points, facts)

    def reference(self, name: str, folder: Path, facts: Mapping[str, Any]) -> None:
        """A folder that was made, by its place and not by its content."""
        self._to_those_with("reference", name, folder, facts)

    def _to_those_with(self, what: str, *values: Any) -> None:
        for member in self.members:
            show: Callable[..., None] | None = getattr(member, what, None)
            if show is not None:
                show(*values)

    def close(self) -> None:
        """Close every member, also when one of them fails."""
        failure: Exception | None = None
        for member in self.members:
            try:
                member.close()
            except Exception as error:  # the others hold unwritten metrics
                failure = failure or error
        if failure is not None:
            raise failure
