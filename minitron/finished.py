"""Whether a run is complete, as batch jobs ask before they leave: answered from the run folder alone, before the libraries are loaded."""

from __future__ import annotations

import json
from pathlib import Path

#: In a run folder: what was started there.
RUN_FILE = "run.json"
#: In the folder of a cascade: its sizes, each with what was measured once it is complete.
CASCADE_FILE = "cascade.json"
#: In the folder of a stage at work: its manifest so far.
BEGUN = ".begun.json"


def finished(folder: Path, stage: str | None = None) -> bool:
    """Whether every stage that a run was started for is complete, or one stage of it. ``folder`` may also be a stage's own,
    or a cascade's: then every size of it.

    A folder that stands from before does not count while its stage is at work again.
    """
    if (folder / "manifest.json").is_file():
        return True
    cascade = folder / CASCADE_FILE
    if cascade.is_file():
        sizes = json.loads(cascade.read_text())["sizes"]
        return all("measured" in size and _run_finished(folder / size["name"], stage, ever=True) for size in sizes)
    return _run_finished(folder, stage)


def _run_finished(folder: Path, stage: str | None, *, ever: bool = False) -> bool:
    """``ever``: the stages of all commands in the folder, not of the last: a size may be cut by one command and distilled by another."""
    path = folder / RUN_FILE
    if not path.is_file():
        return False
    document = json.loads(path.read_text())
    folders = document.get("folders", {})
    stages = [stage] if stage is not None else list(folders) if ever else document.get("stages", [])
    return bool(stages) and all(_complete(folder / (folders.get(name) or _folder_of(name)), name) for name in stages)


def _complete(final: Path, stage: str) -> bool:
    if stage == "prune":  # a folder for every candidate
        return any(final.glob("*/manifest.json")) and not any(final.glob(f"*.partial/{BEGUN}"))
    return (final / "manifest.json").is_file() and not (final.with_name(f"{final.name}.partial") / BEGUN).is_file()


def _folder_of(stage: str) -> str:
    from minitron.stages import load_stage  # takes seconds

    return load_stage(stage).FOLDER
