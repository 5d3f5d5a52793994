"""The mathematics of one batch: what a frozen teacher says, a trainable student, weighted loss terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
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
from minitron.ops.kd_loss import IGNORE_INDEX, StudentRows, SweptLosses, WeightedRowLoss, fused_linear_losses, sweep_heads

#: What validation measures: language-modelling loss, and with a teacher the divergence from it; beside them, how often both agree.
_VALIDATION: dict[str, float | str] = {"cross_entropy": 1.0, "forward_kl": 1.0}
#: For each teacher what a walk over the rows has found for each of these students.
Sweep = Callable[[Sequence[StudentRows]], list[list[SweptLosses]]]
#: A student that comes to its teachers' heads, and how to walk them with it → for each teacher what was found for it.
Meet = Callable[[StudentRows, Sweep], list[SweptLosses]]
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
        meet: Meet | None = None,
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
            meet: where students that read the same rows wait for each other, so that the teachers' heads are applied once for all of them.
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
        options: dict[str, Any] = {"denominator": denominator, "weights": weights, "temperature": 1.0 if validate else self.temperature, "meet": meet}
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
        meet: Meet | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Total and terms: the weighted mean over ``teachers``, each of a weight, hidden states and head."""
        head = self.head()
        # One tokenizer, padded differently: the padding rows of the larger vocabularies play no part.
        vocab = min([head.num_tokens, *(theirs.num_tokens for _, _, theirs in teachers if theirs is not None)])
        if sparse is not None:
            vocab = min(vocab, sparse.num_tokens)
        rows, targets = StudentRows(hidden.flatten(0, 1), head.first(vocab)), labels.flatten()
        walks: list[dict[str, Any]] = [
            {
                "denominator": denominator,
                "teacher_hidden": None if states is None else states.flatten(0, 1),
                "teacher_head": None if theirs is None else theirs.first(vocab),
                "teacher_sparse": sparse,
                "token_weights": None if weights is None else weights.flatten(-2),
                "temperature": temperature,
                "compute_dtype": self.compute_dtype,
            }
            for _, states, theirs in teachers
        ]
        if meet is None:
            parts = [fused_linear_losses(rows.hidden, rows.head, targets, losses, **walk) for walk in walks]
        else:
            found = meet(rows, lambda students: [sweep_heads(students, targets, losses, **walk) for walk in walks])
            parts = [swept.attached(rows) for swept in found]
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
        return losses_together([self], batch, denominator, validate=validate)[0]

    def _told(self, batch: dict[str, torch.Tensor], held: ExitStack) -> dict[str, Any]:
        """What the teachers say of a micro-batch; their heads are whole as long as they are ``held``."""
        said = self.teacher.says(batch["input_ids"]) if self.teacher is not None else Said()
        others = [(weight, signal, signal.hidden(batch["input_ids"])) for signal, weight in self._others]
        return {
            "teacher_hidden": said.hidden,
            "teacher_head": held.enter_context(self.teacher.head()) if self.teacher is not None else None,
            "teacher_states": said.states,
            "others": [(weight, theirs, held.enter_context(signal.head())) for weight, signal, theirs in others],
            "teacher_sparse": said.sparse,
        }

    def _alpha(self) -> torch.Tensor | None:
        """The dynamic weight, 1 in the pass that finds the first one."""
        if self.alpha is None:
            return None
        return self.alpha.value if self.alpha.value is not None else torch.ones((), device=dist.device())

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


def losses_together(
    pairs: Sequence[TeacherStudent], batch: dict[str, torch.Tensor], denominator: torch.Tensor, *, validate: bool = False
) -> list[dict[str, torch.Tensor]]:
    """Loss terms of several students of the same teachers for one micro-batch of CPU tensors; each is then taken backward by itself.

    Every student's forward is called inside the one before it: an engine has the weights of a student whole inside its own forward alone, and so
    all of them are when the last student comes to the teacher's head. The activations of all are in memory until they are taken backward.
    """
    with ExitStack() as held:
        told = pairs[0]._told(batch, held)
        inputs = [batch[name].to(dist.device(), non_blocking=True) for name in ("input_ids", "labels")]
        weights = batch["weights"].to(dist.device(), non_blocking=True) if "weights" in batch else None

        def forward(pair: TeacherStudent, **options: Any) -> dict[str, torch.Tensor]:
            return pair._root(*inputs, denominator, validate=validate, weights=weights, alpha=pair._alpha(), **told, **options)

        if len(pairs) == 1:
            return [forward(pairs[0])]
        meeting = _Meeting(pairs, forward)
        meeting.call(0)
        return meeting.results[::-1]


@dataclass
class _Meeting:
    """Students on their way to their teachers' heads. An object and no function inside another: one that calls itself would live, and with it the
    gradients that it has found, until garbage is collected."""

    pairs: Sequence[TeacherStudent]
    forward: Callable[..., dict[str, torch.Tensor]]
    waiting: list[StudentRows] = field(default_factory=list)
    found: list[list[SweptLosses]] = field(default_factory=list)
    results: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def call(self, number: int) -> None:
        """The forward of a student, and of all that follow inside it."""
        self.results.append(self.forward(self.pairs[number], meet=partial(self._meet, number)))

    def _meet(self, number: int, rows: StudentRows, sweep: Sweep) -> list[SweptLosses]:
        self.waiting.append(rows)
        if number + 1 < len(self.pairs):
            self.call(number + 1)
        else:
            self.found = sweep(self.waiting)
        return [teacher[number] for teacher in self.found]
