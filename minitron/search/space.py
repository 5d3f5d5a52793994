"""The budget (section ``target``) and the space of shapes (section ``search``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minitron.core.architecture import Architecture
from minitron.core.options import option
from minitron.errors import ArchitectureError, ConfigError

_SIZES = {
    "num_layers": "layer",
    "hidden_size": "hidden",
    "ffn_size": "ffn",
    "num_heads": "head",
    "num_kv_heads": "kv_head",
    "num_experts": "expert",
    "expert_ffn_size": "expert_ffn",
    "shared_ffn_size": "shared_ffn",
}
#: Shares of the teacher's size that are tried on an axis for which no values are given.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4, 0.3, 0.25)


@dataclass(frozen=True)
class TargetConfig:
    """Section ``target``: a budget, or with ``target=explicit`` a shape."""

    name: str = option("parameters", "parameters: search near a budget; explicit: one given shape")
    num_parameters: float | None = option(None, "parameter budget, e.g. 4.0e9")
    ratio: float | None = option(None, "budget as a share of the teacher's parameters, e.g. 0.5")
    tolerance: float = option(0.05, "band around the budget, as a share of it")
    num_layers: int | None = option(None, "explicit: layers to keep")
    hidden_size: int | None = option(None, "explicit: hidden channels to keep")
    ffn_size: int | None = option(None, "explicit: neurons to keep in every MLP")
    num_heads: int | None = option(None, "explicit: query heads to keep")
    num_kv_heads: int | None = option(None, "explicit: key-value groups to keep")
    num_experts: int | None = option(None, "explicit: experts to keep in every layer that has them")
    expert_ffn_size: int | None = option(None, "explicit: neurons to keep in every expert")
    shared_ffn_size: int | None = option(None, "explicit: neurons to keep in every shared expert")


@dataclass(frozen=True)
class SearchConfig:
    """Section ``search``."""

    num_candidates: int = option(20, "shapes to keep when more are within the band")
    axes: list[str] = option(["layer", "hidden", "ffn"], "axes searched on a grid of shares when no values are given for them")
    num_layers: list[int] | None = option(None, "numbers of layers to try")
    hidden_size: list[int] | None = option(None, "hidden sizes to try")
    ffn_size: list[int] | None = option(None, "ffn sizes to try")
    ffn_ratio: list[float] | None = option(None, "ffn sizes to try, as multiples of the hidden size")
    num_heads: list[int] | None = option(None, "numbers of query heads to try")
    num_kv_heads: list[int] | None = option(None, "numbers of key-value groups to try")
    num_experts: list[int] | None = option(None, "numbers of experts to try")
    expert_ffn_size: list[int] | None = option(None, "neurons of an expert to try")
    shared_ffn_size: list[int] | None = option(None, "neurons of a shared expert to try")
    divisor: int = option(64, "hidden and ffn sizes of the grid of shares divide by this")


def explicit_shape(target: TargetConfig, teacher: Architecture) -> Architecture:
    """The shape that ``target=explicit`` describes; what is not given stays as the teacher's, or follows what its config ties it to.

    Raises:
        ConfigError: nothing is given.
        ArchitectureError: it is not a sub-shape of the teacher.
    """
    given = {key: value for key in _SIZES if (value := getattr(target, key)) is not None}
    if not given:
        raise ConfigError(f"target=explicit needs at least one of {', '.join(f'target.{key}' for key in _SIZES)}")
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


def _grid(size: int, divisor: int) -> list[int]:
    rounded = {max(divisor, round(size * share / divisor) * divisor) for share in _SHARES} | {size}
    return sorted(value for value in rounded if value <= size)


def axis_values(config: SearchConfig, teacher: Architecture) -> dict[str, list[Any]]:
    """Values to try per size; ``ffn_ratio`` stands in place of ``ffn_size`` when it is given.

    Raises:
        ConfigError: an unknown axis, or both ways of giving ffn sizes.
        ArchitectureError: a value above the teacher's.
    """
    unknown = set(config.axes) - set(_SIZES.values())
    if unknown:
        raise ConfigError(f"search.axes has '{sorted(unknown)[0]}'; known: {', '.join(_SIZES.values())}")
    if config.ffn_size and config.ffn_ratio:
        raise ConfigError("search.ffn_size and search.ffn_ratio are both set; give one")
    values: dict[str, list[Any]] = {}
    for key, axis in _SIZES.items():
        size, given = teacher.size(axis), getattr(config, key)
        if given is not None:
            too_large = [value for value in given if not 1 <= value <= size]
            if too_large:
                raise ArchitectureError(f"search.{key} has {too_large[0]}, which is not between 1 and the teacher's {size}")
            values[key] = sorted(set(given))
        elif axis not in config.axes or size == 0:
            values[key] = [size]
        elif axis in ("hidden", "ffn", "expert_ffn", "shared_ffn"):
            values[key] = _grid(size, min(config.divisor, size))
        elif axis == "head":  # whole numbers of heads in every group, unless groups go along
            follow = any((coupling.axis, coupling.other) == ("kv_head", "head") for coupling in teacher.couplings)
            values[key] = _grid(size, 1 if follow else teacher.num_kv_heads)
        else:
            values[key] = _grid(size, 1)
    if config.ffn_ratio:
        values["ffn_ratio"] = sorted(set(config.ffn_ratio))
    return values
