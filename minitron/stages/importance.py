"""Score every unit of the teacher on the calibration samples."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from minitron import dist
from minitron.checkpoint.files import file_digest
from minitron.core.manifest import fingerprint_folder
from minitron.core.options import relevant
from minitron.core.scores import ImportanceScores, ScoreSums
from minitron.importance.shared.score import Scored, Scoring
from minitron.stages.calibration import Calibration, calibration_of, place_teacher, subject_of
from minitron.stages.context import StageContext

FOLDER = "scores"
SECTIONS = ("teacher", "data", "importance", "depth", "engine")
HELP = "score layers, hidden channels, neurons and heads of the teacher on calibration text"


def inputs(context: StageContext) -> dict[str, Any]:
    """The teacher to cut and the text."""
    depth = context.sections.depth
    task = {"task": file_digest(Path(depth.task).expanduser())} if depth.name == "accuracy" else {}
    return {"teacher": context.teacher_folder(to_cut=True), "data": context.data_fingerprint(), **task}


def run(context: StageContext, out: Path) -> dict[str, Any]:
    """Write ``scores.safetensors``, and ``sums.safetensors`` where scores of several runs can be merged."""
    importance, depth, placement = context.sections.importance, context.sections.depth, context.sections.teacher.placement
    calibration = calibration_of(context)
    model, prepare = place_teacher(context)
    scoring = Scoring(importance, depth, seed=context.seed, placement=placement, prepare=prepare, folder=out / "checkpoints", stop=context.stop)
    scored = scoring.run(subject_of(context, model, calibration))
    if dist.is_main():
        metadata = _metadata(context, calibration, scored)
        ImportanceScores(scored.tensors, metadata).save(out / "scores.safetensors")
        if scored.sums is not None:
            ScoreSums(scored.sums, metadata).save(out / "sums.safetensors")
    layers = scored.tensors["layer"].tolist()
    order = sorted(range(len(layers)), key=layers.__getitem__)
    return {"tokens": calibration.samples.numel(), "least_important_layers": order[: max(1, len(order) // 4)]}


def _metadata(context: StageContext, calibration: Calibration, scored: Scored) -> dict[str, Any]:
    """The header: what was measured on what. ``num_samples`` and ``num_tokens`` are those that counted."""
    importance, depth = context.sections.importance, context.sections.depth
    counted = calibration.counted
    identity = {
        "teacher": fingerprint_folder(context.teacher_folder(to_cut=True)),
        "calibration": context.data_fingerprint(),
        "tokenizer": calibration.tokenizer_fingerprint,
        "settings": {"importance": relevant(importance), "depth": relevant(depth), "packing": context.packing()},
        "sequence_length": calibration.samples.shape[1],
        "seed": context.seed,
    }
    return {
        "metric": importance.name,
        "depth_metric": depth.name,
        "num_samples": len(calibration.samples) if counted is None else int(counted.any(dim=1).sum()),
        "num_tokens": calibration.samples.numel() if counted is None else int(counted.sum()),
        **identity,
        "fingerprint": hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest(),
        **scored.details,
    }
