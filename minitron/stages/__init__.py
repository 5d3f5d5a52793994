"""Stages: verbs that read folders and write one. One file a member, one row here; where rooms meet."""

from __future__ import annotations

import importlib
from typing import cast

from minitron.core.protocols import StageModule
from minitron.errors import ConfigError, nearest

#: Stage → module, in the order of the flow.
STAGES = {
    "correct": "minitron.stages.correct",
    "importance": "minitron.stages.importance",
    "search": "minitron.stages.search",
    "rank": "minitron.stages.rank",
    "prune": "minitron.stages.prune",
    "sparsify": "minitron.stages.sparsify",
    "cache": "minitron.stages.cache",
    "distill": "minitron.stages.distill",
    "export": "minitron.stages.export",
    "evaluate": "minitron.stages.evaluate",
    "report": "minitron.stages.report",
}


def load_stage(name: str) -> StageModule:
    """The module of a stage.

    Raises:
        ConfigError: there is no such stage.
    """
    if name not in STAGES:
        raise ConfigError(f"there is no stage '{name}'; {nearest(name, STAGES)}")
    return cast(StageModule, importlib.import_module(STAGES[name]))
