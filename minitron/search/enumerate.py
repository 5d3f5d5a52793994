"""Every shape of a space that keeps all limits, and a diverse choice among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minitron.core.architecture import Architecture
from minitron.core.axes import AXES
from minitron.errors import ArchitectureError
from minitron.search.grid import Grid, Values, grid_of
from minitron.search.prediction import MEASURED, QUANTITIES, Workload, predict
from minitron.search.space import SearchConfig, axis_values
from minitron.search.target import Limit, TargetConfig, limits_of

#: Shapes of this many candidates' worth are measured, a diverse choice of them, where times are measured and limited.
_MEASURED_PER_CANDIDATE = 4


@dataclass(frozen=True)
class Found:
    """The shapes that keep all limits, nearest to the first limit first; ``num_points`` were looked at."""

    grid: Grid
    num_points: int

    def __len__(self) -> int:
        return len(self.grid)

    def shapes(self) -> list[Architecture]:
        """All of them."""
        return [self.grid.shape(index) for index in range(len(self.grid))]

    def diverse(self, count: int, *, allowed: Callable[[Architecture], bool] = lambda shape: True) -> list[Architecture]:
        """``count`` of them, far apart from each other."""
        return [self.grid.shape(index) for index in diverse_points(self.grid, count, allowed=lambda index: allowed(self.grid.shape(index)))]


def find_shapes(
    search: SearchConfig,
    target: TargetConfig,
    teacher: Architecture,
    *,
    workload: Workload,
    kept: Mapping[int, tuple[int, ...]] | None = None,
) -> Found:
    """What a search finds, from shapes alone: no model is built.

    ``kept`` are the layers that stay for each number of layers that can be kept, where scores say so; other depths are left out then. Limits on
    measured times are passed over where ``workload`` cannot measure.

    Raises:
        MinitronError: a space or limits that cannot be read, or that nothing meets (the nearest shape is named, and what excludes it).
    """
    limits = limits_of(target, teacher, workload)
    space = axis_values(search, teacher)
    if kept is not None:
        tried, reached = space["num_layers"], ", ".join(map(str, sorted(kept)))
        space["num_layers"] = [depth for depth in tried if depth in kept]
        if not space["num_layers"]:
            raise ArchitectureError(f"the search tries {' or '.join(map(str, tried))} layers; the depth scores and depth.protect allow {reached}")
    grid = grid_of(space, teacher, kept=kept)
    slow = [limit for limit in limits if QUANTITIES[limit.quantity].timed and workload.device == MEASURED]
    num_points = len(grid)
    grid = within(grid, [limit for limit in limits if limit not in slow], workload)
    if slow and workload.measure is not None:
        grid = grid.take(np.array(diverse_points(grid, _MEASURED_PER_CANDIDATE * search.num_candidates)))
        grid = within(grid, slow, workload)
    return Found(grid, num_points)


def within(grid: Grid, limits: list[Limit], workload: Workload) -> Grid:
    """The points that keep all limits, nearest to the first first, equals by size.

    Raises:
        ArchitectureError: there is none; the nearest one is named, and the limits that exclude it.
    """
    if not len(grid):
        raise ArchitectureError("the search space holds no shape: heads must divide into groups, and no size may exceed the teacher's")
    if not limits:
        return grid
    values = {limit.quantity: predict(grid, limit.quantity, workload) for limit in limits}
    shortfalls = np.stack([limit.shortfall(values[limit.quantity]) for limit in limits])
    total = shortfalls.sum(axis=0)
    ties = [grid.sizes[axis] for axis in reversed(AXES)]
    first = limits[0]
    if not (total == 0).any():
        best = int(np.lexsort([*ties, total])[0])
        broken = [(limit, float(values[limit.quantity][best])) for row, limit in enumerate(limits) if shortfalls[row, best] > 0]
        several = len(limits) > 1
        told = " and ".join(_show(limit, value) + (f", outside {limit.words}" if several else "") for limit, value in broken)
        alone = ", though each of these alone is met by some shape" if several and all((row == 0).any() for row in shortfalls) else ""
        raise ArchitectureError(
            f"no shape of the search space has {' and '.join(limit.words for limit in limits)}{alone}; the nearest is {grid.shape(best).name} with "
            f"{told}: widen {'target.tolerance' if first.quantity == 'num_parameters' else 'target.limits'} or the space"
        )
    good = np.flatnonzero(total == 0)
    order = np.lexsort([*(column[good] for column in ties), first.distance(values[first.quantity][good])])
    return grid.take(good[order])


def _show(limit: Limit, value: float) -> str:
    """A value in words, with how far it is from the middle of the band."""
    off = f" ({(value - limit.centre) / limit.centre:+.1%})" if limit.centre else ""
    return f"{QUANTITIES[limit.quantity].show(value)}{off}"


def positions(grid: Grid) -> Values:
    """Where points lie, [points, axes]: log sizes, each axis scaled to the range that the points take on it."""
    logs = np.log(np.maximum(1, np.stack([grid.sizes[axis] for axis in AXES], axis=1)).astype(np.float64))
    extent = logs.max(axis=0) - logs.min(axis=0)
    return logs / np.where(extent > 0, extent, 1.0)


def diverse_points(grid: Grid, count: int, *, allowed: Callable[[int], bool] = lambda index: True) -> list[int]:
    """Numbers of ``count`` allowed points far apart from each other, starting from the first allowed one; ascending.

    Greedy farthest-point choice: a budget's neighbourhood is full of near copies, and ranking near copies teaches nothing.
    """
    places = positions(grid) if len(grid) else np.zeros((0, len(AXES)))
    distance: Any = np.full(len(grid), np.inf)
    chosen: list[int] = []
    while len(chosen) < count and len(grid) and (index := int(np.argmax(distance))) is not None and distance[index] > 0:
        if not allowed(index):
            distance[index] = 0.0
            continue
        chosen.append(index)
        distance = np.minimum(distance, np.linalg.norm(places - places[index], axis=1))
        distance[index] = 0.0
    return sorted(chosen)
