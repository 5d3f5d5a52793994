"""Write the finished model as an ordinary Hugging Face folder, with a model card and its provenance."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minitron.core.options import option
from minitron.errors import ConfigError, MinitronError
from minitron.models import config_of, discover
from minitron.models.checkpoint_form import folder_weights, kept_in_float32
from minitron.models.load import DTYPES
from minitron.models.publish import check_reload, copy_licence, publish_config
from minitron.models.sparse_folder import carry_from
from minitron.models.weights import WeightReader, copy_companions, write_weights
from minitron.stages.context import StageContext
from minitron.stages.model_card import model_card
from minitron.stages.provenance import provenance_of

FOLDER = "export"
SECTIONS = ("teacher", "student", "export")
HELP = "write the finished model as a Hugging Face folder that loads anywhere"
MAIN_ONLY = True


@dataclass(frozen=True)
class ExportConfig:
    """Section ``export``."""

    dtype: str = option("bf16", "dtype of the exported weights: float32, bf16 or float16")
    shard_gb: float = option(5.0, "size of a weight file in GB (1e9 bytes) from which on there are several")

    def check(self) -> None:
        """Refuse what cannot be written.

        Raises:
            ConfigError: an unknown dtype, or files of no size.
        """
        if self.dtype not in DTYPES:
            raise ConfigError(f"export.dtype={self.dtype} is not one of {', '.join(DTYPES)}")
        if not self.shard_gb > 0:
            raise ConfigError(f"export.shard_gb={self.shard_gb:g} must be above 0")


def inputs(context: StageContext) -> dict[str, Any]:
    """The student, or the sparse or pruned model when nothing was distilled."""
    return {"model": _source(context)}


def _source(context: StageContext) -> Path:
    student = context.run_dir / "student"
    return student if (student / "manifest.json").is_file() else context.student_folder()


def run(context: StageContext, out: Path) -> dict[str, Any]:
    """Write the folder, and let a fresh process load it before it counts; what fails there is taken away again."""
    context.sections.export.check()
    try:
        return _write(context, out)
    except MinitronError:
        for entry in out.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif not entry.name.startswith("."):
                entry.unlink()
        raise


def _write(context: StageContext, out: Path) -> dict[str, Any]:
    settings, teacher, source = context.sections.export, context.original_teacher(), _source(context)
    dtype = DTYPES[settings.dtype]
    name = str(dtype).removeprefix("torch.")
    config = config_of(source, context.sections.teacher)
    family = discover(config)
    kept = kept_in_float32(config, family, dtype)
    with WeightReader(source) as reader:
        narrowed = ((key, tensor if key in kept else _narrow(tensor, dtype)) for key, tensor in folder_weights(reader, family))
        write_weights(out, narrowed, shard_bytes=int(settings.shard_gb * 1e9))
    shape = family.architecture
    publish_config(config, out, dtype=name, head_dim=shape.head_dim)
    copy_companions(source, out)
    carry_from(source, out, family)
    for folder in (source, teacher):
        if folder is not None:
            copy_licence(folder, out)
    provenance = provenance_of(context, source, shape.num_parameters) | {"dtype": name}
    (out / "minitron.json").write_text(json.dumps(provenance, indent=1))
    (out / "README.md").write_text(model_card(context.title, provenance))
    checked = check_reload(out, source=source, family=family, dtype=name, kept=kept)
    return {"num_parameters": shape.num_parameters, "dtype": settings.dtype, "source": source.name, "checked_with": checked}


def _narrow(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
