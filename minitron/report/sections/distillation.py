"""Training curves of the teacher's correction and of the distillation."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from minitron.report.charts import Key, Series, figure, line_chart
from minitron.report.formats import count, finite, loss, percent
from minitron.report.markup import Html, join, tag
from minitron.report.reader import Run
from minitron.report.sections.body import Body
from minitron.report.summary import Summary

Rows = list[dict[str, Any]]
Points = list[tuple[float, float]]

_MAX_POINTS = 400
#: Small charts below the losses: key → title and unit.
_SMALL = {
    "learning_rate": "Learning rate",
    "gradient_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
}
#: Divergences from a teacher, of which a run has one: from all that it says, or from what was cached of it.
_DIVERGENCES = {
    "validation_kl": "KL from the teacher",
    "validation_kl_top_k": "KL over the teacher's top tokens",
    "validation_kl_samples": "KL by the teacher's samples",
}
_NO_TERM = {"step", "tokens", "loss", "phase", "mfu", "sparsity", "skipped_steps", "loss_spike", "went_back_from", *_SMALL}
_UNITS = ("_bytes", "_seconds", "_per_second", "_rate", "_norm")
#: Widths of charts that stand two and three in a row.
_HALF, _THIRD = 400, 256


def points(rows: Iterable[dict[str, Any]], key: str, *, x: str) -> Points:
    """The finite values of a metric over steps or tokens."""
    pairs = ((finite(row.get(x)), finite(row.get(key))) for row in rows)
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def thin(values: Points, most: int = _MAX_POINTS) -> Points:
    """At most ``most`` points, each the mean of its neighbours."""
    if len(values) <= most:
        return values
    edges = [round(i * len(values) / most) for i in range(most + 1)]
    groups = [values[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    return [(sum(a for a, _ in g) / len(g), sum(b for _, b in g) / len(g)) for g in groups]


def smooth(values: Points) -> Points:
    """A centred mean over a fifteenth of the curve, narrower near the (steep) start, one-sided near the (noisy) end."""
    reach, sums = max(2, len(values) // 30), [0.0]
    for _, b in values:
        sums.append(sums[-1] + b)
    made = []
    for index, (a, _) in enumerate(values):
        before = min(reach, index)
        after = min(before, len(values) - 1 - index)
        made.append((a, (sums[index + after + 1] - sums[index - before]) / (before + after + 1)))
    return made


def _axis(rows: Rows) -> str:
    """Tokens when every training line has them, else steps."""
    return "tokens" if rows and all(finite(row.get("tokens")) is not None for row in rows) else "step"


def _terms(rows: Rows, *, x: str) -> list[str]:
    """The parts of the training loss, when it is not all one part."""
    every = dict.fromkeys(key for row in rows for key in row)
    named = [key for key in every if key not in _NO_TERM and not key.startswith("validation") and not key.endswith(_UNITS)]
    whole = points(rows, "loss", x=x)
    return [key for key in named if points(rows, key, x=x) not in ([], whole)]


def _training(rows: Rows, *, x: str, style: str) -> Html | None:
    """The training loss: every step faintly, the running mean on top, and its terms when there are several."""
    values = thin(points(rows, "loss", x=x))
    if not values:
        return None
    many = len(values) > 40
    curves = [Series("training loss", values, f"{style} faint", dots=False)] if many else []
    curves.append(Series("running mean" if many else "training loss", smooth(values) if many else values, style))
    last = curves[-1].points[-1][1]
    for index, key in enumerate(_terms(rows, x=x)[:3]):
        term = thin(points(rows, key, x=x))
        curves.append(Series(key.replace("_", " "), smooth(term) if many else term, f"term{index}"))
    keys = [Key(style + " faint", "each step", "line")] if many else []
    keys += [Key(c.style, c.label, "line") for c in curves if "faint" not in c.style]
    return figure(
        "Training loss",
        lambda width: line_chart(curves, width=width, title="Training loss", x_label=x, y_label="nats per token", x_zero=True),
        wide=_HALF,
        keys=keys if len(keys) > 1 else (),
        note=f"What the optimiser sees, from {loss(values[0][1])} to {loss(last)}.",
    )


def _validation(rows: Rows, *, x: str, style: str) -> Html | None:
    """Held-out cross entropy and divergence from the teacher, at the steps where they were measured."""
    named = [Series("cross entropy", points(rows, "validation_loss", x=x), style)]
    named += [Series(label, points(rows, key, x=x), "term0") for key, label in _DIVERGENCES.items()]
    curves = [series for series in named if series.points]
    if not curves:
        return None
    main = curves[0]
    agreement = points(rows, "validation_agreement", x=x)
    note = f"{main.label.capitalize()} from {loss(main.points[0][1])} to {loss(main.points[-1][1])}."
    if agreement:
        note += f" First choice the same as the teacher's on {percent(agreement[-1][1])} of tokens, at the start {percent(agreement[0][1])}."
    title = "Held-out loss while training"
    return figure(
        title,
        lambda width: line_chart(curves, width=width, title=title, x_label=x, y_label="nats per token", x_zero=True, y_zero=len(curves) > 1),
        wide=_HALF,
        keys=[Key(c.style, c.label, "line") for c in curves] if len(curves) > 1 else (),
        note=note,
    )


def _sparse_chart(title: str, values: Points, *, x: str, style: str, y_zero: bool) -> Callable[[int], Html]:
    curve = [Series(title, values, style)]
    return lambda width: line_chart(curve, width=width, height=150, title=title, x_label=x, y_label="", x_zero=True, y_zero=y_zero)


def _small(rows: Rows, *, x: str, style: str) -> Html | None:
    """Learning rate, gradient norm and speed as small multiples."""
    made = []
    for key, title in _SMALL.items():
        values = thin(points(rows, key, x=x), 150)
        if len(values) < 2:
            continue
        shares = [share for _, share in points(rows, "mfu", x=x)] if key == "tokens_per_second" else []
        note = f"{percent(statistics.median(shares))} of the peak rate (MFU)." if shares else None
        made.append(figure(title, _sparse_chart(title, values, x=x, style=style, y_zero=key != "gradient_norm"), wide=_THIRD, note=note))
    return tag("div", made, class_="small") if made else None


def _curves(rows: Rows, *, style: str) -> Html | None:
    training = [row for row in rows if "loss" in row]
    x = _axis(rows)
    losses = [part for part in (_validation(rows, x=x, style=style), _training(training, x=x, style=style)) if part is not None]
    small = _small(training, x=x, style=style)
    return join(tag("div", losses, class_="pair"), small) if losses or small else None


def _last(rows: Rows, key: str) -> float | None:
    return next((value for value in (finite(row.get(key)) for row in reversed(rows)) if value is not None), None)


def render(run: Run, summary: Summary) -> Body | None:
    """Correction and distillation, each as far as it was made."""
    correction, distillation = _curves(run.correction, style="teacher"), _curves(run.distillation, style="student")
    if correction is None and distillation is None:
        return None
    tokens, steps = _last(run.distillation, "tokens"), _last(run.distillation, "step")
    lead = f"The student learned from the teacher for {count(steps)} steps" if steps else "The teacher was corrected on the distillation data"
    lead += f" and {count(tokens)} tokens." if tokens and steps else "."
    if summary.repaired is not None and 0 <= summary.repaired <= 1:
        lead += f" {percent(summary.repaired, digits=0)} of what pruning broke is repaired."
    heading = tag("h3", "Teacher correction", class_="part") if correction is not None and distillation is not None else None
    second = tag("h3", "Distillation", class_="part") if heading is not None else None
    return Body(lead, join(heading, correction, second, distillation))
