"""What each stage took."""

from __future__ import annotations

from minitron.report.formats import count, finite, seconds, size
from minitron.report.markup import Child, table
from minitron.report.reader import Run
from minitron.report.sections.body import Body, share_bar
from minitron.report.summary import Summary


def render(run: Run, summary: Summary) -> Body | None:
    """Wall time, tokens and peak memory per stage, and the whole."""
    if not run.stages:
        return None
    longest = max((finite(stage.manifest.get("wall_seconds")) or 0.0 for stage in run.stages), default=0.0)
    rows: list[list[Child]] = []
    peaks = []
    for stage in run.stages:
        wall, tokens = finite(stage.manifest.get("wall_seconds")), finite(stage.manifest.get("tokens"))
        peak = finite(stage.manifest.get("peak_memory_bytes"))
        peaks += [peak] if peak else []
        bar = share_bar(wall / longest, "teacher") if wall is not None and longest > 0 else None
        rows.append([stage.name, seconds(wall), bar, count(tokens) if tokens else "–", size(peak) if peak else "–"])
    slowest = max(run.stages, key=lambda stage: finite(stage.manifest.get("wall_seconds")) or 0.0)
    where = f" on {run.about['device']}" if run.about.get("device") else ""
    lead = f"{seconds(summary.wall_seconds)}{where} in all" if summary.wall_seconds is not None else "The stages of this run"
    if summary.wall_seconds and longest:
        lead += f"; {slowest.name} took {100 * longest / summary.wall_seconds:.0f}% of it"
    tokens_read = count(summary.tokens) if summary.tokens else "–"
    total: list[Child] = ["total, highest peak", seconds(summary.wall_seconds), None, tokens_read, size(max(peaks)) if peaks else "–"]
    return Body(lead + ".", table(["stage", "wall time", "", "tokens", "peak memory"], rows, classes=["", "n", "bar opt", "n", "n"], total=total))
