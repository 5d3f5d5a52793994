"""Section ``target``: the budget, and further limits that a shape must keep."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minitron.core.architecture import Architecture
from minitron.core.options import option
from minitron.errors import ArchitectureError, ConfigError, nearest
from minitron.search.grid import Grid, Values
from minitron.search.prediction import MEASURED, QUANTITIES, Measure, Workload, check_device, predict

#: Option of an explicit target → axis.
SIZES = {
    "num_layers": "layer",
    "hidden_size": "hidden",
    "ffn_size": "ffn",
    "num_heads": "head",
    "num_kv_heads": "kv_head",
    "num_experts": "expert",
    "expert_ffn_size": "expert_ffn",
    "shared_ffn_size": "shared_ffn",
}
_BOUNDS = ("at_most", "at_least", "around", "tolerance")


@dataclass(frozen=True)
class TargetConfig:
    """Section ``target``: a budget, or with ``target=explicit`` a shape."""

    name: str = option("parameters", "parameters: search near a budget; explicit: one given shape")
    num_parameters: float | None = option(None, "parameter budget, e.g. 4.0e9")
    ratio: float | None = option(None, "budget as a share of the teacher's parameters, e.g. 0.5")
    tolerance: float = option(0.05, "band around the budget, as a share of it")
    limits: dict[str, Any] | None = option(
        None,
        "more that must hold: quantity → a bound, or {at_most, at_least, around, tolerance}; quantities: " + ", ".join(QUANTITIES),
    )
    batch_size: int = option(1, "sequences of the memory, latency and throughput that are predicted")
    sequence_length: int | None = option(None, "their tokens; null: data.sequence_length")
    device: str = option("h100", f"device of predicted times: a name that minitron plan knows, or {MEASURED} to measure on this machine")
    num_layers: int | None = option(None, "explicit: layers to keep")
    hidden_size: int | None = option(None, "explicit: hidden channels to keep")
    ffn_size: int | None = option(None, "explicit: neurons to keep in every MLP")
    num_heads: int | None = option(None, "explicit: query heads to keep")
    num_kv_heads: int | None = option(None, "explicit: key-value groups to keep")
    num_experts: int | None = option(None, "explicit: experts to keep in every layer that has them")
    expert_ffn_size: int | None = option(None, "explicit: neurons to keep in every expert")
    shared_ffn_size: int | None = option(None, "explicit: neurons to keep in every shared expert")

    def workload(self, sequence_length: int, *, measure: Callable[..., Measure] | None = None) -> Workload:
        """What memory and times are predicted for; ``measure`` makes the way to measure them, given batch size and sequence length.

        Raises:
            ConfigError: a size below 1, or an unknown device.
        """
        length = self.sequence_length if self.sequence_length is not None else sequence_length
        for name, value in (("batch_size", self.batch_size), ("sequence_length", length)):
            if value < 1:
                raise ConfigError(f"target.{name}={value} must be at least 1")
        check_device(self.device)
        ways = measure(batch_size=self.batch_size, sequence_length=length) if measure is not None and self.device == MEASURED else None
        return Workload(self.batch_size, length, self.device, ways)


@dataclass(frozen=True)
class Limit:
    """A quantity between two bounds; ``centre`` is the middle of a band; ``words`` is how the user said it."""

    quantity: str
    low: float
    high: float
    centre: float | None
    words: str

    def shortfall(self, values: Values) -> Values:
        """How far values lie outside, as a share of the bound; 0 inside. [points]"""
        below = (self.low - values) / max(abs(self.centre or self.low), 1e-300) if math.isfinite(self.low) else np.zeros(len(values))
        above = (values - self.high) / max(abs(self.centre or self.high), 1e-300) if math.isfinite(self.high) else np.zeros(len(values))
        return np.maximum(np.maximum(below, above), 0.0)

    def distance(self, values: Values) -> Values:
        """How far values lie from the middle of a band, or inside from the bound. [points]"""
        if self.centre is not None:
            return np.abs(values - self.centre)
        return np.abs(values - (self.high if math.isfinite(self.high) else self.low))


def explicit_shape(target: TargetConfig, teacher: Architecture) -> Architecture:
    """The shape that ``target=explicit`` describes; what is not given stays as the teacher's, or follows what its config ties it to.

    Raises:
        ConfigError: nothing is given.
        ArchitectureError: it is not a sub-shape of the teacher.
    """
    given = {key: value for key in SIZES if (value := getattr(target, key)) is not None}
    if not given:
        raise ConfigError(f"target=explicit needs at least one of {', '.join(f'target.{key}' for key in SIZES)}")
    shape = teacher.with_coupled(**given)
    shape.check_within(teacher)
    return shape


def budget(target: TargetConfig, teacher: Architecture) -> float:
    """The parameter budget.

    Raises:
        ConfigError: none, two, a value out of range, or one above the teacher.
    """
    if (target.num_parameters is None) == (target.ratio is None):
        given = "neither" if target.ratio is None else "both"
        raise ConfigError(
            f"give target.num_parameters or target.ratio; {given} of them is set"
            if given == "neither"
            else "target.num_parameters and target.ratio are both set; give one"
        )
    if not 0 <= target.tolerance < 1:
        raise ConfigError(f"target.tolerance={target.tolerance} is not a share between 0 and 1")
    wanted = target.num_parameters if target.num_parameters is not None else (target.ratio or 0.0) * teacher.num_parameters
    if wanted <= 0:
        raise ConfigError(f"the target of {wanted:g} parameters is not positive")
    if wanted > teacher.num_parameters:
        raise ConfigError(f"the target of {wanted:.4g} parameters is larger than the teacher, which has {teacher.num_parameters:,}")
    return wanted


def limits_of(target: TargetConfig, teacher: Architecture, workload: Workload) -> list[Limit]:
    """Everything that a shape must keep, the budget first.

    Raises:
        ConfigError: no limit at all, an unknown quantity, a bound that cannot be read, that the teacher itself does not reach, or that
            contradicts another.
    """
    found = []
    if not target.limits or target.num_parameters is not None or target.ratio is not None:
        wanted = budget(target, teacher)
        words = f"{wanted:,.0f} parameters within {target.tolerance:.1%}"
        found.append(Limit("num_parameters", wanted * (1 - target.tolerance), wanted * (1 + target.tolerance), wanted, words))
    whole = Grid.of_shapes([teacher], teacher)
    for quantity, value in (target.limits or {}).items():
        if quantity not in QUANTITIES:
            raise ConfigError(f"target.limits has '{quantity}'; {nearest(quantity, QUANTITIES)}")
        limit = _limit(quantity, value, target.tolerance)
        known = not QUANTITIES[quantity].timed or workload.device != MEASURED
        if known and QUANTITIES[quantity].grows and limit.low > 0 and limit.low > (most := float(predict(whole, quantity, workload)[0])):
            raise ConfigError(f"{limit.words} is larger than the teacher, which has {QUANTITIES[quantity].show(most)}")
        found.append(limit)
    for number, one in enumerate(found):
        for other in found[:number]:
            if one.quantity == other.quantity and max(one.low, other.low) > min(one.high, other.high):
                raise ConfigError(f"{other.words} and {one.words} contradict each other: no value meets both")
    return found


def _limit(quantity: str, value: Any, tolerance: float) -> Limit:
    """One entry of ``target.limits``."""
    where = f"target.limits.{quantity}"
    given = value if isinstance(value, dict) else {"at_most" if QUANTITIES[quantity].grows else "at_least": value}
    unknown = [key for key in given if key not in _BOUNDS]
    if unknown:
        raise ConfigError(f"{where} has '{unknown[0]}'; {nearest(unknown[0], _BOUNDS)}")
    for key, number in given.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or number < 0 or (key != "tolerance" and number == 0):
            raise ConfigError(f"{where}: {key}={number!r} is not a positive number")
    words = f"{where}={value}" if not isinstance(value, dict) else f"{where}={{{', '.join(f'{key}: {number}' for key, number in value.items())}}}"
    low, high, centre = float(given.get("at_least", -math.inf)), float(given.get("at_most", math.inf)), given.get("around")
    if centre is not None:
        if "at_most" in given or "at_least" in given:
            raise ConfigError(f"{words}: give around, or at_most and at_least")
        share = given.get("tolerance", tolerance)
        low, high = centre * (1 - share), centre * (1 + share)
    elif not set(given) & {"at_most", "at_least"}:
        raise ConfigError(f"{words}: give at_most, at_least or around")
    if low > high:
        raise ConfigError(f"{words} contradicts itself: at_least is above at_most")
    return Limit(quantity, low, high, None if centre is None else float(centre), words)


def require_limits(shape: Architecture, limits: list[Limit], teacher: Architecture, workload: Workload) -> None:
    """Refuse one shape that breaks a limit.

    Raises:
        ArchitectureError: it does; the limit and the value are named.
    """
    grid = Grid.of_shapes([shape], teacher)
    for limit in limits:
        value = float(predict(grid, limit.quantity, workload)[0])
        if not limit.low <= value <= limit.high:
            raise ArchitectureError(f"the target shape {shape.name} has {QUANTITIES[limit.quantity].show(value)}, which breaks {limit.words}")
