"""What trackers are shown of a finished stage, beside the metrics that training sends while it runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron.core.manifest import Manifest, fingerprint_folder
from minitron.log import get_logger
from minitron.tracking import CompositeTracker, build_trackers
from minitron.tracking.wandb import ID_FILE

logger = get_logger(__name__)

#: Where trackers keep what belongs to no training; finished folders are not written to.
FOLDER = "tracking"
#: Trackers that show more than lines of metrics.
_RICH = ("wandb", "tensorboard")
_MODELS = ("correct", "prune", "sparsify", "distill", "export")


def track_stage(folder: Path, manifest: Manifest, *, run_dir: Path, title: str, tracking: Mapping[str, Any], config: dict[str, Any]) -> None:
    """Show what a stage has made: candidates as a table and their curves, scores of models, and folders by reference.

    A wandb run of a training goes on under its id, in another part.
    """
    chosen = {name: options for name, options in tracking.items() if name in _RICH}
    if not chosen or manifest.stage not in (*_MODELS, "search", "rank", "evaluate"):
        return
    place = run_dir / FOLDER / folder.relative_to(run_dir)
    place.mkdir(parents=True, exist_ok=True)
    if (folder / ID_FILE).is_file():
        shutil.copyfile(folder / ID_FILE, place / ID_FILE)
    about: dict[str, Any] = {"run_name": f"{title}/{manifest.stage}", "group": title, "job": manifest.stage, "config": config}
    tracker = build_trackers(chosen, folder=place, **about)
    try:
        _show(tracker, folder, manifest, title)
    except (OSError, ValueError, KeyError) as error:  # the stage is finished; what it is shown in must not undo that
        logger.warning("  %s is not shown in full by %s (%s: %s)", folder, " and ".join(chosen), type(error).__name__, error)
    finally:
        tracker.close()


def _show(tracker: CompositeTracker, folder: Path, manifest: Manifest, title: str) -> None:
    if manifest.stage in _MODELS:
        facts = {"fingerprint": fingerprint_folder(folder), "stage": manifest.stage, **manifest.results}
        tracker.reference("-".join([title, *folder.parts[-2:]] if manifest.stage == "prune" else [title, folder.name]), folder, facts)
    elif manifest.stage == "search":
        rows = [json.loads(line) for line in (folder / "candidates.jsonl").read_text().splitlines()]
        tracker.table("candidates", [{"name": row["name"], "num_parameters": row["num_parameters"], **row.get("costs", {})} for row in rows])
    elif manifest.stage == "rank" and (folder / "ranking.json").is_file():
        _show_ranking(tracker, json.loads((folder / "ranking.json").read_text())["candidates"])
    elif manifest.stage == "evaluate":
        tracker.log(0, _flat(json.loads((folder / "metrics.json").read_text())))


def _show_ranking(tracker: CompositeTracker, rows: list[dict[str, Any]]) -> None:
    plain = [{key: value for key, value in row.items() if not isinstance(value, (list, dict))} for row in rows]
    tracker.table("candidates", plain)
    for place, (row, facts) in enumerate(zip(rows, plain, strict=True), start=1):
        points = [{key: value for key, value in point.items() if isinstance(value, (int, float))} for point in row.get("curve") or ()]
        if points:
            tracker.curve(str(row["name"]), points, {**facts, "place": place})


def _flat(metrics: Mapping[str, Any]) -> dict[str, float]:
    """``student/perplexity``, ``student/piqa/acc``, ``student/piqa/acc_stderr``: every figure of every model under one name."""
    found: dict[str, float] = {}
    for model, row in metrics.items():
        if not isinstance(row, dict):
            continue
        found |= {f"{model}/{key}": value for key, value in row.items() if isinstance(value, (int, float))}
        for task, scores in (row.get("tasks") or {}).items():
            for metric, score in scores["metrics"].items():
                found[f"{model}/{task}/{metric}"] = score["value"]
                if score["stderr"] is not None:
                    found[f"{model}/{task}/{metric}_stderr"] = score["stderr"]
        for batch in (row.get("speed") or {}).get("batches", ()):
            named = {key: value for key, value in batch.items() if key != "batch_size" and isinstance(value, (int, float))}
            found |= {f"{model}/batch_{batch['batch_size']}/{key}": value for key, value in named.items()}
    return found
