"""One HTML page that tells what became of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minitron.report import write_report
from minitron.stages.context import StageContext

FOLDER = "report"
SECTIONS = ()
HELP = "write report/index.html, one page without outside parts"
MAIN_ONLY = True

_READS = ("teacher", "scores", "candidates", "ranking", "student", "export", "evaluation")


def inputs(context: StageContext) -> dict[str, Any]:
    """Every stage folder there is."""
    found: dict[str, Any] = {name: context.run_dir / name for name in _READS if (context.run_dir / name / "manifest.json").is_file()}
    for folder in sorted((context.run_dir / "pruned").glob("*")):
        if (folder / "manifest.json").is_file():
            found[f"pruned/{folder.name}"] = folder
    return found


def effective(context: StageContext) -> dict[str, Any]:
    """A report depends on nothing but its inputs."""
    return {"": {}}


def run(context: StageContext, out: Path) -> dict[str, Any]:
    """Write ``index.html``."""
    told = write_report(context.run_dir, out, title=context.title)
    return {key: value for key, value in told.items() if key not in ("tokens", "wall_seconds")}  # those of all stages, not of this one
