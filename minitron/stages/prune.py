"""Cut the teacher down to the chosen candidates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.core.options import option
from minitron.core.plan import cut_axes
from minitron.errors import ConfigError, nearest
from minitron.models.weights import WeightReader, copy_companions, write_weights
from minitron.prune import layout_of, prune_weights, target_config
from minitron.prune.proof import require_proof
from minitron.stages.context import StageContext
from minitron.stages.cut import given_plan, measure_zero_shot, plan_of

FOLDER = "pruned"
SECTIONS = ("teacher", "depth", "prune", "data", "ranking")
HELP = "write the winning candidate, or those asked for, as Hugging Face folders"
MAIN_ONLY = True
#: Sequence length at which FLOPs per token are stated in the results.
_COST_LENGTH = 4096


@dataclass(frozen=True)
class PruneConfig:
    """Section ``prune``."""

    candidates: list[str] | None = option(None, "names of candidates to write; null: the winner", recorded=True)
    plan: str | None = option(None, "plan.json, or minitron.json of an export: make that cut again, without scores and candidates", recorded=True)
    norm_rescale: bool = option(True, "scale norms for the changed mean when hidden channels are cut (exact); false: the papers' plain slicing")
    head_merge: str = option("off", "fold the residual of dropped query heads into kept ones: off, paper or laco (the paper's formula, LaCo's sign)")


def folders(context: StageContext) -> list[str]:
    """One folder per candidate, or the one of a given plan.

    Raises:
        ConfigError: a name that search did not list, or a plan in a run that has candidates of its own.
    """
    if context.sections.prune.plan:
        if (context.run_dir / "candidates").is_dir():
            raise ConfigError(f"{context.run_dir} has candidates of its own: give another run_dir for the cut of prune.plan")
        return [f"{FOLDER}/{given_plan(context).architecture.name}"]
    known = [candidate.name for candidate in context.candidates()]
    names = context.sections.prune.candidates
    if names is None:
        if len(known) > 1 and not (context.run_dir / "ranking" / "ranking.json").is_file() and not context.zero_shot_losses():
            measure_zero_shot(context)
        names = [context.winner()]
    for name in names:
        if name not in known:
            raise ConfigError(f"prune.candidates has '{name}', which is not in candidates.jsonl; {nearest(name, known)}")
    return [f"{FOLDER}/{name}" for name in names]


def effective(context: StageContext) -> dict[str, Any]:
    """The text decides which candidate is written, not how it is cut; a given plan says all by itself."""
    return {"data": {}, "ranking": {}} | ({"depth": {}, "prune": {}} if context.sections.prune.plan else {})


def inputs(context: StageContext) -> dict[str, Any]:
    """Teacher, scores and candidates; or teacher and plan."""
    if context.sections.prune.plan:
        return {"teacher": context.teacher_folder(to_cut=True), "plan": given_plan(context).fingerprint}
    return {
        "teacher": context.teacher_folder(to_cut=True),
        "scores": context.run_dir / "scores",
        "candidates": context.run_dir / "candidates",
    }


def run(context: StageContext, out: Path) -> dict[str, Any]:
    """Write weights, config, tokenizer and ``plan.json`` of the candidate that the folder is named for."""
    name = out.name.removesuffix(".partial")
    config, family, source = context.teacher_config(), context.family(), context.teacher_folder(to_cut=True)
    plan = given_plan(context) if context.sections.prune.plan else plan_of(context, name)
    shape = plan.architecture
    require_proof(config, cut=cut_axes(plan, family.architecture))
    target = target_config(config, plan, family)
    reader = WeightReader(source)
    count = write_weights(out, prune_weights(reader, plan, family, layout=layout_of(reader.files, family)))
    count -= sum(math.prod(spec.shape(shape.size)) for spec in family.layout.select(shape.num_layers, plan.layer) if spec.buffer)
    assert count == shape.num_parameters, f"wrote {count} parameters, predicted {shape.num_parameters}"
    target.save_pretrained(out)
    copy_companions(source, out)
    plan.save(out / "plan.json")
    length = min(_COST_LENGTH, getattr(config, "max_position_embeddings", _COST_LENGTH))
    return {
        "candidate": name,
        "num_parameters": count,
        "teacher_num_parameters": family.architecture.num_parameters,
        "costs": {"flops_per_token": shape.flops_per_token(length)},
        "teacher_costs": {"flops_per_token": family.architecture.flops_per_token(length)},
        "teacher_architecture": family.architecture.to_dict(),
        "architecture": shape.to_dict(),
    }
