"""The shapes that were tried, in the order of their rank."""

from __future__ import annotations

from typing import Any

from minitron.report.charts import Key, Series, dumbbell, figure, line_chart
from minitron.report.formats import count, finite, loss, percent, size
from minitron.report.markup import Child, Html, join, table, tag
from minitron.report.reader import Run, as_dict
from minitron.report.sections.body import Body
from minitron.report.summary import Summary

_MAX_ROWS = 24


def _costs(run: Run, name: str) -> tuple[str, str, str]:
    costs = as_dict(run.candidate(name).get("costs"))
    latency = finite(costs.get("latency_ms"))
    return count(finite(costs.get("flops_per_token"))), size(finite(costs.get("kv_cache_bytes"))), f"{latency:.3g} ms" if latency is not None else "–"


def _ranking(run: Run) -> Html:
    """Rank, size and losses before and after the short distillation."""
    good = [row for row in run.ranked if row.get("status", "ok") == "ok"]
    every = [v for row in good for key in ("zero_shot_loss", "loss") if (v := finite(row.get(key))) is not None]
    teacher = finite(as_dict(run.ranking.get("teacher")).get("loss"))
    every += [teacher] if teacher is not None else []
    rows: list[list[Child]] = []
    for position, row in enumerate(good[:_MAX_ROWS], start=1):
        name, parameters = str(row.get("name")), finite(row.get("num_parameters"))
        before, after = finite(row.get("zero_shot_loss")), finite(row.get("loss"))
        chosen = name == run.winner_name
        mark = "student" if chosen else "other"
        drawing = None
        if before is not None and after is not None and len(every) > 1:
            drawing = dumbbell(before, after, everything=every, style=mark, words=f"{name}: loss {loss(before)} before, {loss(after)} after")
        label = tag("b", name, class_="student ink") if chosen else tag("span", name)
        cells: list[Child] = [str(position), label, count(parameters)]
        cells += [loss(before), loss(after), drawing, loss(finite(row.get("kl")))]
        rows.append([*cells, *_costs(run, name)])
    header = ["#", "candidate", "parameters", "zero-shot", "tested", "○ → ●", "KL", "FLOPs/token", "KV cache", "decode"]
    wide = 7 + max((place for cell in rows for place in (1, 2, 3) if cell[6 + place] != "–"), default=0)
    classes = ["n", "code", "n opt", "n", "n", "opt nowrap", "n opt", "n opt roomy", "n opt roomy", "n opt roomy"]
    return table(header[:wide], [cells[:wide] for cells in rows], classes=classes)


def _failed(run: Run) -> Html | None:
    failed = [row for row in run.ranked if row.get("status", "ok") != "ok"]
    items = [tag("li", tag("code", str(row.get("name"))), f": {row.get('reason') or row.get('status')}") for row in failed]
    return join(tag("p", "Not ranked:", class_="remark"), tag("ul", items, class_="remark")) if items else None


def _learning(run: Run) -> Html | None:
    """Each candidate's loss during its short distillation; the winner stands out."""
    curves: list[Series] = []
    good = [row for row in run.ranked if row.get("status", "ok") == "ok"]
    for position, row in reversed(list(enumerate(good[:_MAX_ROWS], start=1))):
        rows = row.get("curve")
        values = [(finite(as_dict(p).get("step")), finite(as_dict(p).get("loss"))) for p in rows] if isinstance(rows, list) else []
        chosen = str(row.get("name")) == run.winner_name
        known = [(a, b) for a, b in values if a is not None and b is not None]
        if len(known) > 1:
            end = str(position) if position <= 8 else ""
            curves.append(Series(f"{position}. {row.get('name')}", known, "student strong" if chosen else "other", end=end))
    if not curves:
        return None
    teacher = finite(as_dict(run.ranking.get("teacher")).get("loss"))
    keys = [Key("student", "winner", "line"), Key("other", "other candidates, numbered by rank", "line")]
    if teacher is not None:
        last = max(point[0] for curve in curves for point in curve.points)
        curves.insert(0, Series(f"teacher, loss {loss(teacher)}", [(0.0, teacher), (last, teacher)], "teacher dashed", dots=False))
        keys.append(Key("teacher dashed", f"teacher, {loss(teacher)}", "line"))
    title = "Held-out loss during the ranking distillation"
    return figure(title, lambda width: line_chart(curves, width=width, height=280, title=title, x_label="step", y_label="nats per token"), keys=keys)


def _unranked(run: Run) -> Html:
    """Candidates of a search that nothing measured: their shape and predicted cost."""
    rows: list[list[Child]] = []
    for row in run.candidates[:_MAX_ROWS]:
        name = str(row.get("name"))
        rows.append([tag("code", name), count(finite(row.get("num_parameters"))), *_costs(run, name)])
    more = len(run.candidates) - _MAX_ROWS
    return join(
        table(["candidate", "parameters", "FLOPs/token", "KV cache", "decode"], rows, classes=["code", "n", "n", "n", "n"]),
        tag("p", f"… and {more} more in candidates/candidates.jsonl.", class_="remark") if more > 0 else None,
    )


def _figure_of(value: object, digits: int = 3) -> str:
    known = finite(value)
    return f"{known:.{digits}f}" if known is not None else "–"


def _how(run: Run) -> Html | None:
    """How the order came about: rungs, agreement over the steps, the lead, the cost, and what cheaper ways would have chosen."""
    told: list[Html] = []
    for rung in run.ranking.get("rungs") or []:
        kept = as_dict(rung).get("kept")
        if isinstance(kept, list):
            told.append(tag("li", f"After step {count(finite(as_dict(rung).get('step')))} {len(kept)} went on."))
    stopped = finite(run.ranking.get("stopped_at"))
    if stopped is not None:
        told.append(tag("li", f"The order had settled after step {count(stopped)}, where the ranking stopped."))
    lead = as_dict(run.ranking.get("lead"))
    if lead:
        told.append(
            tag("li", f"The best leads by {_figure_of(lead.get('gap'), 4)} ± {_figure_of(lead.get('standard_error'), 4)} nats per token (paired).")
        )
    if finite(run.ranking.get("zero_shot_tau")) is not None:
        told.append(tag("li", f"Kendall's τ between the zero-shot order and this one: {_figure_of(run.ranking['zero_shot_tau'], 2)}."))
    cost = {key: finite(value) for key, value in as_dict(run.ranking.get("cost")).items()}
    shared, full = cost.get("shared"), cost.get("full_independent")
    if shared and full:
        told.append(
            tag(
                "li", f"Cost {shared:.2e} FLOPs; every candidate to the end with a teacher of its own: {full:.2e}, {full / shared:.1f} times as much."
            )
        )
    again = as_dict(run.ranking.get("halving_replay"))
    if again:
        share, regret = percent(finite(again.get("share_of_steps")), digits=0), _figure_of(again.get("regret"), 4)
        told.append(
            tag("li", "Successive halving would have chosen ", tag("code", str(again.get("chosen"))), f", with {share} of the steps, {regret} worse.")
        )
    return tag("ul", told, class_="remark") if told else None


def _agreement(run: Run) -> Html | None:
    """Kendall's τ of every evaluation with the one before."""
    rows = [as_dict(row) for row in run.ranking.get("tau") or []]
    points = [(a, b) for row in rows if (a := finite(row.get("step"))) is not None and (b := finite(row.get("tau"))) is not None]
    if len(points) < 2:
        return None
    title = "Agreement of each order with the one before (Kendall's τ)"
    curve = Series("τ", points, "student strong")
    return figure(title, lambda width: line_chart([curve], width=width, height=160, title=title, x_label="step", y_label="τ"))


def _lead(run: Run, measured: list[dict[str, Any]]) -> str:
    if not measured:
        return f"{count(len(run.candidates))} shape{'s' if len(run.candidates) != 1 else ''} met the budget."
    best = measured[0]
    tokens = finite(best.get("tokens"))
    shapes = max(len(run.candidates), len(run.ranked))
    told = f"{count(shapes)} shape{'s' if shapes != 1 else ''} met the budget, {len(measured)} could be measured"
    equal = len({row.get("tokens") for row in measured}) == 1
    told += f", {'each after' if equal else 'the best after'} {count(tokens)} tokens of distillation." if tokens else "."
    order = sorted(measured, key=lambda row: finite(row.get("zero_shot_loss")) or float("inf"))
    place = next(i for i, row in enumerate(order, start=1) if row is best)
    if len(measured) > 1:
        told += " The best one was also the best zero-shot." if place == 1 else f" The best one came in at place {place} zero-shot."
    return told


def render(run: Run, summary: Summary) -> Body | None:
    """A table in rank order and the curves; without a ranking, the candidates themselves."""
    if not any(row.get("curve") or finite(row.get("loss")) is not None or row.get("status", "ok") != "ok" for row in run.ranked):
        return Body(_lead(run, []), _unranked(run)) if run.candidates else None
    measured = [row for row in run.ranked if row.get("status", "ok") == "ok"]
    return Body(_lead(run, measured), join(_ranking(run) if measured else None, _learning(run), _agreement(run), _how(run), _failed(run)))
