"""Held-out perplexity of teacher, pruned model and student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minitron import dist
from minitron.core.manifest import write_text
from minitron.engine import resolve_dtype
from minitron.evaluate import perplexity
from minitron.log import get_logger
from minitron.models import load_causal_lm
from minitron.stages.context import StageContext

FOLDER = "evaluation"
SECTIONS = ("teacher", "student", "data", "evaluate")
HELP = "measure perplexity on held-out text"

logger = get_logger(__name__)


def _models(context: StageContext) -> dict[str, Path]:
    """What there is to measure, in the order of the flow."""
    found: dict[str, Path | None] = {"teacher": context.original_teacher()}
    corrected = context.run_dir / "teacher"
    found["corrected_teacher"] = corrected if (corrected / "manifest.json").is_file() else None
    has_pruned = (context.run_dir / "candidates" / "candidates.jsonl").is_file() or context.sections.student.path or context.replayed()
    found["pruned"] = context.pruned_folder() if has_pruned else None
    distilled = (context.run_dir / "student" / "manifest.json").is_file()
    found["student"] = context.run_dir / ("export" if (context.run_dir / "export" / "manifest.json").is_file() else "student") if distilled else None
    return {name: folder for name, folder in found.items() if folder is not None and folder.is_dir()}


def inputs(context: StageContext) -> dict[str, Any]:
    """Every model there is, and the text."""
    return {**_models(context), "data": context.data_fingerprint()}


def run(context: StageContext, out: Path) -> dict[str, Any]:
    """Write ``metrics.json``."""
    settings = context.sections.evaluate
    sequences = context.held_out(settings.num_sequences)
    dtype = resolve_dtype(context.sections.teacher.dtype)
    metrics: dict[str, Any] = {}
    for name, folder in _models(context).items():
        teacher = context.sections.teacher
        model = load_causal_lm(folder, dtype=dtype, attention=teacher.attention, trust_remote_code=teacher.trust_remote_code)
        metrics[name] = perplexity(model, sequences, batch_size=settings.batch_size, what=name, separator=context.separator())
        metrics[name]["num_parameters"] = sum(p.numel() for p in model.parameters())
        logger.info("  %-18s perplexity %8.2f   %s parameters", name, metrics[name]["perplexity"], f"{metrics[name]['num_parameters']:,}")
    if context.sections.teacher.note:
        metrics["note"] = context.sections.teacher.note
    if dist.is_main():
        write_text(out / "metrics.json", json.dumps(metrics, indent=1))
    tokens = sum(row["num_tokens"] for row in metrics.values() if isinstance(row, dict))
    return {"tokens": tokens, **{name: row["perplexity"] for name, row in metrics.items() if isinstance(row, dict)}}
