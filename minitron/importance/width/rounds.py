"""Scoring in rounds (Minitron, arXiv 2407.14679, section 2.2): score, mask a share of the units that will go, score the rest again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from minitron import dist
from minitron.core.architecture import Architecture
from minitron.core.plan import PrunePlan, make_plan
from minitron.core.scores import ImportanceScores
from minitron.errors import ConfigError
from minitron.importance.width.config import ImportanceConfig
from minitron.models.family import Family
from minitron.prune.masking import kept_elements

Tensors = dict[str, torch.Tensor]


def score_in_rounds(
    config: ImportanceConfig, model: nn.Module, family: Family, one_round: Callable[[int], Tensors], *, folder: Path | None = None
) -> Tensors:
    """Width scores after ``config.rounds`` rounds; with one, those of ``one_round(0)``.

    After round r of T the units are masked that a cut to a shape r/T of the way to ``shrink_to`` would take, by zeros in the model's own weights
    (norms keep theirs: for RMS norms that equals a cut with rescaled norm weights, for layer norms it comes near). Units that stay have the
    scores of the last round. One that was masked after round r has r - T + s / (2 max s), which lies below 0, below all that were masked later,
    and in the order of its own round's scores s.

    Args:
        one_round: scores of the model as it is, by the round's number from 0; equal on all ranks.
        folder: where finished rounds are kept for a restart; None: nowhere.

    Raises:
        ConfigError: the teacher has no such shape within it.
    """
    masked: Tensors = {}
    for number in range(config.rounds):
        scores = _one(one_round, number, folder if config.rounds > 1 else None)
        for name, values in masked.items():
            scores[name] = torch.where(values < 0, values, scores[name])
        if number + 1 < config.rounds:
            shape = _shape_after(family.architecture, config, (number + 1) / config.rounds)
            plan = make_plan(ImportanceScores(scores), family.architecture, shape, kept_layers=list(range(shape.num_layers)))
            _mask(model, plan, family)
            masked = _ranked(scores, plan, float(number + 1 - config.rounds))
    return scores


def check_sizes(config: ImportanceConfig, teacher: Architecture) -> None:
    """Refuse sizes that are no cut of a teacher.

    Raises:
        ConfigError: the axis, its size, and what the teacher has.
    """
    for axis, size in (config.shrink_to or {}).items():
        if not 1 <= size <= teacher.size(axis):
            raise ConfigError(f"importance.shrink_to.{axis}={size}: the teacher has {teacher.size(axis)} units on that axis")
    if config.shrink_to:
        _shape_after(teacher, config, 1.0)


def _one(one_round: Callable[[int], Tensors], number: int, folder: Path | None) -> Tensors:
    """The scores of a round, made now or before a restart."""
    path = folder / f"round-{number}.safetensors" if folder is not None else None
    if path is not None and path.is_file():
        return ImportanceScores.load(path).tensors
    scores = one_round(number)
    if path is not None and dist.is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        ImportanceScores(scores).save(partial)
        partial.replace(path)
    dist.barrier()
    return scores


def _shape_after(teacher: Architecture, config: ImportanceConfig, share: float) -> Architecture:
    """A shape ``share`` of the way from the teacher to ``shrink_to``; heads keep their number per kv group whole."""
    wanted = dict(config.shrink_to or {})

    def between(now: int, then: int) -> int:
        return round(now + (then - now) * share)

    sizes = {Architecture.option(axis): between(teacher.size(axis), size) for axis, size in wanted.items() if axis not in ("head", "kv_head")}
    if {"head", "kv_head"} & wanted.keys():
        per_group = teacher.num_heads // teacher.num_kv_heads
        groups = wanted.get("kv_head", wanted["head"] if per_group == 1 else teacher.num_kv_heads)
        heads = wanted.get("head", per_group * groups)
        if heads % groups or heads // groups > per_group:
            raise ConfigError(
                f"importance.shrink_to leaves {heads} heads in {groups} kv groups: give each group the same number, of at most {per_group}"
            )
        kept_groups = between(teacher.num_kv_heads, groups)
        sizes |= {"num_kv_heads": kept_groups, "num_heads": kept_groups * between(per_group, heads // groups)}
    return teacher.with_coupled(**sizes)


def _mask(model: nn.Module, plan: PrunePlan, family: Family) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for spec in family.layout.parameters:
            if not spec.buffer and spec.module not in family.norms:
                parameter = parameters[spec.name]
                parameter.masked_fill_(~kept_elements(spec, plan, family).to(parameter.device), 0.0)


def _ranked(scores: Tensors, plan: PrunePlan, base: float) -> Tensors:
    """Scores below 0 for all units that a plan drops: those dropped before as they are, the others from ``base`` to ``base`` + 1/2; the rest 0."""
    found = {}
    for name, values in scores.items():
        axis, _, layer = name.partition(".")
        if axis == "expert_ffn":
            rows = [_ranked_row(values[expert], kept, base) for expert, kept in enumerate(plan.by_expert[int(layer)])]
            found[name] = torch.stack(rows)
        elif axis == "hidden" or axis in plan.by_layer:
            kept = plan.hidden if axis == "hidden" else plan.by_layer[axis][int(layer)]
            found[name] = _ranked_row(values, kept, base)
    return found


def _ranked_row(values: torch.Tensor, kept: list[int], base: float) -> torch.Tensor:
    stays = torch.zeros_like(values, dtype=torch.bool)
    stays[kept] = True
    fresh = base + values / (2 * values[~stays].max().clamp_min(1e-30)) if not stays.all() else values
    return torch.where(stays, 0.0, torch.where(values < 0, values, fresh))
