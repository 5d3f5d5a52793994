"""A shape near the budget with its predicted cost. One JSON line in ``candidates/candidates.jsonl``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron.core.architecture import Architecture
from minitron.core.axes import Layout
from minitron.errors import CheckpointError


@dataclass(frozen=True)
class Candidate:
    """A named shape; ``kept_layers`` is None until depth scores exist; ``costs`` holds predicted FLOPs and bytes."""

    name: str
    architecture: Architecture
    num_parameters: int
    kept_layers: list[int] | None = None
    costs: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The candidate as plain JSON."""
        return {
            "name": self.name,
            "architecture": self.architecture.to_dict(),
            "num_parameters": self.num_parameters,
            "kept_layers": self.kept_layers,
            "costs": self.costs,
        }


def write_candidates(path: Path, candidates: list[Candidate]) -> None:
    """One JSON line per candidate, in the order given."""
    path.write_text("".join(json.dumps(candidate.to_dict()) + "\n" for candidate in candidates))


def read_candidates(path: Path, layout: Layout | None = None) -> list[Candidate]:
    """Candidates written by :func:`write_candidates`.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"there are no candidates at {path}: run 'minitron search' first")
    candidates = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            kept = row["kept_layers"]
            shape = Architecture.from_dict(row["architecture"], layout, tuple(kept) if kept is not None else None)
            candidates.append(Candidate(row["name"], shape, row["num_parameters"], kept, row.get("costs", {})))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}, line {number} is not a candidate: {error}") from error
    return candidates
