"""Enumerate shapes near the budget."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from minitron.core.architecture import Architecture
from minitron.core.candidate import Candidate, write_candidates
from minitron.core.layers import reachable_layers
from minitron.core.scores import ImportanceScores
from minitron.errors import ArchitectureError
from minitron.log import get_logger
from minitron.models.family import resized_config
from minitron.search import Workload, explicit_shape, find_shapes, limits_of, predicted_costs, require_limits
from minitron.search.measurement import measurer
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
    teacher = context.family().architecture
    shapes, num_found, num_points, workload = search_shapes(context)
    candidates = [
        Candidate(
            shape.name,
            shape,
            shape.num_parameters,
            None if shape.kept_layers is None else list(shape.kept_layers),
            predicted_costs(shape, teacher, workload),
        )
        for shape in shapes
    ]
    write_candidates(out / "candidates.jsonl", candidates)
    for candidate in candidates:
        share = candidate.num_parameters / teacher.num_parameters
        logger.info("  %-32s %15s parameters  %5.1f%% of the teacher", candidate.name, f"{candidate.num_parameters:,}", 100 * share)
    return {"points": num_points, "within_band": num_found, "kept": len(candidates)}


def search_shapes(context: StageContext) -> tuple[list[Architecture], int, int, Workload]:
    """The candidates' shapes, how many kept all limits of how many points, and what their costs are predicted for.

    Raises:
        MinitronError: nothing meets the target.
    """
    sections, family = context.sections, context.family()
    target, teacher = sections.target, family.architecture
    workload = target.workload(sections.data.sequence_length, measure=partial(measurer, context.teacher_config(), family))
    if target.name == "explicit":
        kept = _kept_layers(context, [(shape := explicit_shape(target, teacher)).num_layers])
        if target.limits or target.num_parameters is not None or target.ratio is not None:
            require_limits(shape, limits_of(target, teacher, workload), teacher, workload)
        return [shape if kept is None else shape.replace(kept_layers=kept[shape.num_layers])], 1, 1, workload
    kept = _kept_layers(context, list(range(1, teacher.num_layers + 1)))
    found = find_shapes(sections.search, target, teacher, workload=workload, kept=kept)
    shapes = found.diverse(sections.search.num_candidates, allowed=lambda shape: _allowed(context, shape))
    if not shapes:
        raise ArchitectureError(f"the config class of '{family.model_type}' refuses every shape near the budget (heads must divide hidden_size)")
    if len(found) < sections.search.num_candidates:
        logger.info("  %d shapes keep the target, fewer than search.num_candidates=%d", len(found), sections.search.num_candidates)
    return shapes, len(found), found.num_points, workload


def _allowed(context: StageContext, shape: Architecture) -> bool:
    """Whether the family's config class takes these sizes."""
    try:
        return resized_config(context.teacher_config(), context.family(), shape) is not None
    except ArchitectureError:
        return False


def _kept_layers(context: StageContext, numbers: list[int]) -> dict[int, tuple[int, ...]] | None:
    """The layers to keep for every number of them that the depth scores can come to; None without scores."""
    path, depth = context.run_dir / "scores" / "scores.safetensors", context.sections.depth
    if not path.is_file():
        return None
    options = {name: getattr(depth, name) for name in ("selection", "protect_first", "protect_last", "protect")}
    return reachable_layers(ImportanceScores.load(path), numbers, **options)
