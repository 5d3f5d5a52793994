"""Enumerate shapes near the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minitron.core.architecture import Architecture
from minitron.core.candidate import Candidate, write_candidates
from minitron.core.layers import choose_layers
from minitron.core.scores import ImportanceScores
from minitron.errors import ArchitectureError
from minitron.log import get_logger
from minitron.models.family import resized_config
from minitron.search import axis_values, budget, enumerate_shapes, explicit_shape, pick_diverse
from minitron.stages.context import StageContext, config_fingerprint

FOLDER = "candidates"
SECTIONS = ("teacher", "target", "search", "depth", "data")
HELP = "list shapes near the parameter budget, from the teacher's config alone or with its scores"
MAIN_ONLY = True

logger = get_logger(__name__)


def inputs(context: StageContext) -> dict[str, Any]:
    """The teacher's config, and the scores when there are some."""
    found: dict[str, Any] = {"teacher_config": config_fingerprint(context.teacher_config())}
    if (context.run_dir / "scores" / "scores.safetensors").is_file():
        found["scores"] = context.run_dir / "scores"
    return found


def effective(context: StageContext) -> dict[str, Any]:
    """Of the data section only the sequence length matters, for the predicted costs."""
    return {"data": {"sequence_length": context.sections.data.sequence_length}}


def run(context: StageContext, out: Path) -> dict[str, Any]:
    """Write ``candidates.jsonl``, nearest to the budget first."""
    target, teacher = context.sections.target, context.family().architecture
    if target.name == "explicit":
        shapes = [explicit_shape(target, teacher)]
        within = 1
    else:
        space = axis_values(context.sections.search, teacher)
        found = enumerate_shapes(space, teacher, num_parameters=budget(target, teacher), tolerance=target.tolerance)
        usable = [shape for shape in found if _allowed(context, shape)]
        if not usable:
            raise ArchitectureError(
                f"the config class of '{context.family().model_type}' refuses every shape near the budget (heads must divide hidden_size)"
            )
        within, shapes = len(usable), pick_diverse(usable, context.sections.search.num_candidates)
    candidates = [_candidate(context, shape) for shape in shapes]
    write_candidates(out / "candidates.jsonl", candidates)
    for candidate in candidates:
        share = candidate.num_parameters / teacher.num_parameters
        logger.info("  %-32s %15s parameters  %5.1f%% of the teacher", candidate.name, f"{candidate.num_parameters:,}", 100 * share)
    return {"within_band": within, "kept": len(candidates)}


def _allowed(context: StageContext, shape: Architecture) -> bool:
    """Whether the family's config class takes these sizes."""
    try:
        resized_config(context.teacher_config(), context.family(), shape)
    except ArchitectureError:
        return False
    return True


def _candidate(context: StageContext, shape: Architecture) -> Candidate:
    kept = None
    scores = context.run_dir / "scores" / "scores.safetensors"
    if scores.is_file():
        depth = context.sections.depth
        kept = choose_layers(
            ImportanceScores.load(scores),
            shape.num_layers,
            selection=depth.selection,
            protect_first=depth.protect_first,
            protect_last=depth.protect_last,
            protect=depth.protect,
        ).kept
        shape = shape.replace(kept_layers=tuple(kept))
    length = context.sections.data.sequence_length
    costs = {
        "flops_per_token": shape.flops_per_token(length),
        "weight_bytes": 2.0 * shape.num_parameters,
        "kv_cache_bytes": float(shape.kv_cache_bytes(batch_size=1, sequence_length=length)),
    }
    return Candidate(shape.name, shape, shape.num_parameters, kept, costs)
