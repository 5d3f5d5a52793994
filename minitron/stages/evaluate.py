"""Quality of every model of the run, on held-out text and tasks, and the speed of teacher and finished model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from minitron import dist
from minitron.core.manifest import write_text
from minitron.engine import resolve_dtype
from minitron.errors import ArchitectureError
from minitron.evaluate import Tasks, measure_speed, perplexity
from minitron.log import get_logger
from minitron.models import discover, load_causal_lm, load_tokenizer
from minitron.stages.context import StageContext

FOLDER = "evaluation"
SECTIONS = ("teacher", "student", "data", "evaluate")
HELP = "measure perplexity on held-out text, scores on tasks (evaluate.tasks), latency, throughput and memory"

logger = get_logger(__name__)


def _models(context: StageContext) -> dict[str, Path]:
    """What there is to measure, in the order of the flow."""
    found: dict[str, Path | None] = {"teacher": context.original_teacher()}
    corrected = context.run_dir / "teacher"
    found["corrected_teacher"] = corrected if (corrected / "manifest.json").is_file() else None
    has_pruned = (context.run_dir / "candidates" / "candidates.jsonl").is_file() or context.sections.student.path or context.replayed()
    found["pruned"] = context.pruned_folder() if has_pruned else None
    found["sparse"] = context.run_dir / "sparse" if (context.run_dir / "sparse" / "manifest.json").is_file() else None
    distilled = (context.run_dir / "student" / "manifest.json").is_file()
    found["student"] = context.run_dir / ("export" if (context.run_dir / "export" / "manifest.json").is_file() else "student") if distilled else None
    return {name: folder for name, folder in found.items() if folder is not None and folder.is_dir()}


def inputs(context: StageContext) -> dict[str, Any]:
    """Every model there is, the text, and the task files of one's own."""
    settings = context.sections.evaluate
    tasks = {"tasks": Path(settings.task_path).expanduser()} if settings.tasks and settings.task_path else {}
    return {**_models(context), "data": context.data_fingerprint(), **tasks}


def run(context: StageContext, out: Path) -> dict[str, Any]:
    """Write ``metrics.json``: a row of figures per model; ``tasks`` and ``speed`` are tables inside it."""
    sections, settings = context.sections, context.sections.evaluate
    sequences, folders = context.held_out(settings.num_sequences), _models(context)
    names = list(folders)
    timed = {*names[:1], *names[-1:]} if settings.speed.batch_sizes and dist.is_main() else set()
    options = {"dtype": resolve_dtype(sections.teacher.dtype), "attention": sections.teacher.attention}
    tasks = Tasks(settings, seed=context.seed) if settings.tasks else None  # with their data, before a model is loaded
    metrics: dict[str, Any] = {}
    held: dict[str, nn.Module] = {}
    for name, folder in folders.items():
        model = load_causal_lm(folder, **options, trust_remote_code=sections.teacher.trust_remote_code)
        row = perplexity(model, sequences, batch_size=settings.batch_size, what=name, separator=context.separator())
        metrics[name] = {**row, **_sizes(model, sequences.shape[1])}
        logger.info("  %-18s perplexity %8.2f   %s parameters", name, row["perplexity"], f"{metrics[name]['num_parameters']:,}")
        if tasks is not None:
            tokenizer = load_tokenizer(folder, trust_remote_code=sections.teacher.trust_remote_code)
            metrics[name]["tasks"] = tasks.measure(model, tokenizer, what=name)
        if name in timed:
            held[name] = model
        del model
    for name, speed in (measure_speed(held, sequences, settings.speed) if held else {}).items():
        metrics[name]["speed"] = speed
    if sections.teacher.note:
        metrics["note"] = sections.teacher.note
    if dist.is_main():
        write_text(out / "metrics.json", json.dumps(metrics, indent=1))
    rows = {name: metrics[name] for name in folders}
    return {"tokens": sum(row["num_tokens"] for row in rows.values()), **{name: row["perplexity"] for name, row in rows.items()}}


def _sizes(model: nn.Module, sequence_length: int) -> dict[str, float]:
    """Parameters; FLOPs and bytes of keys and values per token where the family is known."""
    found: dict[str, float] = {"num_parameters": sum(p.numel() for p in model.parameters())}
    try:
        shape = discover(model.config).architecture
    except ArchitectureError:  # it can be measured, not cut
        return found
    cache = shape.kv_cache_bytes(batch_size=1, sequence_length=1)
    return found | {"flops_per_token": shape.flops_per_token(sequence_length), "kv_cache_bytes_per_token": cache}
