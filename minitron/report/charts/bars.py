"""Column charts: one column per layer, on the same horizontal grid as the heat maps."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from minitron.report.charts.frame import BOTTOM, LEFT, RIGHT, TOP, layer_axis, svg, tooltip, y_axis
from minitron.report.charts.scales import linear
from minitron.report.markup import Html, tag


@dataclass(frozen=True)
class Bar:
    """One column: its value, colour class and tooltip."""

    value: float
    style: str
    words: str


def column_chart(bars: Sequence[Bar], *, width: int, height: int = 200, title: str, y_label: str, gone: Set[int] = frozenset()) -> Html:
    """Columns from nought, one a layer; negative values hang below. The numbers of ``gone`` layers stand out."""
    right, bottom = width - RIGHT, height - BOTTOM
    scale = linear([bar.value for bar in bars], start=bottom, end=TOP, zero=True, num_ticks=4)
    step = (right - LEFT) / len(bars)
    gap = 1.0 if step < 8 else step * 0.18
    drawn = []
    for index, bar in enumerate(bars):
        top, base = sorted((scale(bar.value), scale(0.0)))
        height_of_bar = max(base - top, 0.75)  # a score near nought stays visible
        box = {"x": LEFT + index * step + gap / 2, "y": base - height_of_bar, "width": step - gap, "height": height_of_bar}
        drawn.append(tag("rect", tooltip(bar.words), **box, class_=f"bar {bar.style}"))
    return svg(
        y_axis(scale, left=LEFT, right=right, label=y_label),
        drawn,
        layer_axis(len(bars), left=LEFT, right=right, y=bottom, gone=gone),
        width=width,
        height=height,
        label=title,
    )
