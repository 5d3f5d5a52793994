"""Several runs side by side, in one page: figures as rows, runs as columns, their curves in one chart, and the settings in which they differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.errors import ConfigError
from minitron.report.charts import Key, Series, figure, line_chart, score_cell
from minitron.report.formats import count, finite, loss, number, percent, seconds, size
from minitron.report.markup import Child, Html, table, tag
from minitron.report.page import document
from minitron.report.reader import Run, as_dict, read_run
from minitron.report.sections.body import Body
from minitron.report.sections.distillation import points, smooth, thin
from minitron.report.sections.tasks import main_metric, scores_of
from minitron.report.summary import Summary, batches_of, evaluated, summarise

#: Colour classes of the runs, in order; more runs begin again with dashed lines.
_STYLES = ("student", "pruned", "term0", "term1", "term2", "other")


@dataclass(frozen=True)
class Compared:
    """One run of the comparison, with a short name that no other has."""

    name: str
    style: str
    run: Run
    summary: Summary


def write_comparison(run_dirs: Sequence[Path], out: Path, *, title: str) -> dict[str, Any]:
    """Write one page that compares runs.

    Returns:
        The page's place and size, the names of the runs, and what was left out as damaged.

    Raises:
        CheckpointError: there is no run at one of the places.
        ConfigError: fewer than two runs, or one twice.
    """
    places = [path.expanduser().resolve() for path in run_dirs]
    if len(places) < 2 or len(set(places)) < len(places):
        raise ConfigError("a comparison takes two or more different run folders")
    runs = [read_run(path) for path in places]
    names = _names(places)
    styles = [_STYLES[i % len(_STYLES)] + (" dashed" if i >= len(_STYLES) else "") for i in range(len(runs))]
    compared = [Compared(name, style, run, summarise(run)) for name, style, run in zip(names, styles, runs, strict=True)]
    sections = {
        "outcome": ("Outcome", _outcome(compared)),
        "tasks": ("Tasks", _tasks(compared)),
        "curves": ("Curves", _curves(compared)),
        "settings": ("Differing settings", _settings(compared)),
    }
    present = {anchor: (heading, body) for anchor, (heading, body) in sections.items() if body is not None}
    warnings = [f"{c.name}: {warning}" for c in compared for warning in c.run.warnings]
    header = tag("header", tag("h1", title), tag("p", _story(compared), class_="story"))
    page = document(
        title, header, present, footer=[tag("footer", [tag("p", warning, class_="remark") for warning in warnings], tag("p", "Made by minitron"))]
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    written = out.write_bytes(page.encode("utf-8"))
    return {"page": str(out), "bytes": written, "runs": names, "warnings": warnings}


def _names(places: Sequence[Path]) -> list[str]:
    """The ends of the paths, as long as it takes to tell them apart."""
    for length in range(1, max(len(path.parts) for path in places) + 1):
        names = ["/".join(path.parts[-length:]) for path in places]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in places]


def _story(compared: Sequence[Compared]) -> str:
    """Which run came out best, by its last model's loss."""
    known = [(c.summary.losses[model], c) for c in compared for model in ("student", "pruned") if model in c.summary.losses]
    finished = {c.name: (value, c) for value, c in reversed(known)}  # the student's goes before the pruned model's
    told = f"{len(compared)} runs."
    if len({loss(value) for value, _ in finished.values()}) > 1:
        value, best = min(finished.values(), key=lambda row: row[0])
        told += (
            f" The lowest held-out loss is that of {best.name}: {loss(value)} nats per token at {count(best.summary.parameters_after)} parameters."
        )
        texts = {as_dict(stage.manifest.get("inputs")).get("data") for c in compared for stage in c.run.stages if stage.name == "evaluate"}
        told += " They were measured on different text, so their losses do not compare." if len(texts) > 1 else ""
    return told


def _head(compared: Sequence[Compared]) -> list[Child]:
    return ["", *(tag("span", tag("i", class_=f"key box {c.style}"), c.name) for c in compared)]


def _rows_of(
    compared: Sequence[Compared], rows: Sequence[tuple[str, Callable[[Compared], float | None], Callable[[float | None], str], int]]
) -> Html:
    """Rows of figures; the best of each is set apart where one end is better (-1: the least, 1: the most, 0: neither)."""
    drawn: list[list[Child]] = []
    for label, read, write, better in rows:
        values = [read(c) for c in compared]
        known = [value for value in values if value is not None]
        if not known:
            continue
        best = (min(known) if better < 0 else max(known)) if better and len(set(known)) > 1 else None
        drawn.append([label, *(tag("b", write(v)) if v is not None and v == best else tag("span", write(v)) for v in values)])
    return table(_head(compared), drawn, classes=["", *("n" for _ in compared)])


def _speed(compared: Compared, key: str) -> float | None:
    """A figure of the finished model in the smallest batch."""
    timed = [batches_of(as_dict(row.get("speed"))) for row in evaluated(compared.run).values() if row.get("speed")]
    return finite(timed[-1][min(timed[-1])].get(key)) if timed and timed[-1] else None


def _peak(compared: Compared) -> float | None:
    peaks = [value for stage in compared.run.stages if (value := finite(stage.manifest.get("peak_memory_bytes")))]
    return max(peaks, default=None)


def _outcome(compared: Sequence[Compared]) -> Body:
    rows: list[tuple[str, Callable[[Compared], float | None], Callable[[float | None], str], int]] = [
        ("teacher's parameters", lambda c: c.summary.parameters_before, count, 0),
        ("parameters", lambda c: c.summary.parameters_after, count, 0),
        ("kept", lambda c: c.summary.kept, percent, 0),
        *((f"loss, {m}", lambda c, m=m: c.summary.losses.get(m), loss, -1) for m in ("teacher", "pruned", "sparse", "student")),  # type: ignore[misc]
        ("perplexity, student", lambda c: c.summary.perplexities.get("student"), number, -1),
        ("damage repaired", lambda c: c.summary.repaired, percent, 1),
        ("writing speed, of the teacher's", lambda c: c.summary.speedup, lambda v: "–" if v is None else f"{v:.2f}×", 1),
        ("reading the prompt, ms", lambda c: _speed(c, "prefill_ms"), number, -1),
        ("writing a token, ms", lambda c: _speed(c, "decode_ms"), number, -1),
        ("tokens, all stages", lambda c: c.summary.tokens, count, 0),
        ("wall time, all stages", lambda c: c.summary.wall_seconds, seconds, -1),
        ("peak memory", _peak, size, -1),
        ("starts", lambda c: float(sum(e.get("event") == "started" for e in c.run.events)) or None, count, 0),
    ]
    return Body("The better end of a row is bold, where it has one.", _rows_of(compared, rows))


def _tasks(compared: Sequence[Compared]) -> Body | None:
    """The finished models' main figure of every task."""
    scores = [scores_of(c.run) for c in compared]
    tasks: dict[str, list[str]] = {}
    for found in scores:
        for task, metric in found:
            if metric not in tasks.setdefault(task, []):
                tasks[task].append(metric)
    if not tasks:
        return None
    rows: list[list[Child]] = []
    for task, metrics in tasks.items():
        metric = main_metric(metrics)
        last = [next(reversed(found[task, metric].values()), None) if (task, metric) in found else None for found in scores]
        rows.append([f"{task}, {metric}", *(score_cell(score) for score in last)])
    lead = "Of the finished models, with one standard error. Differences below about two of them are noise."
    return Body(lead, table(_head(compared), rows, classes=["", *("n" for _ in compared)]))


def _curves(compared: Sequence[Compared]) -> Body | None:
    """Held-out and training losses of the distillations, over tokens."""
    charts = []
    titles = {"validation_loss": "Held-out loss", "validation_kl": "Held-out divergence from the teacher", "loss": "Training loss, running mean"}
    for key, title in titles.items():
        lines = []
        for c in compared:
            values = thin(points(c.run.distillation, key, x="tokens"))
            lines.append(Series(c.name, smooth(values) if key == "loss" and len(values) > 40 else values, c.style))
        if any(line.points for line in lines):
            keys = [Key(line.style, line.label, "line") for line in lines if line.points]
            charts.append(figure(title, _drawn(lines, title), keys=keys))
    return Body("Distillation, over the tokens that were read.", Html("".join(charts))) if charts else None


def _drawn(lines: list[Series], title: str) -> Callable[[int], Html]:
    return lambda width: line_chart(lines, width=width, title=title, x_label="tokens", y_label="nats per token", x_zero=True)


def _settings(compared: Sequence[Compared]) -> Body | None:
    """Result-relevant settings that are not the same in all runs which have them, per stage."""
    found: dict[str, list[Any]] = {}
    for index, c in enumerate(compared):
        for stage in c.run.stages:
            for section, values in stage.table("settings").items():
                for key, value in as_dict(values).items():
                    name = f"{section}.{key}" if section else key
                    found.setdefault(name, [None] * len(compared))[index] = json.dumps(value, default=str)
    rows: list[list[Child]] = []
    for name, values in sorted(found.items()):
        if len(set(values)) > 1:
            rows.append([tag("code", name), *(tag("code", "–" if value is None else value.strip('"')) for value in values)])
    if not rows:
        return Body("All settings that decide a result are the same.", tag("p", "Nothing differs.", class_="remark"))
    return Body("What decides a result and is not the same everywhere.", table(_head(compared), rows, classes=["code", *("code" for _ in compared)]))
