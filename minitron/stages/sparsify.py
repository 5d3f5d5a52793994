"""Set weights of the pruned model, or of the teacher, to zero."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minitron import dist
from minitron.core.sparsity import SparsityRecord
from minitron.engine import resolve_dtype
from minitron.models import Family, checkpoint_form, config_of, discover
from minitron.models.lazy import FolderWeights, load_lazily
from minitron.models.weights import WeightReader, copy_companions, write_weights
from minitron.sparsify.shared.samples import Samples
from minitron.sparsify.shared.sparsifier import Sparsifier, needs_text
from minitron.stages.calibration import calibration_of
from minitron.stages.context import SPARSE, StageContext

FOLDER = SPARSE
SECTIONS = ("teacher", "student", "data", "sparsify")
HELP = "set weights of the pruned model, or of the teacher, to zero (sparsify=wanda, sparsegpt…; sparsify.pattern=0.5, 2:4…)"


def inputs(context: StageContext) -> dict[str, Any]:
    """The model, and the text where the method looks at any."""
    text = {"data": context.data_fingerprint()} if needs_text(context.sections.sparsify) else {}
    return {"model": context.dense_folder(), **text}


def effective(context: StageContext) -> dict[str, Any]:
    """The text's settings count only where it is read."""
    return {} if needs_text(context.sections.sparsify) else {"data": {}}


def run(context: StageContext, out: Path) -> dict[str, Any]:
    """Write the model as a Hugging Face folder with zeros, and ``sparsity.json``."""
    source, settings, teacher = context.dense_folder(), context.sections.sparsify, context.sections.teacher
    config = config_of(source, teacher)
    family = discover(config)
    samples = None
    if needs_text(settings):
        calibration = calibration_of(context, settings.num_samples)
        samples = Samples(calibration.samples, calibration.counted, separator=context.separator())
    with WeightReader(source) as reader:
        sparsifier = Sparsifier(
            load_lazily(source, dtype=resolve_dtype(teacher.dtype), attention=teacher.attention),
            family,
            settings,
            samples,
            read=FolderWeights(reader, family).read,
            folder=out / "checkpoints",
            origin=context.origin(),
            stop=context.stop,
        )
        record = sparsifier.run()
        if dist.is_main():
            with dist.alone():
                write_weights(out, checkpoint_form(source, config)(sparsifier.weights()))
            config.save_pretrained(out)
            copy_companions(source, out)
            if (source / "plan.json").is_file():
                shutil.copyfile(source / "plan.json", out / "plan.json")
            record.save(out)
    dist.barrier()
    return {"tokens": 0 if samples is None else samples.ids.numel(), **_results(record, family)}


def _results(record: SparsityRecord, family: Family) -> dict[str, Any]:
    """Shares of zeros: of the sparse matrices together, of all parameters, by layer and by kind of matrix."""
    specs = {spec.name: spec for spec in family.layout.parameters if not spec.buffer}
    sizes = {name: math.prod(spec.shape(family.architecture.size)) for name, spec in specs.items()}
    layers = [[name for name in record.matrices if specs[name].layer == layer] for layer in range(family.architecture.num_layers)]
    kinds: dict[str, list[str]] = {}
    for name in record.matrices:
        kinds.setdefault(family.layout.suffix(specs[name]).removesuffix(".weight"), []).append(name)

    def share(names: Iterable[str]) -> float:
        zeros, weights = zip(*((record.matrices[name] * sizes[name], sizes[name]) for name in names), strict=True)
        return sum(zeros) / sum(weights)

    whole = share(record.matrices)
    return {
        "method": record.method,
        "pattern": record.pattern,
        "num_matrices": len(record.matrices),
        "share_of_zeros": whole,
        "share_of_zeros_in_model": whole * sum(sizes[name] for name in record.matrices) / sum(sizes.values()),
        "recovered": record.recovered,
        "layers": [share(names) if names else 0.0 for names in layers],
        "kinds": {kind: share(names) for kind, names in kinds.items()},
    }
