"""The space of shapes (section ``search``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minitron.core.architecture import Architecture
from minitron.core.options import option
from minitron.errors import ArchitectureError, ConfigError, nearest
from minitron.search.target import SIZES

#: Shares of the teacher's size that are tried on an axis for which no values are given.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4, 0.3, 0.25)
#: Axes whose sizes divide by ``search.divisor``.
_DIVIDED = ("hidden", "ffn", "expert_ffn", "shared_ffn")
_RANGE = ("from", "to", "step")


@dataclass(frozen=True)
class SearchConfig:
    """Section ``search``. An axis is given as a list of sizes, ``{from, to, step}``, or ``{shares}`` of the teacher's size."""

    num_candidates: int = option(20, "shapes to keep when more are within the band")
    axes: list[str] = option(["layer", "hidden", "ffn"], "axes searched on a grid of shares when no values are given for them")
    num_layers: list[int] | dict[str, Any] | None = option(None, "numbers of layers to try: a list, {from, to, step} or {shares}")
    hidden_size: list[int] | dict[str, Any] | None = option(None, "hidden sizes to try, likewise")
    ffn_size: list[int] | dict[str, Any] | None = option(None, "ffn sizes to try, likewise")
    ffn_ratio: list[float] | None = option(None, "ffn sizes to try, as multiples of the hidden size")
    num_heads: list[int] | dict[str, Any] | None = option(None, "numbers of query heads to try, likewise")
    num_kv_heads: list[int] | dict[str, Any] | None = option(None, "numbers of key-value groups to try, likewise")
    num_experts: list[int] | dict[str, Any] | None = option(None, "numbers of experts to try, likewise")
    expert_ffn_size: list[int] | dict[str, Any] | None = option(None, "neurons of an expert to try, likewise")
    shared_ffn_size: list[int] | dict[str, Any] | None = option(None, "neurons of a shared expert to try, likewise")
    divisor: int | dict[str, int] = option(64, "hidden and ffn sizes made from shares divide by this; or {hidden: 256, ffn: 128}")

    def divisor_of(self, axis: str) -> int:
        """What sizes of an axis divide by."""
        return int(self.divisor.get(axis, 64)) if isinstance(self.divisor, dict) else self.divisor

    def check(self) -> None:
        """Refuse what no teacher could meet.

        Raises:
            ConfigError: an unknown axis, both ways of giving ffn sizes, or a number below 1.
        """
        for axis in [*self.axes, *(self.divisor if isinstance(self.divisor, dict) else ())]:
            if axis not in SIZES.values():
                where = "search.axes" if axis in self.axes else "search.divisor"
                raise ConfigError(f"{where} has '{axis}'; known: {', '.join(SIZES.values())}")
        if self.ffn_size and self.ffn_ratio:
            raise ConfigError("search.ffn_size and search.ffn_ratio are both set; give one")
        if self.num_candidates < 1:
            raise ConfigError(f"search.num_candidates={self.num_candidates} must be at least 1")
        for axis in _DIVIDED:
            if self.divisor_of(axis) < 1:
                raise ConfigError(f"search.divisor={self.divisor} must be at least 1")


def _rounded(size: int, shares: list[float] | tuple[float, ...], divisor: int) -> list[int]:
    """Shares of a size, rounded to multiples of a divisor and never above it."""
    rounded = {max(divisor, round(size * share / divisor) * divisor) for share in shares}
    return sorted(value for value in rounded if value <= size)


def _grid(size: int, divisor: int) -> list[int]:
    return sorted({*_rounded(size, _SHARES, divisor), size})


def _listed(key: str, given: Any, size: int, divisor: int) -> list[int]:
    """The sizes that a list, a range or shares spell out.

    Raises:
        ConfigError: a form that is none of these.
        ArchitectureError: a value above the teacher's, or below 1.
    """
    where = f"search.{key}"
    values = given
    if isinstance(given, dict):
        unknown = [word for word in given if word not in (*_RANGE, "shares")]
        if unknown or ("shares" in given) == any(word in given for word in _RANGE):
            raise ConfigError(
                f"{where}={given} is neither {{from, to, step}} nor {{shares: […]}}"
                + (f"; {nearest(unknown[0], (*_RANGE, 'shares'))}" if unknown else "")
            )
        if "shares" in given:
            shares = given["shares"]
            if not isinstance(shares, list) or not all(isinstance(share, int | float) and 0 < share <= 1 for share in shares) or not shares:
                raise ConfigError(f"{where}.shares={shares} is not a list of shares above 0 and up to 1")
            values = _rounded(size, shares, divisor)
        else:
            if (
                not all(isinstance(given.get(word, 1), int) for word in _RANGE)
                or "to" not in given
                or "from" not in given
                or given.get("step", 1) < 1
            ):
                raise ConfigError(f"{where}={given} needs whole numbers from, to and step, the last at least 1")
            values = list(range(given["from"], given["to"] + 1, given.get("step", 1)))
    if not values:
        raise ConfigError(f"{where}={given} holds no value")
    wrong = [value for value in values if not 1 <= value <= size]
    if wrong:
        raise ArchitectureError(f"{where} has {wrong[0]}, which is not between 1 and the teacher's {size}")
    return sorted(set(values))


def axis_values(config: SearchConfig, teacher: Architecture) -> dict[str, list[Any]]:
    """Values to try per size; ``ffn_ratio`` stands in place of ``ffn_size`` when it is given.

    Raises:
        ConfigError: an unknown axis, or both ways of giving ffn sizes.
        ArchitectureError: a value above the teacher's, or heads that divide into none of the groups that are tried.
    """
    config.check()
    values: dict[str, list[Any]] = {}
    for key, axis in SIZES.items():
        size, given, divisor = teacher.size(axis), getattr(config, key), _divisor(config, axis, teacher)
        if given is not None:
            values[key] = _listed(key, given, size, divisor)
        elif axis not in config.axes or size == 0:
            values[key] = [size]
        else:
            values[key] = _grid(size, divisor)
    if config.ffn_ratio:
        values["ffn_ratio"] = sorted(set(config.ffn_ratio))
    _check_groups(config, values, teacher)
    return values


def _divisor(config: SearchConfig, axis: str, teacher: Architecture) -> int:
    """What shares of an axis are rounded to."""
    if axis in _DIVIDED:
        return max(1, min(config.divisor_of(axis), teacher.size(axis)))
    if axis == "head":  # whole numbers of heads in every group, unless groups go along
        follow = any((coupling.axis, coupling.other) == ("kv_head", "head") for coupling in teacher.couplings)
        return 1 if follow else teacher.num_kv_heads
    return 1


def _check_groups(config: SearchConfig, values: dict[str, list[Any]], teacher: Architecture) -> None:
    """Refuse heads and groups, given by the user, that go together with none of the other that is tried."""
    if any("head" in (coupling.axis, coupling.other) for coupling in teacher.couplings):
        return  # one follows the other, or is compared with it later
    heads, groups, most = values["num_heads"], values["num_kv_heads"], teacher.num_heads // teacher.num_kv_heads

    def fit(head: int, group: int) -> bool:
        return head % group == 0 and head // group <= most

    for head in heads if config.num_heads is not None else ():
        if not any(fit(head, group) for group in groups):
            told = f"with at most {most} heads in each, as the teacher's"
            raise ArchitectureError(
                f"search.num_heads has {head}, which does not divide into {' or '.join(map(str, groups))} key-value groups {told}"
            )
    for group in groups if config.num_kv_heads is not None else ():
        if not any(fit(head, group) for head in heads):
            tried = " or ".join(map(str, heads))
            raise ArchitectureError(f"search.num_kv_heads has {group}, over which {tried} heads do not spread with at most {most} in each group")
