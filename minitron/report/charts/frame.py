"""What every chart shares: the figure around it, drawn once for screens and once for phones, and the axes inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass

from minitron.report.charts.scales import Scale
from minitron.report.markup import Child, Html, join, tag

#: Widths in user units of the two drawings of a chart; the style sheet shows the one that fits.
WIDE, NARROW = 800, 350
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 22, 38


@dataclass(frozen=True)
class Key:
    """One entry of a legend: colour class, words, and the kind of mark (``line``, ``box``, ``dot``)."""

    style: str
    label: str
    mark: str = "box"


def figure(title: str, draw: Callable[[int], Html], *, note: Child = None, keys: Iterable[Key] = (), wide: int = WIDE) -> Html:
    """A titled chart. ``draw`` is called with the width of each drawing, so that its text keeps its size on a phone."""
    entries = [tag("li", tag("i", class_=f"key {key.mark} {key.style}"), key.label) for key in keys]
    return tag(
        "figure",
        tag("figcaption", tag("h3", title), tag("p", note) if note else None),
        tag("ul", entries, class_="legend") if entries else None,
        tag("div", draw(wide), class_="wide"),
        tag("div", draw(NARROW), class_="narrow"),
    )


def svg(*children: Child, width: float, height: float, label: str) -> Html:
    """The root of a drawing; ``label`` is what a screen reader says."""
    return tag("svg", *children, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label)


def text(x: float, y: float, words: str, *, anchor: str = "start", style: str = "tick") -> Html:
    """A line of text at a baseline."""
    return tag("text", words, x=float(x), y=float(y), text_anchor=None if anchor == "start" else anchor, class_=style)


def tooltip(words: str) -> Html:
    """The description that a browser shows on hover and a screen reader speaks."""
    return tag("title", words)


def y_axis(scale: Scale, *, left: float, right: float, label: str) -> Html:
    """Horizontal grid lines with their values, and the axis label above them."""
    drawn = []
    for tick in scale.ticks:
        y = scale(tick)
        drawn += [tag("line", x1=float(left), x2=float(right), y1=y, y2=y, class_="grid"), text(left - 6, y + 4, scale.label(tick), anchor="end")]
    return join(drawn, text(0, scale.end - 10, label, style="axis"))


def x_axis(scale: Scale, *, y: float, label: str) -> Html:
    """Tick values under the plot, and the axis label under them."""
    drawn = [tag("line", x1=scale.start, x2=scale.end, y1=float(y), y2=float(y), class_="base")]
    for tick in scale.ticks:
        x = scale(tick)
        anchor = "end" if x > scale.end - 8 else "middle"
        drawn += [tag("line", x1=x, x2=x, y1=float(y), y2=y + 4.0, class_="base"), text(x, y + 17, scale.label(tick), anchor=anchor)]
    return join(drawn, text(scale.end, y + 33, label, anchor="end", style="axis"))


def layer_axis(num_layers: int, *, left: float, right: float, y: float, gone: Set[int] = frozenset()) -> Html:
    """Layer numbers under columns that share the width equally; those of dropped layers in the colour of pruning."""
    width = (right - left) / num_layers
    stride = next(s for s in (1, 2, 5, 10, 20, 50, 100) if s * width >= 24 or s == 100)
    style = {True: "tick lost", False: "tick"}
    numbers = [text(left + (i + 0.5) * width, y + 15, str(i), anchor="middle", style=style[i in gone]) for i in range(0, num_layers, stride)]
    return join(numbers, text(right, y + 31, "layer", anchor="end", style="axis"))
