"""Where an exported model comes from: fingerprints, plan and training, as JSON and as a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minitron import __version__
from minitron.core.manifest import Manifest
from minitron.core.plan import PrunePlan
from minitron.stages.context import StageContext


def provenance_of(context: StageContext, source: Path, count: int) -> dict[str, Any]:
    """Where the model comes from: fingerprints, plan and training of the stages before."""
    found: dict[str, Any] = {"minitron_version": __version__, "num_parameters": count, "seed": context.seed, "stages": {}}
    pruned = context.pruned_folder()
    for folder in (context.run_dir / "teacher", context.run_dir / "scores", pruned, context.run_dir / "student"):
        manifest = Manifest.read(folder) if folder.is_dir() else None
        if manifest is not None:
            found["stages"][manifest.stage] = {"settings": manifest.settings, "inputs": manifest.inputs, "results": manifest.results}
    plan = pruned / "plan.json"
    if plan.is_file():
        found["plan"] = json.loads(plan.read_text())
        PrunePlan.load(plan, context.family().architecture)  # an export never carries a plan that cannot be replayed
    return found


def model_card(context: StageContext, provenance: dict[str, Any]) -> str:
    """The README of an exported model: lineage, size, tokens, licence."""
    stages = provenance["stages"]
    teacher = context.sections.teacher
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [minitron, pruned, distilled]", "---", ""]
    lines += [
        f"# {context.title}",
        "",
        f"A model of {provenance['num_parameters']:,} parameters, made with minitron {provenance['minitron_version']}.",
        "",
    ]
    lines += [f"- Teacher: `{teacher.path}`" + (f" ({teacher.note})" if teacher.note else "")]
    if "prune" in stages:
        lines.append(f"- Cut to: `{stages['prune']['results'].get('candidate')}` (kept units in `minitron.json`)")
    if "distill" in stages:
        results = stages["distill"]["results"]
        lines.append(f"- Distilled for {results.get('tokens', 0):,} tokens; held-out loss {results.get('validation_loss') or 0.0:.3f}")
    lines += ["", "The licence of the teacher applies to this model."]
    return "\n".join(lines) + "\n"
