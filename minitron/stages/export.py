"""Write the finished model as an ordinary Hugging Face folder, with a model card and its provenance."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minitron import __version__
from minitron.core.manifest import Manifest
from minitron.core.options import option
from minitron.core.plan import PrunePlan
from minitron.errors import CheckpointError, ConfigError
from minitron.models import config_of, load_causal_lm
from minitron.models.load import DTYPES
from minitron.models.weights import WeightReader, copy_companions, write_weights
from minitron.stages.context import StageContext, shape_of

FOLDER = "export"
SECTIONS = ("teacher", "student", "export")
HELP = "write the finished model as a Hugging Face folder that loads anywhere"
MAIN_ONLY = True


@dataclass(frozen=True)
class ExportConfig:
    """Section ``export``."""

    dtype: str = option("bf16", "dtype of the exported weights: float32, bf16 or float16")


def inputs(context: StageContext) -> dict[str, Any]:
    """The student, or the pruned model when nothing was distilled."""
    return {"model": _source(context)}


def _source(context: StageContext) -> Path:
    student = context.run_dir / "student"
    return student if (student / "manifest.json").is_file() else context.pruned_folder()


def run(context: StageContext, out: Path) -> dict[str, Any]:
    """Write the folder and load it back strictly before it counts."""
    dtype = context.sections.export.dtype
    if dtype not in DTYPES:
        raise ConfigError(f"export.dtype={dtype} is not one of {', '.join(DTYPES)}")
    source = _source(context)
    reader = WeightReader(source)
    count = write_weights(out, ((name, tensor.to(DTYPES[dtype])) for name, tensor in reader.items(reader.files)))
    config = config_of(source)
    config.dtype = {"bf16": "bfloat16"}.get(dtype, dtype)
    config.use_cache = True
    config.save_pretrained(out)
    copy_companions(source, out)
    predicted = shape_of(source).num_parameters
    reloaded = sum(p.numel() for p in load_causal_lm(out, dtype=DTYPES[dtype], device=torch.device("cpu")).parameters())
    if not count == reloaded == predicted:
        raise CheckpointError(f"the export has {reloaded} parameters after reloading, {count} were written and {predicted} predicted")
    provenance = _provenance(context, source, count)
    (out / "minitron.json").write_text(json.dumps(provenance, indent=1))
    (out / "README.md").write_text(_model_card(context, provenance))
    return {"num_parameters": count, "dtype": dtype, "source": source.name}


def _provenance(context: StageContext, source: Path, count: int) -> dict[str, Any]:
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


def _model_card(context: StageContext, provenance: dict[str, Any]) -> str:
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
