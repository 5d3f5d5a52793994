"""Where an exported model comes from: teacher, plan, text, training and measurements, as JSON that a run can be replayed from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minitron import __version__
from minitron.core.manifest import Manifest, fingerprint_folder
from minitron.core.plan import PrunePlan
from minitron.errors import MinitronError
from minitron.models.publish import licence_of
from minitron.stages.context import StageContext
from minitron.tracking.jsonl import FILE_NAME, read_metrics

#: Folders of a run from which a model is made, in the order of the flow; the chosen pruned folder goes before the last.
_BEFORE = ("teacher", "scores", "candidates", "ranking")
_TOLD = ("settings", "inputs", "tokens", "results")


def provenance_of(context: StageContext, source: Path, count: int) -> dict[str, Any]:
    """Where the model in ``source`` comes from.

    ``parent`` is the teacher with its content hash, ``plan`` what was kept of it (``prune.plan`` takes it), ``scores`` the fingerprint of
    the scores behind the plan, ``stages`` settings, inputs and results of every stage.

    Raises:
        CheckpointError: a manifest is damaged, or the plan of this run cannot be replayed.
    """
    sparse = context.sparse_folder()
    pruned = context.dense_folder() if sparse else context.pruned_folder()
    folders = [*(context.run_dir / name for name in _BEFORE), pruned, sparse or pruned, context.run_dir / "student"]
    manifests = {made.stage: made for folder in folders if folder != context.original_teacher() and (made := Manifest.read(folder)) is not None}
    plan = _plan_of(context, pruned)
    return {
        "minitron_version": __version__,
        "num_parameters": count,
        "seed": context.seed,
        "parent": _parent(context, plan),
        "scores": (plan or {}).get("provenance", {}).get("scores_fingerprint"),
        "data": _data(manifests),
        "metrics": _metrics(context, pruned, manifests),
        "made_elsewhere": fingerprint_folder(pruned) if context.sections.student.path else None,
        "plan": plan,
        "stages": {name: {key: getattr(manifest, key) for key in _TOLD} for name, manifest in manifests.items()},
    }


def _plan_of(context: StageContext, pruned: Path) -> dict[str, Any] | None:
    """The plan beside the pruned weights; one that came with a model made elsewhere only when it is of this teacher."""
    path = pruned / "plan.json"
    if not path.is_file():
        return None
    try:
        PrunePlan.load(path, context.family().architecture)  # an export never carries a plan that cannot be replayed
    except MinitronError:
        if context.sections.student.path:
            return None
        raise
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def _parent(context: StageContext, plan: dict[str, Any] | None) -> dict[str, Any]:
    teacher, folder = context.sections.teacher, context.original_teacher()
    name = Path(teacher.path).name if teacher.path and Path(teacher.path).expanduser().is_absolute() else teacher.path
    found: dict[str, Any] = {"name": name, "revision": teacher.revision, "note": teacher.note}
    found["fingerprint"] = (plan or {}).get("teacher") or (fingerprint_folder(folder) if folder is not None else None)
    return found | {"architecture": context.family().architecture.to_dict(), "licence": licence_of(folder) if folder is not None else {}}


def _data(manifests: dict[str, Manifest]) -> dict[str, Any]:
    """Name, fingerprint and tokens of the text, as the last stage that read it recorded them."""
    reading = [manifest for manifest in manifests.values() if "data" in manifest.inputs]
    if not reading:
        return {}
    section = reading[-1].recorded.get("data", {})
    given = [section] if any(section.get(key) for key in ("path", "name", "builtin")) else section.get("sources") or []
    names = [Path(entry["path"]).name if entry.get("path") else str(entry.get("name") or entry.get("builtin")) for entry in given]
    tokens = {stage: manifest.tokens for stage, manifest in manifests.items() if manifest.tokens}
    return {"name": ", ".join(names) or None, "fingerprint": reading[-1].inputs["data"], "tokens": tokens}


def _metrics(context: StageContext, pruned: Path, manifests: dict[str, Manifest]) -> dict[str, dict[str, float]]:
    """Held-out loss of every model: of ``evaluate`` where it measured these very weights, else of the validation while training."""
    found: dict[str, dict[str, float]] = {}
    student = context.run_dir / "student"
    if "distill" in manifests and (student / FILE_NAME).is_file():
        points = [row for row in read_metrics(student / FILE_NAME) if "validation_loss" in row]
        start = points[0]["validation_loss"] if points and points[0]["step"] == 0 else None
        known = {"sparse" if "sparsify" in manifests else "pruned": start, "student": manifests["distill"].results.get("validation_loss")}
        found = {name: {"loss": loss} for name, loss in known.items() if loss is not None}
    if (measured := Manifest.read(context.run_dir / "evaluation")) is None:
        return found
    folders = {"teacher": context.original_teacher(), "pruned": pruned, "student": student}
    folders |= {"corrected_teacher": context.run_dir / "teacher", "sparse": context.sparse_folder()}
    same = [name for name, path in folders.items() if name in measured.inputs and path and measured.inputs[name] == fingerprint_folder(path)]
    rows = json.loads((context.run_dir / "evaluation" / "metrics.json").read_text())
    # Figures of one measurement only: another text or length would not compare.
    return {name: {key: rows[name][key] for key in ("loss", "perplexity", "num_tokens")} for name in same} or found
