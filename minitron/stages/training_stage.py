"""What ``correct`` and ``distill`` share: train a model and write it as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minitron import dist
from minitron.distill.best import write_shared_weights
from minitron.distill.losses import LossConfig
from minitron.distill.on_policy import OFF, OnPolicyConfig
from minitron.distill.settings import TrainingConfig, later_blends
from minitron.distill.training import TrainingResult, TrainingRun
from minitron.models import checkpoint_form, load_tokenizer
from minitron.models.lazy import load_lazily
from minitron.stages.context import StageContext, blocks_of
from minitron.stages.states import check_student_states, kept_channels
from minitron.stages.student_folder import describe_student, student_masks
from minitron.stages.teachers import check_vocabularies, flops_per_token, teaching


def train_folder(
    context: StageContext,
    out: Path,
    *,
    source: Path,
    training: TrainingConfig,
    loss: LossConfig,
    with_teacher: bool,
    what: str,
    on_policy: OnPolicyConfig = OFF,
) -> dict[str, Any]:
    """Train the model of ``source`` and write weights, config and tokenizer to ``out``; gives counts, and the validation of what was written."""
    sections, length = context.sections, context.sections.data.sequence_length
    training.check()
    if with_teacher:
        check_vocabularies(context, source)
        check_student_states(context, loss, source)
    masks, trust = student_masks(context, source, training), sections.teacher.trust_remote_code
    student = load_lazily(source, dtype=torch.float32, attention=sections.teacher.attention, trust_remote_code=trust)
    text = context.text(later := later_blends(training, sections.data))
    describe = partial(describe_student, source=source, teacher=sections.teacher, masks=masks)
    form = checkpoint_form(source, student.config)
    result = TrainingRun(
        student=student,
        **(teaching(context, source) if with_teacher else {"teacher": None}),
        stream=text.stream(),
        later_stream=lambda number: text.stream(blend=number, sequence_length=training.phase_table(length)[number].sequence_length),
        validation=context.held_out(training.num_validation_sequences, later),
        describe=describe,
        form=form if masks is None else masks.form(form),
        masks=masks,
        sequence_length=length,
        training=training,
        loss=loss,
        engine=sections.engine,
        blocks_of=blocks_of,
        open_tracker=context.open_tracker(out, what),
        what=what,
        placement=sections.teacher.place,
        folder=out,
        stop=context.stop,
        on_policy=on_policy,
        end_of_text=load_tokenizer(source, trust_remote_code=trust).eos_token_id if on_policy.fraction > 0 else None,
        seed=context.seed,
        separator=context.separator(),
        read_ahead=sections.data.num_workers > 0,
        kept_hidden=kept_channels(context, source) if with_teacher else None,
        origin=context.origin(),
        flops_per_token=flops_per_token(context, source, with_teacher=with_teacher),
    ).run()
    return _write_result(out, result, training.result, describe)


def _write_result(out: Path, result: TrainingResult, which: str, describe: Callable[[Path], None]) -> dict[str, Any]:
    """The ``last`` or the ``best`` weights in ``out``; beside the last, the best in ``best/`` where they are kept."""
    last = result.curve[-1] if result.curve else {}
    results = {"steps": result.steps, "tokens": result.tokens, "validation_loss": last.get("loss"), "precision": str(result.engine.compute_dtype)}
    if which == "best":
        assert result.best is not None
        result.best.copy_to(out)
        results["validation_loss"] = result.best.metrics["validation_loss"]
    else:
        write_shared_weights(out, result.student_weights())
        if dist.is_main():
            describe(out)
        if result.best is not None:
            result.best.copy_to(out / "best")
    dist.barrier()
    return results | ({"best_step": result.best.step} if result.best is not None else {})
