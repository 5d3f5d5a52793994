"""The mathematics of one batch: what a frozen teacher says, a trainable student, weighted loss terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from minitron import dist
from minitron.core.sparse import SparseTargets
from minitron.distill.alpha import DynamicWeight
from minitron.distill.losses import LossConfig, build_losses, sparse_losses, told_by
from minitron.distill.signal import Said, Signal
from minitron.distill.states import StateLosses
from minitron.distill.teacher import TeacherSignal
from minitron.models.head import head_of, head_parameters
from minitron.models.packing import hidden_states
from minitron.models.states import captured, find_spots
from minitron.ops.agreement import AGREEMENT
from minitron.ops.documents import document_starts
from minitron.ops.head import Head
from minitron.ops.kd_loss import IGNORE_INDEX, WeightedRowLoss, fused_linear_losses

#: What validation measures: language-modelling loss, and with a teacher the divergence from it; beside them, how often both agree.
_VALIDATION: dict[str, float | str] = {"cross_entropy": 1.0, "forward_kl": 1.0}
#: What the pair adds to a checkpoint.
_PREFIX = "losses/"


class StudentLosses(nn.Module):
    """The root that an engine wraps: the student and its losses, so that sharded weights are whole where the loss needs them."""

    def __init__(
        self,
        student: nn.Module,
        config: LossConfig,
        *,
        compute_dtype: torch.dtype,
        states: StateLosses | None = None,
        separator: int | None = None,
        sparse: str | None = None,
    ) -> None:
        """``states`` are the losses on intermediate states that ``config`` asks for, whose parameters are trained too; documents of a row that
        end with a ``separator`` do not see each other; ``sparse`` is the kind of targets that stand for the teacher's logits, if any do."""
        super().__init__()
        self.student, self.separator = student, separator
        self.states = states
        self._spots = find_spots(student, states.student_taps) if states is not None else {}
        self.temperature = config.temperature
        self.losses = build_losses(config) if sparse is None else sparse_losses(build_losses(config), sparse)
        self.validation_losses = _validation_losses(sparse)
        self._head_transform = head_of(student).transform
        self.compute_dtype = compute_dtype

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss in use needs the teacher."""
        return self.states is not None or any(loss.function.needs_teacher for loss in self.losses)

    def head(self) -> Head:
        """The student's head as it is now; call it where an engine has made the weights whole."""
        return Head(*head_parameters(self.student), self._head_transform)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        denominator: torch.Tensor,
        teacher_hidden: torch.Tensor | None = None,
        teacher_head: Head | None = None,
        weights: torch.Tensor | None = None,
        validate: bool = False,
        teacher_states: Sequence[torch.Tensor] = (),
        alpha: torch.Tensor | None = None,
        states_only: bool = False,
        others: Sequence[tuple[float, torch.Tensor, Head]] = (),
        teacher_sparse: SparseTargets | None = None,
    ) -> dict[str, torch.Tensor]:
        """Loss terms of one micro-batch, each summed over its valid tokens and divided by ``denominator``.

        Args:
            input_ids, labels: [batch, sequence]; labels are already shifted.
            denominator: 0-d, valid tokens of the whole optimiser step.
            teacher_hidden: [batch, sequence, teacher hidden].
            teacher_head: the teacher's, its tensors whole.
            teacher_sparse: of batch · sequence rows, in place of hidden states and head.
            weights: [batch, sequence] or [losses, batch, sequence], for the loss of every token; losses on states take the first form.
            validate: measure what validation measures, and no intermediate states.
            teacher_states: those that ``states.teacher_taps`` names, each [batch, sequence, width].
            alpha: 0-d, the dynamic weight of losses on states.
            others: of every further teacher its weight (the first weighs 1), hidden states and head. Every loss on logits is then the weighted
                mean of the losses to each teacher, Σ wᵢ·L(student, teacherᵢ) / Σ wᵢ. For forward KL that has the gradient of the divergence from
                the mixture Σ wᵢ·pᵢ / Σ wᵢ of their probabilities. Losses on states follow the first alone.
            states_only: compute no loss and return the student's states by their number in ``states.student_taps``.

        Returns:
            ``loss`` (the weighted total, differentiable) and every term by name (detached).
        """
        losses = self.losses
        if validate:
            told = teacher_hidden is not None or teacher_sparse is not None
            losses = [loss for loss in self.validation_losses if told or not loss.function.needs_teacher]
        with captured(self.student, {} if validate else self._spots) as states:
            hidden = hidden_states(self.student, input_ids, separator=self.separator)
        if states_only:
            return {str(number): states[tap] for number, tap in enumerate(self._spots)}
        teachers = [(1.0, teacher_hidden, teacher_head), *others]
        options: dict[str, Any] = {"denominator": denominator, "weights": weights, "temperature": 1.0 if validate else self.temperature}
        total, values = self._losses_on_logits(hidden, labels, losses, teachers, sparse=teacher_sparse, **options)
        terms = {loss.name: values[i] for i, loss in enumerate(losses)}
        if self.states is not None and not validate:
            valid = labels != IGNORE_INDEX
            scale = (weights if weights is not None and weights.ndim == 2 else valid.float()) / denominator
            documents = document_starts(input_ids, self.separator) if self.separator is not None else None
            on_states, state_terms = self.states(teacher_states, [states[tap] for tap in self._spots], valid, scale, alpha, documents)
            total, terms = total + on_states, terms | state_terms
        return {"loss": total, **terms}

    def _losses_on_logits(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        losses: Sequence[WeightedRowLoss],
        teachers: Sequence[tuple[float, torch.Tensor | None, Head | None]],
        *,
        denominator: torch.Tensor,
        weights: torch.Tensor | None,
        temperature: float,
        sparse: SparseTargets | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Total and terms: the weighted mean over ``teachers``, each of a weight, hidden states and head."""
        head = self.head()
        # One tokenizer, padded differently: the padding rows of the larger vocabularies play no part.
        vocab = min([head.num_tokens, *(theirs.num_tokens for _, _, theirs in teachers if theirs is not None)])
        if sparse is not None:
            vocab = min(vocab, sparse.num_tokens)
        parts = [
            fused_linear_losses(
                hidden.flatten(0, 1),
                head.first(vocab),
                labels.flatten(),
                losses,
                denominator=denominator,
                teacher_hidden=None if states is None else states.flatten(0, 1),
                teacher_head=None if theirs is None else theirs.first(vocab),
                teacher_sparse=sparse,
                token_weights=None if weights is None else weights.flatten(-2),
                temperature=temperature,
                compute_dtype=self.compute_dtype,
            )
            for _, states, theirs in teachers
        ]
        return weighted_mean(parts, [weight for weight, _, _ in teachers])


def _validation_losses(sparse: str | None) -> list[WeightedRowLoss]:
    """What validation measures with the teacher's logits, or as much of it as sparse targets tell."""
    losses = [*build_losses(LossConfig(terms=_VALIDATION)), AGREEMENT]
    return losses if sparse is None else sparse_losses([loss for loss in losses if told_by(loss.function, sparse)], sparse)


def weighted_mean(parts: Sequence[tuple[torch.Tensor, torch.Tensor]], weights: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of (total, values) pairs; of a single pair that pair itself."""
    total, values = parts[0]
    if len(parts) > 1:
        shares = [weight / sum(weights) for weight in weights]
        total = torch.stack([share * part[0] for share, part in zip(shares, parts, strict=True)]).sum()
        values = torch.stack([share * part[1] for share, part in zip(shares, parts, strict=True)]).sum(0)
    return total, values


class TeacherStudent:
    """Teacher signal + wrapped student root. ``losses`` is all that the loop calls.

    ``root`` is what the engine has made of ``module``; ``alpha`` is the dynamic weight where a loss on states has it;
    ``others`` are further teachers with their weights, the first weighing 1.
    """

    def __init__(
        self,
        root: Callable[..., dict[str, torch.Tensor]],
        teacher: Signal | None,
        *,
        module: StudentLosses | None = None,
        alpha: DynamicWeight | None = None,
        others: Sequence[tuple[TeacherSignal, float]] = (),
    ) -> None:
        self._root, self.teacher, self._others = root, teacher, others
        self.module, self.alpha = module, alpha

    def losses(self, batch: dict[str, torch.Tensor], denominator: torch.Tensor, *, validate: bool = False) -> dict[str, torch.Tensor]:
        """Loss terms of one micro-batch of CPU tensors."""
        device = dist.device()
        said = self.teacher.says(batch["input_ids"]) if self.teacher is not None else Said()
        alpha = None
        if self.alpha is not None:  # unknown in the pass that finds the first one
            alpha = self.alpha.value if self.alpha.value is not None else torch.ones((), device=device)
        others = [(weight, signal, signal.hidden(batch["input_ids"])) for signal, weight in self._others]
        with ExitStack() as held:
            head = held.enter_context(self.teacher.head()) if self.teacher is not None else None
            return self._root(
                batch["input_ids"].to(device, non_blocking=True),
                batch["labels"].to(device, non_blocking=True),
                denominator,
                teacher_hidden=said.hidden,
                teacher_head=head,
                weights=batch["weights"].to(device, non_blocking=True) if "weights" in batch else None,
                validate=validate,
                teacher_states=said.states,
                alpha=alpha,
                others=[(weight, theirs, held.enter_context(signal.head())) for weight, signal, theirs in others],
                teacher_sparse=said.sparse,
            )

    @torch.no_grad()
    def states(self, batch: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Intermediate states of teacher and student for one micro-batch of CPU tensors, each [batch, sequence, width]."""
        assert self.teacher is not None
        theirs = list(self.teacher.says(batch["input_ids"]).states)
        ids, labels = (batch[name].to(dist.device()) for name in ("input_ids", "labels"))
        return theirs, list(self._root(ids, labels, torch.ones((), device=ids.device), states_only=True).values())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What the losses keep besides parameters, for checkpoints; equal on all ranks."""
        found = self.alpha.state_dict() if self.alpha is not None else {}
        if self.module is not None and self.module.states is not None:
            found |= self.module.states.extra_state()
        return {f"{_PREFIX}{name}": value for name, value in found.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse; the keys of others are passed over."""
        own = {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}
        if self.alpha is not None:
            self.alpha.load_state_dict(own)
        if self.module is not None and self.module.states is not None:
            self.module.states.load_extra_state(own)
