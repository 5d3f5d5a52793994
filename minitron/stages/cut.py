"""From a candidate to a plan, and from a plan to weights, for the stages that cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from minitron.core.candidate import Candidate
from minitron.core.plan import PrunePlan, make_plan
from minitron.core.scores import ImportanceScores
from minitron.errors import CheckpointError
from minitron.models.load import model_from_weights
from minitron.models.weights import WeightReader
from minitron.prune import prune_weights, target_config
from minitron.stages.context import StageContext


def plan_for(context: StageContext, candidate: Candidate) -> PrunePlan:
    """The plan that a candidate's shape and the scores make.

    Raises:
        CheckpointError: there are no scores, or the search was made before them.
    """
    scores = ImportanceScores.load(context.run_dir / "scores" / "scores.safetensors")
    if candidate.kept_layers is None:
        raise CheckpointError("the candidates were listed without scores: run 'minitron search' again")
    rescale = context.sections.prune.norm_rescale
    return make_plan(scores, context.family().architecture, candidate.architecture, kept_layers=candidate.kept_layers, norm_rescale=rescale)


def cut_in_memory(context: StageContext, plan: PrunePlan, *, dtype: torch.dtype) -> nn.Module:
    """The pruned model, read from the teacher's folder tensor by tensor, on the CPU."""
    config: Any = context.teacher_config()
    reader = WeightReader(context.teacher_folder(to_cut=True))
    target = target_config(config, plan, context.family())
    weights = {name: tensor.to(dtype) for name, tensor in prune_weights(reader.get, plan, context.family())}
    return model_from_weights(target, weights, dtype=dtype, device=torch.device("cpu"))
