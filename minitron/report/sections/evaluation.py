"""Quality of teacher, pruned model and student on held-out text."""

from __future__ import annotations

from typing import Any

from minitron.report.formats import count, finite, loss, number
from minitron.report.markup import Child, Html, join, table, tag
from minitron.report.reader import Run
from minitron.report.sections.body import Body, share_bar
from minitron.report.summary import Summary, evaluated, style_of

_FIRST = ("perplexity", "loss")
_COUNTS = ("num_parameters", "num_tokens")
_ELSEWHERE = ("flops_per_token", "kv_cache_bytes_per_token")  # in the table of shapes


def _name(model: str) -> str:
    return model.replace("_", " ")


def _bars(summary: Summary) -> Html | None:
    """One bar per model: loss from nought, with the perplexity beside it."""
    if not summary.losses:
        return None
    longest = max(summary.losses.values())
    rows = []
    for name, value in summary.losses.items():
        words = tag("span", tag("b", loss(value)), f" perplexity {number(summary.perplexities.get(name))}", class_="value")
        rows.append(tag("li", tag("span", _name(name), class_="name"), share_bar(value / longest if longest > 0 else 0.0, style_of(name)), words))
    title = tag("figcaption", tag("h3", "Held-out loss"), tag("p", "Nats per token; lower is better. Bars start at nought."))
    return tag("figure", title, tag("ul", rows, class_="hbars"))


def _write(key: str, value: Any) -> str:
    known = finite(value)
    if known is None:
        return value if isinstance(value, str) else "–"
    if key in _COUNTS or key.startswith("num_"):
        return count(known)
    return loss(known) if "loss" in key or "kl" in key else number(known)


def _table(models: dict[str, dict[str, Any]]) -> Html:
    """Metrics as rows, models as columns; metrics that evaluation adds later appear by themselves."""
    keys = list(dict.fromkeys([*_FIRST, *(key for values in models.values() for key in values)]))
    plain = [key for key in keys if key not in _ELSEWHERE and any(isinstance(values.get(key), (int, float, str)) for values in models.values())]
    plain.sort(key=lambda key: key in _COUNTS)
    rows: list[list[Child]] = []
    for key in plain:
        rows.append([key.removeprefix("num_").replace("_", " "), *(_write(key, values.get(key)) for values in models.values())])
    header: list[Child] = ["", *(tag("span", tag("i", class_=f"key box {style_of(name)}"), _name(name)) for name in models)]
    return table(header, rows, classes=["", *("n" for _ in models)])


def render(run: Run, summary: Summary) -> Body | None:
    """Bars and a table of all metrics."""
    models = evaluated(run)
    if not models:
        return None
    tokens = next((finite(values.get("num_tokens")) for values in models.values() if finite(values.get("num_tokens"))), None)
    lead = f"Measured on {count(tokens)} held-out tokens." if tokens else "Measured on held-out text."
    note = run.evaluation.get("note")
    return Body(lead, join(_bars(summary), _table(models), tag("p", note, class_="remark") if isinstance(note, str) and note else None))
