"""Two small drawings of losses on a line: the damage and its repair, and a candidate before and after its test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minitron.report.charts.frame import svg, text, tooltip
from minitron.report.charts.scales import Scale, linear
from minitron.report.formats import loss
from minitron.report.markup import Html, join, tag


@dataclass(frozen=True)
class Point:
    """A model on the damage scale."""

    style: str
    label: str
    value: float


def _anchor(x: float, left: float, right: float, width: float) -> str:
    """Which side of a point its label goes, so that it stays inside the drawing."""
    if x - left < width / 2:
        return "start"
    return "end" if right - x < width / 2 else "middle"


def _stop(point: Point, scale: Scale, *, baseline: float, above: float) -> Html:
    x = scale(point.value)
    words = f"{point.label} {loss(point.value)}"
    anchor = _anchor(x, scale.start, scale.end, 8.0 * len(words))
    from_y, to_y = (above + 5, baseline - 7) if above < baseline else (above - 13, baseline + 7)
    return join(
        tag("line", x1=x, x2=x, y1=from_y, y2=to_y, class_="lead"),
        tag("circle", tooltip(f"{point.label}: loss {loss(point.value)} nats per token"), cx=x, cy=baseline, r=7, class_=f"dot {point.style}"),
        text(x, above, words, anchor=anchor, style=f"stop {point.style}"),
    )


def damage_scale(teacher: Point, pruned: Point, student: Point | None, *, width: int, title: str, repaired: str = "") -> Html:
    """Held-out losses on one line: what pruning cost, and the stretch of it that distillation won back."""
    points = [teacher, pruned] + ([student] if student else [])
    scale = linear([p.value for p in points], start=10.0, end=width - 10.0, exact=True)
    line, top = 62.0, 36.0
    close = student is not None and abs(scale(student.value) - scale(pruned.value)) < 150
    t, p = scale(teacher.value), scale(pruned.value)
    stretches = [tag("line", tooltip("damage done by pruning"), x1=t, x2=p, y1=line, y2=line, class_="span pruned")]
    words = None
    if student is not None:
        s = scale(student.value)
        stretches.append(tag("line", tooltip("won back by distillation"), x1=p, x2=s, y1=line, y2=line, class_="span student"))
        if repaired and abs(p - s) > 8.5 * len(repaired):
            words = text((p + s) / 2, line + 21, repaired, anchor="middle", style="note")
    stops = [_stop(teacher, scale, baseline=line, above=line + 40), _stop(pruned, scale, baseline=line, above=14.0 if close else top)]
    if student is not None:
        stops.append(_stop(student, scale, baseline=line, above=top))
    return svg(
        stretches, words, stops, text(width, line + 50, "loss, nats per token →", anchor="end", style="axis"), width=width, height=118, label=title
    )


def dumbbell(before: float, after: float, *, everything: Sequence[float], style: str, words: str, width: int = 96) -> Html:
    """Loss before (hollow) and after (full) on a scale common to all rows of a table."""
    scale = linear(everything, start=7.0, end=width - 7.0, exact=True)
    a, b = scale(before), scale(after)
    return tag(
        "svg",
        tooltip(words),
        tag("line", x1=7, x2=width - 7, y1=8, y2=8, class_="grid"),
        tag("line", x1=a, x2=b, y1=8, y2=8, class_=f"ln {style}"),
        tag("circle", cx=a, cy=8, r=4, class_=f"ring {style}"),
        tag("circle", cx=b, cy=8, r=4.5, class_=f"dot {style}"),
        viewBox=f"0 0 {width} 16",
        width=width,
        height=16,
        role="img",
        aria_label=words,
        class_="mini",
    )
