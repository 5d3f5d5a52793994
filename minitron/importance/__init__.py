"""Importance and depth metrics. A metric is an observer of one shared pass over the calibration samples, or a depth metric has a pass of its own."""

from __future__ import annotations

import importlib
from typing import Any, cast

from minitron.errors import ConfigError, nearest
from minitron.importance.depth import DepthConfig, DepthPass
from minitron.importance.scoring import Observer
from minitron.importance.width.config import ImportanceConfig

#: Width metrics: name → module and class; ``importance=<name>`` on the command line.
METRICS = {
    "activation": "minitron.importance.activation:ActivationObserver",
    "magnitude": "minitron.importance.magnitude:MagnitudeObserver",
    "random": "minitron.importance.random:RandomObserver",
    "taylor": "minitron.importance.taylor:TaylorPass",
    "wanda": "minitron.importance.wanda:WandaObserver",
}
#: Depth metrics: ``depth=<name>``.
DEPTH_METRICS = {
    "block_influence": "minitron.importance.block_influence:BlockInfluenceObserver",
    "angular_distance": "minitron.importance.angular_distance:AngularDistanceObserver",
    "lm_loss": "minitron.importance.lm_loss:LMLossPass",
    "accuracy": "minitron.importance.accuracy:AccuracyPass",
    "layer_magnitude": "minitron.importance.layer_magnitude:LayerMagnitudeObserver",
    "layer_taylor": "minitron.importance.layer_taylor:LayerTaylorPass",
}


def build_observers(width: ImportanceConfig, depth: DepthConfig, *, seed: int) -> list[Observer]:
    """Those of the metrics that two sections name which have no pass of their own: the width metric, then the depth metric.

    Raises:
        ConfigError: an unknown metric, or an option that it does not take.
    """
    return [metric for metric in (build_width(width, seed=seed), build_depth(depth, seed=seed)) if not hasattr(metric, "run")]


def build_width(width: ImportanceConfig, *, seed: int) -> Observer | DepthPass:
    """The width metric that the section names; one with ``run`` has a pass of its own.

    Raises:
        ConfigError: an unknown metric, or an option out of range.
    """
    metric = _member("importance", width.name, METRICS)
    width.check()
    return cast("Observer | DepthPass", metric(width, seed=seed))


def build_depth(depth: DepthConfig, *, seed: int) -> Observer | DepthPass:
    """The depth metric that the section names; one with ``run`` has a pass of its own.

    Raises:
        ConfigError: an unknown metric, or an option that it does not take.
    """
    metric = _member("depth", depth.name, DEPTH_METRICS)
    depth.check()
    return cast("Observer | DepthPass", metric(depth, seed=seed))


def check_placement(width: ImportanceConfig, depth: DepthConfig, placement: str) -> None:
    """Refuse what needs the teacher's weights or its layers whole where the teacher is not.

    Raises:
        ConfigError: the first such metric.
    """
    if placement in ("replicate", "cached"):  # a cache holds nothing to score by: the teacher runs, replicated
        return
    instead = f"which teacher.placement={placement} does not give: use teacher.placement=replicate"
    for option, metric in (("importance", build_width(width, seed=0)), ("depth", build_depth(depth, seed=0))):
        name = width.name if option == "importance" else depth.name
        if getattr(metric, "needs_gradients", False):
            raise ConfigError(f"{option}={name} needs gradients of whole weights, {instead}")
    if width.rounds > 1:
        raise ConfigError(f"importance.rounds={width.rounds} needs whole weights to mask units in, {instead}")
    if depth.selection == "laco":
        raise ConfigError(f"depth.selection=laco needs whole layers to merge, {instead}")


def reads_weights(width: ImportanceConfig, depth: DepthConfig) -> bool:
    """Whether one of the two metrics reads weights, which must then be there before the teacher is placed."""
    return any(getattr(metric, "reads_weights", False) for metric in (build_width(width, seed=0), build_depth(depth, seed=0)))


def _member(group: str, name: str, table: dict[str, str]) -> Any:
    if name not in table:
        raise ConfigError(f"{group}={name} is unknown; {nearest(name, table)}")
    module, _, cls = table[name].partition(":")
    return getattr(importlib.import_module(module), cls)


__all__ = [
    "DEPTH_METRICS",
    "METRICS",
    "DepthConfig",
    "ImportanceConfig",
    "build_depth",
    "build_observers",
    "build_width",
    "check_placement",
    "reads_weights",
]
