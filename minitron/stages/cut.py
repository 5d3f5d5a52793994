"""From a candidate to a plan, and from a plan to weights, for the stages that cut."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitron import dist
from minitron.core.candidate import Candidate
from minitron.core.layers import merges_for
from minitron.core.manifest import fingerprint_folder, write_text
from minitron.core.plan import PrunePlan, make_plan
from minitron.core.scores import ImportanceScores
from minitron.engine import resolve_dtype
from minitron.errors import CheckpointError
from minitron.evaluate import perplexity
from minitron.models.load import model_from_weights
from minitron.models.weights import WeightReader
from minitron.prune import layout_of, prune_weights, target_config
from minitron.stages.context import ZERO_SHOT, StageContext


def plan_for(context: StageContext, candidate: Candidate) -> PrunePlan:
    """The plan that a candidate's shape and the scores make.

    Raises:
        CheckpointError: there are no scores, or the search was made before them.
    """
    scores = ImportanceScores.load(context.run_dir / "scores" / "scores.safetensors")
    if candidate.kept_layers is None:
        raise CheckpointError("the candidates were listed without scores: run 'minitron search' again")
    prune, merges = context.sections.prune, merges_for(scores, candidate.kept_layers)
    plan = make_plan(
        scores,
        context.family().architecture,
        candidate.architecture,
        kept_layers=candidate.kept_layers,
        norm_rescale=prune.norm_rescale,
        head_merge=prune.head_merge,
    )
    return replace(plan, layer_merge=scores.metadata["laco"]["variant"], layer_merges=merges) if merges else plan


def plan_of(context: StageContext, name: str) -> PrunePlan:
    """The plan of a candidate by name, with the fingerprints of its teacher and scores."""
    plan = plan_for(context, next(candidate for candidate in context.candidates() if candidate.name == name))
    known = {**plan.provenance, "scores_fingerprint": fingerprint_folder(context.run_dir / "scores")}
    return replace(plan, teacher=fingerprint_folder(context.teacher_folder(to_cut=True)), provenance=known)


def given_plan(context: StageContext) -> PrunePlan:
    """The plan of ``prune.plan``, which must be one for the teacher that is cut.

    Raises:
        CheckpointError: there is no such plan, or it is for another teacher.
        ArchitectureError: its widths differ from layer to layer.
    """
    path, folder = context.sections.prune.plan, context.teacher_folder(to_cut=True)
    plan = PrunePlan.load(Path(path).expanduser(), context.family().architecture)
    check_plan_is_for(plan, path, folder=folder, fingerprint=fingerprint_folder(folder))
    return plan


def check_plan_is_for(plan: PrunePlan, path: str, *, folder: Path, fingerprint: str) -> None:
    """Refuse a plan that was made for another teacher than the one in a folder.

    Raises:
        CheckpointError: it was; both fingerprints are shown.
    """
    if plan.teacher != fingerprint:
        raise CheckpointError(f"prune.plan={path} is for the teacher with fingerprint {plan.teacher}, and {folder} has fingerprint {fingerprint}")


def cut_in_memory(context: StageContext, plan: PrunePlan, *, dtype: torch.dtype) -> nn.Module:
    """The pruned model, read from the teacher's folder tensor by tensor, on the CPU."""
    config: Any = context.teacher_config()
    reader = WeightReader(context.teacher_folder(to_cut=True))
    target = target_config(config, plan, context.family())
    family = context.family()
    cut = prune_weights(reader, plan, family, layout=layout_of(reader.files, family))
    weights = {name: tensor.to(dtype) for name, tensor in cut}
    return model_from_weights(target, weights, dtype=dtype, device=torch.device("cpu"))


def measure_zero_shot(context: StageContext) -> None:
    """Write the held-out loss of every candidate right after cutting, for want of a ranking."""
    sequences = context.held_out(context.sections.ranking.num_validation_sequences)
    dtype = resolve_dtype(context.sections.teacher.dtype)
    losses, separator = {}, context.separator()
    for candidate in context.candidates():
        model = cut_in_memory(context, plan_for(context, candidate), dtype=dtype).to(dist.device()).eval()
        losses[candidate.name] = perplexity(model, sequences, batch_size=4, what=candidate.name, alone=True, separator=separator)["loss"]
    folder = context.run_dir / "pruned"
    folder.mkdir(exist_ok=True)
    write_text(folder / ZERO_SHOT, json.dumps({"inputs": context.zero_shot_inputs(), "losses": losses}, indent=1))
