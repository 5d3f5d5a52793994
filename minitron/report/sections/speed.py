"""Latency, throughput and memory, measured in one run."""

from __future__ import annotations

from typing import Any

from minitron.report.formats import count, finite, number, size
from minitron.report.markup import Child, Html, join, table, tag
from minitron.report.reader import Run, as_dict
from minitron.report.sections.body import Body
from minitron.report.summary import Summary, batches_of, evaluated

#: Figure → its label, how it is written, and whether less is better.
_FIGURES: dict[str, tuple[str, Any, bool]] = {
    "prefill_ms": ("reading the prompt, ms", number, True),
    "decode_ms": ("writing a token, ms", number, True),
    "tokens_per_second": ("written tokens per second", number, False),
    "peak_memory_bytes": ("peak memory", size, True),
}


def _cell(row: dict[str, Any], key: str, write: Any) -> Child:
    """A median and its range over the rounds."""
    spread = row.get(f"{key}_range")
    low, high = (finite(spread[0]), finite(spread[-1])) if isinstance(spread, list) and spread else (None, None)
    middle = finite(row.get(key))
    if low is None or high is None:
        return str(write(middle))
    return join(str(write(middle)), tag("span", f" {write(low)}–{write(high)}", class_="range opt"))


def _batch(models: dict[str, dict[str, Any]], size_of_batch: int) -> Html:
    """One batch size: figures as rows, models as columns, and the gain of the last over the first."""
    rows: list[list[Child]] = []
    for key, (label, write, less) in _FIGURES.items():
        values = [finite(row.get(key)) for row in models.values()]
        if all(value is None for value in values):
            continue
        first, last = values[0], values[-1]
        gain = (first / last if less else last / first) if len(values) > 1 and first and last else None
        rows.append([label, *(_cell(row, key, write) for row in models.values()), tag("b", f"{gain:.2f}×") if gain is not None else "–"])
    reasons = [str(row.get("reason") or "") for row in models.values()]
    rows += [["not measured", *reasons, ""]] if any(reasons) else []
    head: list[Child] = [f"{size_of_batch} sequence{'s' if size_of_batch > 1 else ''} at a time", *models, "gain"]
    return table(head, rows, classes=["", *("n" for _ in models), "n"])


def render(run: Run, summary: Summary) -> Body | None:
    """A table for each batch size."""
    speeds = {name.replace("_", " "): as_dict(row.get("speed")) for name, row in evaluated(run).items() if as_dict(row.get("speed"))}
    batches = {name: batches_of(speed) for name, speed in speeds.items()}
    sizes = list(dict.fromkeys(number for rows in batches.values() for number in rows))
    if not sizes:
        return None
    about = next(iter(speeds.values()))
    lead = f"Measured in turn on {about.get('device')} in {about.get('dtype')}: prompts of {count(finite(about.get('prompt_tokens')))} tokens, "
    lead += f"{count(finite(about.get('new_tokens')))} written, medians of {count(finite(about.get('num_rounds')))} rounds with their range."
    weights = [f"{name} {size(finite(speed.get('weight_bytes')))}" for name, speed in speeds.items()]
    tables = [_batch({name: rows.get(number, {}) for name, rows in batches.items()}, number) for number in sizes]
    return Body(lead, join(tables, tag("p", f"Weights: {', '.join(weights)}.", class_="remark")))
