"""Importance and depth metrics. A metric is an observer of one shared pass over the calibration samples."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import cast

from minitron.core.options import option
from minitron.core.plan import SELECTIONS
from minitron.errors import ConfigError, nearest
from minitron.importance.scoring import Observer

#: Width metrics: name → module and class; ``importance=<name>`` on the command line.
METRICS = {
    "activation": "minitron.importance.activation:ActivationObserver",
    "magnitude": "minitron.importance.magnitude:MagnitudeObserver",
    "random": "minitron.importance.random:RandomObserver",
}
#: Depth metrics: ``depth=<name>``.
DEPTH_METRICS = {
    "block_influence": "minitron.importance.block_influence:BlockInfluenceObserver",
}


@dataclass(frozen=True)
class ImportanceConfig:
    """Section ``importance``."""

    name: str = option("activation", "width metric")
    num_samples: int = option(1024, "calibration sequences")
    batch_size: int = option(4, "sequences per forward", recorded=True)
    checkpoint_every: int = option(64, "forwards between checkpoints of the pass", recorded=True)


@dataclass(frozen=True)
class DepthConfig:
    """Section ``depth``."""

    name: str = option("block_influence", "depth metric")
    selection: str = option("one_shot", "one_shot: the lowest layers go; contiguous: the lowest window goes")
    protect_first: int = option(0, "layers at the start that never go")
    protect_last: int = option(0, "layers at the end that never go")

    def check(self) -> None:
        """Refuse an unknown selection."""
        if self.selection not in SELECTIONS:
            raise ConfigError(f"depth.selection={self.selection} is unknown; {nearest(self.selection, SELECTIONS)}")


def build_observers(width: ImportanceConfig, depth: DepthConfig, *, seed: int) -> list[Observer]:
    """The observers that two sections name.

    Raises:
        ConfigError: an unknown metric.
    """
    depth.check()
    observers = []
    for group, name, table in (("importance", width.name, METRICS), ("depth", depth.name, DEPTH_METRICS)):
        if name not in table:
            raise ConfigError(f"{group}={name} is unknown; {nearest(name, table)}")
        module, _, cls = table[name].partition(":")
        observers.append(cast(Observer, getattr(importlib.import_module(module), cls)(seed=seed)))
    return observers


__all__ = ["DEPTH_METRICS", "METRICS", "DepthConfig", "ImportanceConfig", "build_observers"]
