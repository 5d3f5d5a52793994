"""Where the run comes from: command, versions, fingerprints and settings."""

from __future__ import annotations

import json
from typing import Any

from minitron.report.formats import moment
from minitron.report.markup import Child, Html, join, table, tag
from minitron.report.reader import Run, StageRecord
from minitron.report.sections.body import Body
from minitron.report.summary import Summary

_LABELS = {"minitron_version": "minitron", "num_processes": "processes"}


def _plain(value: Any) -> str:
    if isinstance(value, dict) and "commit" in value:
        return f"{str(value['commit'])[:12]}{', changed since' if value.get('changed') else ''}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _about(run: Run) -> Html | None:
    """The facts of run.json; the command on a line of its own."""
    pairs: list[Child] = []
    for key, value in run.about.items():
        if key == "command":
            continue
        words = ", ".join(map(str, value)) if isinstance(value, list) else _plain(value)
        pairs.append(tag("div", tag("dt", _LABELS.get(key, key.replace("_", " "))), tag("dd", words)))
    command = run.about.get("command")
    return join(tag("pre", f"$ {command}") if command else None, tag("dl", pairs) if pairs else None) or None


def _settings(title: str, sections: dict[str, Any]) -> Html | None:
    """Settings as a table of dotted names."""
    rows: list[list[Child]] = []
    for section, values in sections.items():
        pairs = values.items() if isinstance(values, dict) else [("", values)]
        rows += [[tag("code", f"{section}.{key}" if key else section), tag("code", _plain(value))] for key, value in pairs]
    return join(tag("h4", title), table(["name", "value"], rows, classes=["code", "code"])) if rows else None


def _stage(stage: StageRecord) -> Html:
    """One stage, folded: when and with which code, what it read, how it was set."""
    begun, version = stage.manifest.get("started"), stage.manifest.get("code_version")
    facts = " · ".join(part for part in (f"started {moment(begun)}" if begun else "", f"code {version}" if version else "") if part)
    inputs: list[list[Child]] = [[name, tag("code", _plain(value))] for name, value in stage.table("inputs").items()]
    return tag(
        "details",
        tag("summary", tag("b", stage.name), tag("span", facts)),
        join(tag("h4", "Inputs, by fingerprint"), table(["input", "fingerprint"], inputs, classes=["", "code"])) if inputs else None,
        _settings("Settings that decide the result", stage.table("settings")),
        _settings("Recorded beside them", stage.table("recorded")),
    )


def render(run: Run, summary: Summary) -> Body | None:
    """Facts first, then one folded block per stage."""
    about, stages = _about(run), [_stage(stage) for stage in run.stages]
    if about is None and not stages:
        return None
    lead = "Everything that decided the result. A stage reruns when its settings or its inputs' fingerprints change."
    return Body(lead, join(about, stages))
