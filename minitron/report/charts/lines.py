"""Line charts: curves with labels at their ends, a tooltip on every point that can be told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minitron.report.charts.frame import BOTTOM, LEFT, RIGHT, TOP, svg, text, tooltip, x_axis, y_axis
from minitron.report.charts.scales import Scale, linear, logarithmic
from minitron.report.formats import count, number
from minitron.report.markup import Html, join, tag

#: A curve of more points has no visible dots, and one of more than the second number only about that many tooltips.
_MAX_DOTS, _MAX_TOOLTIPS = 20, 40
_END_GAP = 12


@dataclass(frozen=True)
class Series:
    """One curve.

    ``style`` is its colour class, with ``faint`` or ``dashed`` added as wanted; ``end`` is written at its last point;
    ``dots`` False leaves out dots and tooltips.
    """

    label: str
    points: Sequence[tuple[float, float]]
    style: str
    end: str = ""
    dots: bool = True


@dataclass(frozen=True)
class Rule:
    """A vertical line that divides the plot, with words beside it."""

    x: float
    label: str


def _path(points: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    return "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)


def _curve(series: Series, x: Scale, y: Scale, x_label: str) -> Html:
    """The line, then its dots: visible when few, else invisible places to hover."""
    line = tag("path", tooltip(series.label), d=_path(series.points, x, y), class_=f"ln {series.style}") if len(series.points) > 1 else None
    if not series.dots:
        return join(line)
    stride = max(1, len(series.points) // _MAX_TOOLTIPS)
    few = len(series.points) <= _MAX_DOTS
    dots = []
    for a, b in series.points[::stride]:
        words = f"{series.label}: {number(b)} at {count(a)} {x_label}"
        dots.append(tag("circle", tooltip(words), cx=x(a), cy=y(b), r=3 if few else 6, class_=f"dot {series.style}" if few else "hover"))
    return join(line, dots)


def _ends(drawn: Sequence[Series], x: Scale, y: Scale) -> Html:
    """Labels beside the last points, pushed apart where they would overlap."""
    labelled = sorted((s for s in drawn if s.end), key=lambda s: y(s.points[-1][1]))
    places = [y(s.points[-1][1]) for s in labelled]
    for _ in range(200):  # neighbours that are too close share the way apart; settles long before
        for index in range(1, len(places)):
            lacking = _END_GAP - (places[index] - places[index - 1])
            if lacking > 0:
                places[index - 1] -= lacking / 2
                places[index] += lacking / 2
    return join(text(x(s.points[-1][0]) + 7, at + 4, s.end, style=f"end {s.style}") for at, s in zip(places, labelled, strict=True))


def line_chart(
    series: Sequence[Series],
    *,
    width: int,
    height: int = 240,
    title: str,
    x_label: str,
    y_label: str,
    y_log: bool = False,
    x_zero: bool = False,
    y_zero: bool = False,
    rule: Rule | None = None,
) -> Html:
    """Curves over a common axis; series without points are left out."""
    drawn = [s for s in series if s.points]
    xs, ys = [a for s in drawn for a, _ in s.points], [b for s in drawn for _, b in s.points]
    room = 9 + 7 * max((len(s.end) for s in drawn), default=0)
    left, right, bottom = LEFT, width - max(RIGHT, room if room > 9 else 0), height - BOTTOM
    x = linear(xs, start=left, end=right, num_ticks=min(8, max(3, width // 80)), exact=True, zero=x_zero)
    y = logarithmic(ys, start=bottom, end=TOP) if y_log else linear(ys, start=bottom, end=TOP, zero=y_zero)
    divider = None
    if rule is not None and x.low <= rule.x <= x.high:
        at = x(rule.x)
        side = "end" if at > (left + right) / 2 else "start"
        divider = join(
            tag("line", x1=at, x2=at, y1=float(TOP), y2=float(bottom), class_="rule"),
            text(at + (-6 if side == "end" else 6), TOP + 12, rule.label, anchor=side, style="note"),
        )
    return svg(
        y_axis(y, left=left, right=right, label=y_label),
        x_axis(x, y=bottom, label=x_label),
        divider,
        [_curve(s, x, y, x_label) for s in drawn],
        _ends(drawn, x, y),
        width=width,
        height=height,
        label=title,
    )
