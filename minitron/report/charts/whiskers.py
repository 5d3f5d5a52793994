"""Scores of several models, task by task: a dot for each, with its standard error to both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minitron.report.charts.frame import svg, text, tooltip, x_axis
from minitron.report.charts.scales import Scale, linear
from minitron.report.formats import number
from minitron.report.markup import Html, join, tag

_ROW, _LANE, _FOOT = 20, 13, 40


@dataclass(frozen=True)
class Score:
    """One model's score: its colour class and name, the value, and its standard error where it has one."""

    style: str
    label: str
    value: float
    error: float | None = None

    @property
    def words(self) -> str:
        """0.455 ± 0.010, 63.2 ± 4.10."""
        if self.error is None:
            return number(self.value)
        return f"{self.value:.3f} ± {self.error:.3f}" if abs(self.value) < 10 else f"{number(self.value)} ± {number(self.error)}"


def score_cell(score: Score | None) -> Html:
    """A score in a table; its error goes to a line of its own on a phone."""
    if score is None:
        return Html("–")
    value, sign, error = score.words.partition(" ±")
    return join(value, tag("span", f"{sign}{error}", class_="err") if error else None)


def _mark(score: Score, task: str, scale: Scale, y: float) -> Html:
    x, error = scale(score.value), score.error or 0.0
    whisker = tag("line", x1=scale(score.value - error), x2=scale(score.value + error), y1=y, y2=y, class_=f"ln {score.style}") if error else None
    return join(whisker, tag("circle", tooltip(f"{task}, {score.label}: {score.words}"), cx=x, cy=y, r=4.5, class_=f"dot {score.style}"))


def score_chart(rows: Sequence[tuple[str, Sequence[Score]]], *, width: int, title: str, x_label: str) -> Html:
    """Tasks below each other, the models of each in lanes of their own, on one scale."""
    ends = [score.value + sign * (score.error or 0.0) for _, scores in rows for score in scores for sign in (-1, 1)]
    scale = linear(ends, start=8.0, end=width - 12.0, num_ticks=min(8, max(3, width // 80)))
    y, drawn = 0.0, []
    for task, scores in rows:
        drawn.append(text(0, y + 13, task, style="tick"))
        for lane, score in enumerate(scores):
            drawn.append(_mark(score, task, scale, y + _ROW + _LANE * lane + 4))
        y += _ROW + _LANE * len(scores) + 8
        drawn.append(tag("line", x1=0.0, x2=float(width), y1=y - 2, y2=y - 2, class_="grid"))
    return svg(x_axis(scale, y=y + 2, label=x_label), drawn, width=width, height=y + _FOOT, label=title)
