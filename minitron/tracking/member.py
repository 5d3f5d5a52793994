"""What every tracker is told about the run, and the one tracker that stands for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.core.protocols import Tracker


@dataclass(frozen=True)
class RunInfo:
    """The run that metrics belong to."""

    folder: Path
    run_name: str
    group: str | None
    config: dict[str, Any]


class CompositeTracker:
    """Forwards to its members; empty on all ranks but the first."""

    def __init__(self, members: Sequence[Tracker]) -> None:
        self.members = tuple(members)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Give the metrics of one step to every member."""
        for member in self.members:
            member.log(step, metrics)

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
