"""Where metrics go: one file per tracker, one row in TRACKERS."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron import dist
from minitron.core.protocols import Tracker
from minitron.errors import ConfigError, nearest
from minitron.tracking.member import CompositeTracker, RunInfo

TRACKERS = {
    "console": "minitron.tracking.console:ConsoleTracker",
    "jsonl": "minitron.tracking.jsonl:JsonlTracker",
    "tensorboard": "minitron.tracking.tensorboard:TensorboardTracker",
    "wandb": "minitron.tracking.wandb:WandbTracker",
}


def build_trackers(
    settings: Mapping[str, Mapping[str, Any] | None],
    *,
    folder: Path,
    run_name: str,
    group: str | None,
    config: dict[str, Any],
    step: int = 0,
    job: str | None = None,
) -> CompositeTracker:
    """One tracker that forwards to those named in ``settings`` (name → its options); it acts on rank 0 only.

    ``step`` is the one that training goes on from; ``job`` the stage at work.

    Raises:
        ConfigError: an unknown tracker or option, or a tracker whose package is missing.
    """
    run = RunInfo(folder=Path(folder), run_name=run_name, group=group, config=config, step=step, job=job)
    classes = {name: _tracker_class(name, options or {}) for name, options in settings.items()}
    if not dist.is_main():
        return CompositeTracker([])
    members: list[Tracker] = []
    try:
        for name, options in settings.items():
            members.append(classes[name](run, **(options or {})))
    except Exception:
        CompositeTracker(members).close()
        raise
    return CompositeTracker(members)


def check_trackers(settings: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Refuse trackers that could not start, before anything is trained.

    Raises:
        ConfigError: an unknown tracker, option or value, or a package that is missing.
    """
    for name, options in settings.items():
        check = getattr(_tracker_class(name, options or {}), "check", None)
        if check is not None:
            check(**(options or {}))


def _tracker_class(name: str, options: Mapping[str, Any]) -> Any:
    if name not in TRACKERS:
        raise ConfigError(f"there is no tracker '{name}': {nearest(name, TRACKERS)}")
    module, _, attribute = TRACKERS[name].partition(":")
    tracker = getattr(importlib.import_module(module), attribute)
    known = [p.name for p in inspect.signature(tracker).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for key in options:
        if key not in known:
            raise ConfigError(f"the tracker {name} has no option '{key}': {nearest(str(key), known) if known else 'it has none'}")
    return tracker


__all__ = ["TRACKERS", "CompositeTracker", "RunInfo", "build_trackers", "check_trackers"]
