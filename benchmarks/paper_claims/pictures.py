"""Pictures of the page as SVG files that carry their own colours, drawn with the report's charts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minitron.report.charts import Series, line_chart
from minitron.report.charts.frame import BOTTOM, TOP, svg, text, tooltip, x_axis
from minitron.report.charts.scales import linear
from minitron.report.markup import Html, join, tag
from paper_claims.verdicts import Ranking, Results, Row

_WIDTH = 860
_STYLE = """
svg{--paper:#fff;--ink:#171b21;--soft:#59626e;--rule:#dfe3e8;--teacher:#68717d;--pruned:#c65d13;--student:#1a68b3;--other:#a3acb7;
--term0:#0f8a7b;--term1:#8d4fb0;--term2:#a8792a;
font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,sans-serif}
@media (prefers-color-scheme:dark){svg{--paper:#11151a;--ink:#e6eaef;--soft:#98a2af;--rule:#2b323b;--teacher:#a0a9b5;--pruned:#ee9350;
--student:#62aef2;--other:#5f6a77;--term0:#45c2b0;--term1:#c795e6;--term2:#d9b15e}}
.paper{fill:var(--paper)}
.teacher{--c:var(--teacher)}.pruned{--c:var(--pruned)}.student{--c:var(--student)}.other{--c:var(--other)}
.term0{--c:var(--term0)}.term1{--c:var(--term1)}.term2{--c:var(--term2)}
.tick,.axis{font-size:12px;fill:var(--soft)}
.row{font-size:12.5px;fill:var(--ink)}
.end{font-size:12px;font-weight:600;fill:var(--c)}
.grid{stroke:var(--rule);stroke-width:1}
.base,.zero{stroke:var(--soft);stroke-width:1}
.ln{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.dashed{stroke-dasharray:5 5}
.dot{fill:var(--c);stroke:var(--paper);stroke-width:1.5}
.hover{fill:transparent}
"""
#: Colour of a verdict: blue for what holds, orange for what does not, grey for what nobody can tell.
_COLOURS = {"holds": "student", "does not hold": "pruned", "not separable here": "teacher"}
_STYLES = ("student", "pruned", "term0", "term1", "term2", "teacher")


def standalone(drawing: Html, height: float) -> str:
    """A drawing as a file of its own."""
    pad = 12
    box = f'viewBox="{-pad} {-pad} {_WIDTH + 2 * pad} {height + 2 * pad:g}"'
    inner = drawing[drawing.index(">") + 1 :]
    label = drawing[drawing.index('role="img"') : drawing.index(">")]
    back = f'<rect class="paper" x="{-pad}" y="{-pad}" width="{_WIDTH + 2 * pad}" height="{height + 2 * pad:g}"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box} width="{_WIDTH + 2 * pad}" {label}><style>{_STYLE}</style>{back}{inner}\n'


def differences(rows: Sequence[Row], *, title: str) -> Html:
    """Every comparison as a dot with its interval around zero; the paper's direction is left."""
    measured = [row for row in rows if row.difference is not None]
    left, step = 430.0, 24.0
    intervals = [row.difference for row in measured if row.difference is not None]
    scale = linear([0.0, *(i.low for i in intervals), *(i.high for i in intervals)], start=left, end=_WIDTH - 20.0, num_ticks=6)
    bottom = TOP + step * len(measured)
    drawn = [tag("line", x1=scale(t), x2=scale(t), y1=float(TOP), y2=bottom, class_="grid") for t in scale.ticks]
    drawn.append(tag("line", x1=scale(0.0), x2=scale(0.0), y1=float(TOP), y2=bottom, class_="zero"))
    for index, row in enumerate(measured):
        assert row.difference is not None
        y, style = TOP + step * (index + 0.5), _COLOURS[row.verdict]
        words = f"{row.claim.statement}: {row.difference.shown()}, {row.verdict}"
        low, high = scale(row.difference.low), scale(row.difference.high)
        drawn.append(text(left - 14, y + 4, row.claim.statement, anchor="end", style="row"))
        drawn.append(tag("line", x1=low, x2=max(high, low + 1), y1=y, y2=y, class_=f"ln {style}"))
        drawn.append(tag("circle", tooltip(words), cx=scale(row.difference.mean), cy=y, r=4.5, class_=f"dot {style}"))
    axis = x_axis(scale, y=bottom, label="nats per token; left of zero is the papers' direction")
    return svg(drawn, axis, width=_WIDTH, height=bottom + BOTTOM, label=title)


def difference_height(rows: Sequence[Row]) -> float:
    """The height of :func:`differences`."""
    return TOP + 24.0 * sum(row.difference is not None for row in rows) + BOTTOM


def _curve(results: Results, arm: str) -> list[tuple[float, float]]:
    """Held-out loss over training tokens, mean over seeds."""
    runs = [result.curve for result in results.get(arm, {}).values()]
    points = zip(*runs, strict=True) if runs else []
    return [(point[0]["tokens"], sum(p["loss"] for p in point) / len(point)) for point in points]


def curves(results: Results, arms: dict[str, str], *, title: str) -> Html:
    """Held-out loss over tokens of several arms (name → label)."""
    series = []
    for index, (arm, label) in enumerate(arms.items()):
        points = _curve(results, arm)
        series.append(Series(label, points, _STYLES[index % len(_STYLES)], end=label))
    return line_chart(series, width=_WIDTH, height=300, title=title, x_label="training tokens", y_label="held-out loss, nats per token", x_zero=True)


def ranking_chart(found: Sequence[Ranking], *, title: str) -> Html:
    """Spearman's correlation of the order at each validation with the last order."""
    series = [
        Series(f"seed {r.seed}", list(zip(map(float, r.steps), r.correlation, strict=True)), _STYLES[i % len(_STYLES)], end=f"seed {r.seed}")
        for i, r in enumerate(found)
    ]
    return line_chart(series, width=_WIDTH, height=240, title=title, x_label="steps", y_label="rank correlation with the last order", x_zero=True)


def shape_curves(ranking: Ranking, *, title: str) -> Html:
    """How far every shape is from the best one at each validation."""
    best = [min(column) for column in zip(*ranking.losses.values(), strict=True)]
    series = []
    for index, (name, losses) in enumerate(sorted(ranking.losses.items(), key=lambda item: item[1][-1])):
        points = [(float(step), loss - low) for step, loss, low in zip(ranking.steps, losses, best, strict=True)]
        series.append(Series(name, points, _STYLES[index % len(_STYLES)], end=name))
    return line_chart(series, width=_WIDTH, height=280, title=title, x_label="steps", y_label="loss above the best shape", x_zero=True, y_zero=True)


def write(folder: Path, name: str, drawing: Html, height: float) -> str:
    """Write ``<name>.svg`` and return its file name."""
    (folder / f"{name}.svg").write_text(standalone(join(drawing), height), encoding="utf-8")
    return f"{name}.svg"
