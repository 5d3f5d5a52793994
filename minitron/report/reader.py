"""Reads whatever a run folder holds. A part that is missing is absent; a damaged one is absent and named in ``warnings``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron.core.events import read_events
from minitron.core.scores import ImportanceScores
from minitron.errors import CheckpointError

#: Stage folders in the order in which a run makes them.
FOLDERS = ("teacher", "cache", "scores", "candidates", "ranking", "pruned", "sparse", "student", "export", "evaluation")
#: Folders that are unfinished, or set aside for a newer one.
_ASIDE = re.compile(r"\.(partial|replaced|old-\d+)$")


@dataclass(frozen=True)
class StageRecord:
    """One stage's manifest and the folder it stands in, relative to the run."""

    folder: str
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """The stage's verb; for one of several pruned models, with the model's name."""
        verb = str(self.manifest.get("stage") or self.folder)
        return f"{verb} {self.folder.partition('/')[2]}".strip()

    def table(self, key: str) -> dict[str, Any]:
        """A part of the manifest that is a mapping; empty when it is missing."""
        return as_dict(self.manifest.get(key))


@dataclass(frozen=True)
class Pruned:
    """One pruned model: its manifest's results and its plan, as far as they exist."""

    name: str
    results: dict[str, Any]
    plan: dict[str, Any]

    def kept_units(self, axis: str) -> dict[str, list[Any]]:
        """Layer → its kept units on an axis, for ``expert_ffn`` a list for every kept expert; nothing while the plan does not say."""
        return as_dict(self.plan.get("by_expert") if axis == "expert_ffn" else as_dict(self.plan.get("by_layer")).get(axis))


@dataclass(frozen=True)
class Run:
    """Everything a report can be made of."""

    path: Path
    about: dict[str, Any] = field(default_factory=dict)
    stages: list[StageRecord] = field(default_factory=list)
    scores: ImportanceScores | None = None
    candidates: list[dict[str, Any]] = field(default_factory=list)
    ranking: dict[str, Any] = field(default_factory=dict)
    correction: list[dict[str, Any]] = field(default_factory=list)
    distillation: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    pruned: list[Pruned] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ranked(self) -> list[dict[str, Any]]:
        """Measured candidates, best first."""
        rows = self.ranking.get("candidates")
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []

    @property
    def winner(self) -> Pruned | None:
        """The pruned model that the run went on with: the best ranked of those written, else the first."""
        by_name = {pruned.name: pruned for pruned in self.pruned}
        student = next((stage for stage in self.stages if stage.folder == "student"), None)
        wanted = [str(student.table("results").get("candidate"))] if student else []
        wanted += [str(row.get("name")) for row in self.ranked]
        return next((by_name[name] for name in wanted if name in by_name), self.pruned[0] if self.pruned else None)

    @property
    def winner_name(self) -> str | None:
        """Name of the pruned model, or of the best candidate while none is pruned."""
        if self.winner is not None:
            return self.winner.name
        return next((str(row.get("name")) for row in self.ranked if row.get("status", "ok") == "ok"), None)

    def candidate(self, name: str | None) -> dict[str, Any]:
        """A candidate's line by its name; empty when there is none."""
        return next((row for row in self.candidates if row.get("name") == name), {})

    @property
    def kept_layers(self) -> list[int] | None:
        """Teacher layers that the winner keeps, or None while nothing is chosen."""
        plan = self.winner.plan if self.winner else {}
        kept = plan.get("layer", self.candidate(self.winner_name).get("kept_layers"))
        return kept if isinstance(kept, list) else None


def as_dict(value: Any) -> dict[str, Any]:
    """A JSON value as a mapping; anything else is an empty one."""
    return value if isinstance(value, dict) else {}


class _Folder:
    """Tolerant access to the files of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.warnings: list[str] = []

    def _damaged(self, relative: str, error: Exception | str) -> None:
        self.warnings.append(f"{relative} was left out: {error}")

    def object(self, relative: str) -> dict[str, Any]:
        """A JSON object, or an empty one."""
        file = self.path / relative
        if not file.is_file():
            return {}
        try:
            value = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            self._damaged(relative, error)
            return {}
        if not isinstance(value, dict):
            self._damaged(relative, "it holds no JSON object")
        return as_dict(value)

    def lines(self, *relatives: str) -> list[dict[str, Any]]:
        """JSON lines of the first of the files that exists; an unreadable line (a run may be writing it) is passed over."""
        for relative in relatives:
            file = self.path / relative
            if not file.is_file():
                continue
            rows, bad = [], 0
            for line in file.read_text(errors="replace").splitlines():
                try:
                    rows.append(as_dict(json.loads(line)))
                except ValueError:
                    bad += 1
            if bad:
                self._damaged(relative, f"{bad} of its {len(rows) + bad} lines could not be read (the others are shown)")
            return [row for row in rows if row]
        return []

    def scores(self, relative: str) -> ImportanceScores | None:
        """Importance scores, or None."""
        if not (self.path / relative).is_file():
            return None
        try:
            return ImportanceScores.load(self.path / relative)
        except CheckpointError as error:
            self._damaged(relative, error)
            return None


def _stages(folder: _Folder, pruned: list[str]) -> list[StageRecord]:
    """Manifests of all stage folders: the known ones in their order, then any others by name."""
    others = sorted(p.name for p in folder.path.iterdir() if p.is_dir() and p.name not in (*FOLDERS, "report") and not _ASIDE.search(p.name))
    places: list[str] = []
    for name in (*FOLDERS, *others):
        places += [f"pruned/{candidate}" for candidate in pruned] if name == "pruned" and pruned else [name]
    found = [StageRecord(place, folder.object(f"{place}/manifest.json")) for place in places if (folder.path / place / "manifest.json").is_file()]
    return [stage for stage in found if stage.manifest]


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        CheckpointError: the folder does not exist or holds no stage folder.
    """
    begun = sorted(p.name.removesuffix(".partial") for p in path.glob("*.partial") if p.is_dir()) if path.is_dir() else []
    unfinished = [name for name in begun if name != "report"]  # a report is always written while its own stage runs
    stages = [name for name in FOLDERS if (path / name).is_dir()]
    if not stages and not unfinished:
        raise CheckpointError(f"there is no run at {path}: a run folder holds stage folders such as scores/ or student/")
    folder = _Folder(path)
    names = sorted(p.name for p in (path / "pruned").iterdir() if p.is_dir() and not _ASIDE.search(p.name)) if "pruned" in stages else []
    pruned = [
        Pruned(name, as_dict(folder.object(f"pruned/{name}/manifest.json").get("results")), folder.object(f"pruned/{name}/plan.json"))
        for name in names
    ]
    return Run(
        path=path,
        about=folder.object("run.json"),
        stages=_stages(folder, names),
        scores=folder.scores("scores/scores.safetensors"),
        candidates=folder.lines("candidates/candidates.jsonl"),
        ranking=folder.object("ranking/ranking.json"),
        correction=folder.lines("teacher/metrics.jsonl", "teacher.partial/metrics.jsonl", "correct.partial/metrics.jsonl"),
        distillation=folder.lines("student/metrics.jsonl", "student.partial/metrics.jsonl", "distill.partial/metrics.jsonl"),
        evaluation=folder.object("evaluation/metrics.json"),
        pruned=pruned,
        events=read_events(path),
        unfinished=unfinished,
        warnings=list(dict.fromkeys(folder.warnings)),
    )
