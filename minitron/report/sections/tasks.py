"""Scores on tasks, with their standard errors."""

from __future__ import annotations

from typing import Any

from minitron.report.charts import Key, Score, figure, score_cell, score_chart
from minitron.report.formats import count, finite
from minitron.report.markup import Child, join, table, tag
from minitron.report.reader import Run, as_dict
from minitron.report.sections.body import Body
from minitron.report.summary import Summary, evaluated, style_of

#: The one figure that stands for a task in the chart: the first of these that it has.
_MAIN = ("acc_norm", "acc", "exact_match", "f1", "mcc")


def scores_of(run: Run) -> dict[tuple[str, str], dict[str, Score]]:
    """(task, metric) → model → its score, tasks in the order in which they were asked."""
    found: dict[tuple[str, str], dict[str, Score]] = {}
    for model, row in evaluated(run).items():
        for task, about in as_dict(row.get("tasks")).items():
            for metric, score in as_dict(as_dict(about).get("metrics")).items():
                value = finite(as_dict(score).get("value"))
                if value is not None:
                    made = Score(style_of(model), model.replace("_", " "), value, finite(as_dict(score).get("stderr")))
                    found.setdefault((task, metric), {})[model] = made
    return found


def main_metric(metrics: list[str]) -> str:
    """The figure that stands for a task."""
    return next((name for name in _MAIN if name in metrics), metrics[0])


def render(run: Run, summary: Summary) -> Body | None:
    """A chart of the main figures that are shares, and a table of all."""
    scores = scores_of(run)
    if not scores:
        return None
    models = list(dict.fromkeys(model for row in scores.values() for model in row))
    metrics: dict[str, list[str]] = {}
    for task, metric in scores:
        metrics.setdefault(task, []).append(metric)
    main = [(task, main_metric(names)) for task, names in metrics.items()]
    shares = [key for key in main if all(0.0 <= score.value <= 1.0 for score in scores[key].values())]
    lanes = [(f"{task}, {metric}", [scores[task, metric][m] for m in models if m in scores[task, metric]]) for task, metric in shares]
    title, note = "Scores", "Share of right answers; higher is better. The line is one standard error to each side."
    keys = [Key(style_of(model), model.replace("_", " "), "dot") for model in models]
    chart = figure(title, lambda width: score_chart(lanes, width=width, title=title, x_label="share"), note=note, keys=keys) if lanes else None
    rows: list[list[Child]] = []
    for (task, metric), row in scores.items():
        rows.append([join(task, tag("span", f" {metric}", class_="range")), *(score_cell(row.get(model)) for model in models)])
    header: list[Child] = ["task", *(model.replace("_", " ") for model in models)]
    return Body(_lead(run, len(metrics)), join(chart, table(header, rows, classes=["", *("n" for _ in models)])))


def _lead(run: Run, num_tasks: int) -> str:
    asked: list[Any] = [about for row in evaluated(run).values() for about in as_dict(row.get("tasks")).values()]
    counts = sorted({int(n) for about in asked if (n := finite(as_dict(about).get("num_examples"))) is not None})
    many = (
        f" {count(counts[0])} to {count(counts[-1])} examples each." if len(counts) > 1 else f" {count(counts[0])} examples each." if counts else ""
    )
    return f"{num_tasks} task{'s' if num_tasks > 1 else ''} of the lm-eval harness, the same examples for every model.{many}"
