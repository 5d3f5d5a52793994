"""What happened to the run: starts, stops and failures, skipped steps, leaps of the loss, ways back."""

from __future__ import annotations

from typing import Any

from minitron.report.formats import count, finite, moment
from minitron.report.markup import Child, join, table, tag
from minitron.report.reader import Run
from minitron.report.sections.body import Body
from minitron.report.summary import Summary

_STAGES = {"correction": "correct", "distillation": "distill"}


def render(run: Run, summary: Summary) -> Body | None:
    """A line for every start and every fault; nothing for runs of versions that did not note them."""
    starts, faults = _starts(run.events), _faults(run)
    if not starts and not faults:
        return None
    lead = f"{len(starts)} start{'s' if len(starts) != 1 else ''}" if starts else "No start was noted"
    broken = [row for row in starts if row[2] not in ("complete", "at work")]
    lead += f", {len(broken)} of them ended early" if broken else ""
    lead += f"; {len(faults)} fault{'s' if len(faults) != 1 else ''} of the numbers." if faults else "; no fault of the numbers."
    parts: list[Child] = []
    if starts:
        rows = [[begun, stages, join(tag("b", end), tag("span", f" {why}") if why else None), many] for begun, stages, end, why, many in starts]
        parts.append(table(["started", "stages", "end", "processes"], rows, classes=["nowrap", "opt", "", "n opt"]))
    if faults:
        parts.append(table(["stage", "step", "what"], faults, classes=["", "n", ""]))
    return Body(lead, join(parts))


def _starts(events: list[dict[str, Any]]) -> list[list[str]]:
    """Every start with what became of it: started, stages, end, reason, processes. The last one without an end is at work, on this page too."""
    rows: list[list[str]] = []
    for event in events:
        if event.get("event") == "started":
            if rows and rows[-1][2] == "at work":
                rows[-1][2] = "killed"
            stages = event.get("stages") if isinstance(event.get("stages"), list) else []
            many = f"{stages[0]} to {stages[-1]}" if stages and len(stages) > 3 else ", ".join(map(str, stages or []))
            rows.append([moment(event.get("time")), many, "at work", "", count(finite(event.get("num_processes")))])
        elif rows:
            rows[-1][2:4] = [str(event["event"]), str(event.get("reason") or "")]
    return rows


def _faults(run: Run) -> list[list[Child]]:
    """Skipped steps, leaps and ways back, out of the metrics."""
    rows: list[list[Child]] = []
    for name, stage in _STAGES.items():
        before = 0.0
        for line in getattr(run, name):
            step = count(finite(line.get("step")))
            skipped = finite(line.get("skipped_steps"))
            if skipped is not None and skipped > before:
                rows.append([stage, step, f"{count(skipped - before)} skipped: gradients that are not finite"])
            before = skipped if skipped is not None else before
            if (leap := finite(line.get("loss_spike"))) is not None:
                rows.append([stage, step, f"the loss leapt by {count(leap)} robust standard deviations"])
            if (back := finite(line.get("went_back_from"))) is not None:
                rows.append([stage, step, f"went back here from step {count(back)}"])
    return rows
