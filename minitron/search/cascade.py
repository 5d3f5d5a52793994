"""Section ``cascade``: one teacher to several sizes, what each is cut from and taught by."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minitron.core.architecture import Architecture
from minitron.core.options import option
from minitron.errors import ArchitectureError, ConfigError, nearest
from minitron.search.space import SearchConfig
from minitron.search.target import SIZES, TargetConfig

SOURCES = ("previous", "original")
#: No model has fewer parameters.
_FEWEST = 1000


@dataclass(frozen=True)
class CascadeConfig:
    """Section ``cascade``."""

    sizes: list[float | dict[str, Any]] = option(
        [], "the largest first: shares of the original (0.5), numbers of parameters (4.0e9), or options of target ({num_layers: 16})"
    )
    cut_from: str = option("previous", "what a size is cut from: previous (the next larger result) or original")
    distill_from: str = option("original", "what a size is distilled from: original or previous")
    scratch_tokens: float | None = option(None, "tokens that one size would take from scratch, for the comparison of costs; null: none")

    def check(self) -> None:
        """Refuse what no teacher could make good.

        Raises:
            ConfigError: fewer than two sizes, numbers that do not fall, or an unknown word.
        """
        for key, value in (("cut_from", self.cut_from), ("distill_from", self.distill_from)):
            if value not in SOURCES:
                raise ConfigError(f"cascade.{key}={value} is unknown; {nearest(value, SOURCES)}")
        if not self.sizes:
            raise ConfigError("a cascade has no sizes: give them from the largest on, e.g. cascade.sizes=[0.5,0.25] or [8e9,4e9]")
        if len(self.sizes) == 1:
            raise ConfigError(f"cascade.sizes={self.sizes} is one size: give two or more, or use compress with a target")
        for size in self.sizes:
            _check_size(size)
        for larger, size in zip(self.sizes, self.sizes[1:], strict=False):
            if not isinstance(size, dict) and not isinstance(larger, dict) and (size <= 1) == (larger <= 1) and size >= larger:
                told = "comes twice" if size == larger else f"follows {larger:g}"
                raise ConfigError(f"cascade.sizes={self.sizes}: {size:g} {told}, but sizes fall from the largest to the smallest")
        names = self.names
        if len(set(names)) < len(names):
            raise ConfigError(f"cascade.sizes={self.sizes}: two sizes would both be called {next(name for name in names if names.count(name) > 1)}")
        if self.scratch_tokens is not None and self.scratch_tokens <= 0:
            raise ConfigError(f"cascade.scratch_tokens={self.scratch_tokens:g} must be above 0")

    @property
    def names(self) -> list[str]:
        """What the sizes and their folders are called: ``0.5``, ``4B``, ``layers16-hidden3072``."""
        return [_name(size) for size in self.sizes]


def _check_size(size: float | dict[str, Any]) -> None:
    if isinstance(size, dict):
        known = [f.name for f in dataclasses.fields(TargetConfig) if f.name != "name"]
        for key in size:
            if key not in known:
                raise ConfigError(f"cascade.sizes has {size} with '{key}'; {nearest(key, known)}")
        if not size:
            raise ConfigError("cascade.sizes has {}, which says nothing of a size")
    elif size <= 0 or 1 <= size < _FEWEST:
        raise ConfigError(f"cascade.sizes has {size:g}, which is neither a share of the original (above 0, below 1) nor a number of parameters")


def _name(size: float | dict[str, Any]) -> str:
    if isinstance(size, dict):
        return "-".join(f"{key.removeprefix('num_').removesuffix('_size')}{value}" for key, value in size.items() if not isinstance(value, dict))
    for unit, factor in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if size >= factor:
            return f"{size / factor:g}{unit}"
    return f"{size:g}"


def target_of(size: float | dict[str, Any], base: TargetConfig, original: Architecture) -> TargetConfig:
    """The target of one size: shares are of the original, whatever it is cut from; bands and limits are those of ``base``.

    Raises:
        ConfigError: it is not smaller than the original.
    """
    if isinstance(size, dict):
        if any(key in SIZES for key in size):
            return dataclasses.replace(base, name="explicit", num_parameters=None, ratio=None, **size)
        given = dict(size)
        if (ratio := given.pop("ratio", None)) is not None:
            given["num_parameters"] = ratio * original.num_parameters
        return dataclasses.replace(base, **{"name": "parameters", "num_parameters": None, "ratio": None, **given})
    budget = size * original.num_parameters if size <= 1 else size
    if budget >= original.num_parameters:
        raise ConfigError(f"cascade.sizes has {size:g}, which is not below the original's {original.num_parameters:,} parameters")
    return dataclasses.replace(base, name="parameters", num_parameters=budget, ratio=None)


def narrowed(search: SearchConfig, shape: Architecture) -> SearchConfig:
    """The space without the values above a shape's own, which are for a larger model; a list of which none is left holds the shape's own."""
    changes: dict[str, Any] = {}
    for key, axis in SIZES.items():
        given, most = getattr(search, key), shape.size(axis)
        if isinstance(given, list):
            changes[key] = [value for value in given if value <= most] or [most]
        elif isinstance(given, dict) and isinstance(given.get("to"), int) and given["to"] > most:
            changes[key] = {**given, "to": most, "from": min(given.get("from", most), most)}
    return dataclasses.replace(search, **changes)


def require_falling(names: Sequence[str], shapes: Sequence[Architecture], original: Architecture) -> None:
    """Refuse a size that is not smaller than the one before it.

    Raises:
        ArchitectureError: one is not; both are named with their parameters.
    """
    larger, before = "the original", original.num_parameters
    for name, shape in zip(names, shapes, strict=True):
        if shape.num_parameters >= before:
            told = f"{shape.name} of {shape.num_parameters:,} parameters, which is not below {larger} with {before:,}"
            raise ArchitectureError(f"size {name} of the cascade would be {told}: lower it or narrow target.tolerance")
        larger, before = f"size {name}", shape.num_parameters
