"""Write the finished model as an ordinary Hugging Face folder, with a model card and its provenance."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minitron.core.options import option
from minitron.errors import CheckpointError, ConfigError
from minitron.models import config_of, discover, load_causal_lm
from minitron.models.load import DTYPES
from minitron.models.weights import WeightReader, copy_companions, write_weights
from minitron.stages.context import StageContext
from minitron.stages.provenance import model_card, provenance_of

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
    reader, teacher = WeightReader(source), context.sections.teacher
    count = write_weights(out, ((name, tensor.to(DTYPES[dtype])) for name, tensor in reader.items(reader.files)))
    config = config_of(source, teacher)
    config.dtype = {"bf16": "bfloat16"}.get(dtype, dtype)
    config.use_cache = True
    config.save_pretrained(out)
    copy_companions(source, out)
    predicted = discover(config_of(source, teacher)).architecture.num_parameters
    model = load_causal_lm(out, dtype=DTYPES[dtype], device=torch.device("cpu"), trust_remote_code=teacher.trust_remote_code)
    reloaded = sum(p.numel() for p in model.parameters())
    if not count == reloaded == predicted:
        raise CheckpointError(f"the export has {reloaded} parameters after reloading, {count} were written and {predicted} predicted")
    provenance = provenance_of(context, source, count)
    (out / "minitron.json").write_text(json.dumps(provenance, indent=1))
    (out / "README.md").write_text(model_card(context, provenance))
    return {"num_parameters": count, "dtype": dtype, "source": source.name}
