"""Heat maps with layers as columns. Colour tells a score's place between the lowest and the highest of the whole map."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from itertools import groupby

from minitron.report.charts.frame import BOTTOM, LEFT, RIGHT, TOP, layer_axis, svg, text, tooltip
from minitron.report.formats import number
from minitron.report.markup import Html, join, tag

#: Steps of the colour ramp; classes ``q0`` (low) to ``q8`` (high) of the style sheet.
LEVELS = 9
_RAMP_WIDTH = 90


def _leveller(values: list[float]) -> tuple[Callable[[float], int], bool]:
    """Value → colour step: logarithmic when all values are positive and span more than a factor of ten.

    The ramp runs from the 1st to the 99th percentile, so that one outlier does not wash out the rest.
    """
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 100], ordered[-1 - len(ordered) // 100]
    log = low > 0 and high / low > 10
    bottom, top = (math.log(low), math.log(high)) if log else (low, high)
    span = (top - bottom) or 1.0

    def level(value: float) -> int:
        here = (math.log(value) if value > 0 else bottom) if log else value
        return max(0, min(LEVELS - 1, int((here - bottom) / span * LEVELS)))

    return level, log


def _ramp(width: float, low: float, high: float, log: bool) -> Html:
    """The colour key at the top right."""
    words = f"{number(high)} (log)" if log else number(high)
    start = width - RIGHT - _RAMP_WIDTH - 8 - 7.5 * len(words)
    boxes = [tag("rect", x=start + i * _RAMP_WIDTH / LEVELS, y=3, width=_RAMP_WIDTH / LEVELS + 0.3, height=9, class_=f"q{i}") for i in range(LEVELS)]
    return join(boxes, text(start - 6, 12, number(low), anchor="end"), text(width - RIGHT, 12, words, anchor="end"))


def _column(values: Sequence[float], level: Callable[[float], int], *, x: float, width: float, row: float, words: str) -> Html:
    """One column; neighbouring cells of one colour are a single box, so a sorted column is at most nine of them."""
    boxes, done = [], 0
    for step, run in groupby(level(value) for value in values):
        length = len(list(run))
        boxes.append(tag("rect", x=x, y=TOP + done * row, width=width, height=length * row + 0.2, class_=f"q{step}"))
        done += length
    return tag("g", tooltip(words), boxes)


def _cells(values: Sequence[float], level: Callable[[float], int], *, x: float, width: float, row: float, words: Sequence[str]) -> Html:
    """One column of single cells with a tooltip each."""
    return join(
        tag("rect", tooltip(words[i]), x=x, y=TOP + i * row, width=width, height=max(row - 1, 0.5), class_=f"q{level(value)}")
        for i, value in enumerate(values)
    )


def heat_map(
    columns: Sequence[Sequence[float]],
    words: Sequence[Sequence[str]],
    *,
    width: int,
    row_height: float,
    title: str,
    y_label: str,
    y_ends: tuple[str, str],
    cut: float | None = None,
    gone: Set[int] = frozenset(),
    crossed: Set[tuple[int, int]] = frozenset(),
) -> Html:
    """A map of ``columns`` [layers][units].

    Args:
        words: per column either one tooltip (cells of one colour are merged) or one for every cell.
        y_ends: labels of the first and the last row.
        cut: share of the rows above a dividing line.
        gone: columns (layers) that are dropped, drawn grey.
        crossed: (column, row) of single dropped units, drawn with a cross.
    """
    rows = max(len(column) for column in columns)
    right, bottom = width - RIGHT, TOP + rows * row_height
    step = (right - LEFT) / len(columns)
    flat = [value for column in columns for value in column]
    level, log = _leveller(flat)
    drawn: list[Html] = []
    for index, column in enumerate(columns):
        x, cell = LEFT + index * step, step - (1.0 if step > 5 else 0.0)
        if len(words[index]) == 1:
            body = _column(column, level, x=x, width=cell, row=row_height, words=words[index][0])
        else:
            body = _cells(column, level, x=x, width=cell, row=row_height, words=words[index])
        drawn.append(tag("g", body, class_="gone") if index in gone else body)
    reach = min(step, row_height) * 0.22
    crosses = [
        f"M{cx - reach:.1f} {cy - reach:.1f}l{2 * reach:.1f} {2 * reach:.1f}m0 {-2 * reach:.1f}l{-2 * reach:.1f} {2 * reach:.1f}"
        for c, r in sorted(crossed)
        for cx, cy in [(LEFT + (c + 0.5) * step, TOP + (r + 0.5) * row_height)]
    ]
    line_y = TOP + cut * rows * row_height if cut is not None else 0.0
    return svg(
        text(0, 12, y_label, style="axis"),
        _ramp(width, min(flat), max(flat), log),
        text(LEFT - 6, TOP + 10, y_ends[0], anchor="end"),
        text(LEFT - 6, bottom - 2, y_ends[1], anchor="end") if rows * row_height > 24 else None,
        drawn,
        tag("path", tooltip("dropped"), d="".join(crosses), class_="cross") if crosses else None,
        tag("line", x1=float(LEFT), x2=float(right), y1=line_y, y2=line_y, class_="cut") if cut is not None and cut < 1 else None,
        layer_axis(len(columns), left=LEFT, right=right, y=bottom, gone=gone),
        width=width,
        height=bottom + BOTTOM,
        label=title,
    )
