"""Score every unit of the teacher on the calibration samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minitron import dist
from minitron.checkpoint import Checkpointer
from minitron.core.manifest import fingerprint_folder
from minitron.core.scores import ImportanceScores
from minitron.importance import build_observers
from minitron.importance.scoring import run_pass
from minitron.stages.context import StageContext

FOLDER = "scores"
SECTIONS = ("teacher", "data", "importance", "depth")
HELP = "score layers, hidden channels, neurons and heads of the teacher on calibration text"


def inputs(context: StageContext) -> dict[str, Any]:
    """The teacher to cut and the text."""
    return {"teacher": context.teacher_folder(to_cut=True), "data": context.data_fingerprint()}


def run(context: StageContext, out: Path) -> dict[str, Any]:
    """Write ``scores.safetensors``."""
    importance, depth = context.sections.importance, context.sections.depth
    observers = build_observers(importance, depth, seed=context.seed)
    samples = context.text().take(importance.num_samples, split="train")
    model = context.load_teacher(to_cut=True)
    scores = run_pass(
        model,
        context.family(),
        samples,
        observers,
        batch_size=importance.batch_size,
        checkpointer=Checkpointer(out / "checkpoints"),
        checkpoint_every=importance.checkpoint_every,
        stop=context.stop,
    )
    metadata = {
        "metric": importance.name,
        "depth_metric": depth.name,
        "aggregation": {name: o.aggregation for name, o in zip((importance.name, depth.name), observers, strict=True)},
        "num_samples": len(samples),
        "num_tokens": samples.numel(),
        "calibration": context.data_fingerprint(),
        "teacher": fingerprint_folder(context.teacher_folder(to_cut=True)) if dist.is_main() else "",
        "seed": context.seed,
    }
    if dist.is_main():
        ImportanceScores(scores, metadata).save(out / "scores.safetensors")
    layers = scores["layer"].tolist()
    order = sorted(range(len(layers)), key=layers.__getitem__)
    return {"tokens": samples.numel(), "least_important_layers": order[: max(1, len(order) // 4)]}
