"""Who trains which candidates: groups that fit into memory, ranks that work apart, tasks that know each other by files."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from minitron import dist
from minitron.core.manifest import write_text
from minitron.errors import CheckpointError, Interrupted
from minitron.log import get_logger
from minitron.search.race import RaceRules
from minitron.search.trials import Record, Trials

logger = get_logger(__name__)

#: Beside the ranking: a folder for every task.
TASKS = "ranking.tasks"
_SETTINGS = (".begun.json", "manifest.json")

#: Name of a candidate of another worker → its record as far as that worker has come; None before it began.
Elsewhere = Callable[[str], Record | None]


@dataclass
class Share:
    """What this worker trains, and where it hears of the rest. ``wait`` seconds pass before it gives up; None waits on.

    What is not there then is an error if it is ``needed``, else a reason to leave and come back.
    """

    trials: Trials
    elsewhere: Elsewhere
    wait: float | None = 0.0
    stop: Callable[[], bool] = lambda: False
    what: str = "this worker"
    needed: bool = False

    def reach(self, alive: Sequence[str], rules: RaceRules, step: int, records: dict[str, Record], *, hear: bool) -> set[str]:
        """Train the own candidates up to a step, then hear of the others; the names of those that failed.

        Raises:
            Interrupted: a signal asked for a stop, or the others are not there yet.
            CheckpointError: the others are not there, and needed.
        """
        mine = [name for name in alive if name in self.trials.candidates]
        self.trials.drop([name for name in self.trials.candidates if name not in mine])
        self.trials.reach(mine, step, evaluations=rules.evaluations, last=step == rules.num_steps)
        records |= {name: self.trials.records[name] for name in mine}
        waiting, started = [name for name in alive if name not in mine] if hear else [], time.monotonic()
        while waiting:
            for name in list(waiting):
                found = self.elsewhere(name)
                if found is not None and (found.status != "ok" or found.reached >= step):
                    records[name] = found
                    waiting.remove(name)
            if waiting and (self.stop() or (self.wait is not None and time.monotonic() - started >= self.wait)):
                self.trials.save()
                if self.needed and not self.stop():
                    missing = f"{', '.join(waiting)} {'has' if len(waiting) == 1 else 'have'} not come to step {step}"
                    raise CheckpointError(f"{missing} in {TASKS} with these settings: {self.what} needs every task's share")
                raise Interrupted(f"{self.what} waits for {len(waiting)} candidates of others at step {step}; the same command goes on from there")
            if waiting:
                time.sleep(0.2)
        return {name for name in alive if name in records and records[name].status != "ok"}


def group_size(needs: Sequence[float], room: float) -> int:
    """Candidates that fit into ``room`` bytes side by side, the largest ones counted; at least one."""
    total = 0.0
    for count, need in enumerate(sorted(needs, reverse=True)):
        total += need
        if total > room:
            return max(count, 1)
    return max(len(needs), 1)


def free_bytes() -> float:
    """Memory that is free on this process's device; the least of all ranks."""
    if torch.cuda.is_available():
        free = float(torch.cuda.mem_get_info()[0])
    else:
        lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
        free = next((1024.0 * float(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 8e9) / dist.local_world_size()
    everyone = torch.zeros(dist.world_size(), dtype=torch.float64)
    everyone[dist.rank()] = free
    return float(dist.all_reduce_sum(everyone).min())


def take_over(found: Sequence[Path], folder: Path) -> None:
    """Rank 0 copies the records of other folders into this one where they are further."""
    taken = 0
    for path in found if dist.is_main() else ():
        theirs, ours = Record.read(path), Record.read(folder / path.name)
        if theirs is not None and (ours is None or ours.status == "ok" and (theirs.status != "ok" or theirs.reached > ours.reached)):
            write_text(folder / path.name, json.dumps(asdict(theirs)))
            taken += 1
    if taken:
        logger.info("  %d candidates were trained by tasks", taken)


def records_of_tasks(run_dir: Path, out: Path) -> list[Path]:
    """The records that tasks with the settings and inputs of ``out`` have written, wherever they stand."""
    found = []
    for folder in sorted((run_dir / TASKS).glob("*-of-*")):
        if _settings(folder) is not None and _settings(folder) == _settings(out):
            found += [path for path in sorted(folder.glob("*.json")) if path.name not in ("manifest.json", *_SETTINGS)]
    return found


def _settings(folder: Path) -> tuple[Any, Any] | None:
    """What a stage's folder was made from; None where nothing says."""
    for name in _SETTINGS:
        if (folder / name).is_file():
            document = json.loads((folder / name).read_text())
            return document["settings"], document["inputs"]
    return None


def others_of(run_dir: Path, out: Path, *, by_tasks: bool) -> Elsewhere:
    """Where a worker hears of other workers' candidates: the tasks' folders, or the folder that all ranks share."""

    def look(name: str) -> Record | None:
        if not by_tasks:
            return Record.read(out / f"{name}.json")
        return next((Record.read(path) for path in records_of_tasks(run_dir, out) if path.stem == name), None)

    return look
