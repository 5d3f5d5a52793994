"""Charts as inline SVG, written by hand: no plotting library, no scripts, colours from the page's style sheet."""

from minitron.report.charts.bars import Bar, column_chart
from minitron.report.charts.frame import Key, figure
from minitron.report.charts.heat import heat_map
from minitron.report.charts.lines import Rule, Series, line_chart
from minitron.report.charts.marks import Point, damage_scale, dumbbell
from minitron.report.charts.whiskers import Score, score_cell, score_chart

__all__ = [
    "Bar",
    "Key",
    "Point",
    "Rule",
    "Score",
    "Series",
    "column_chart",
    "damage_scale",
    "dumbbell",
    "figure",
    "heat_map",
    "line_chart",
    "score_cell",
    "score_chart",
]
