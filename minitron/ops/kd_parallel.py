"""The losses on logits where every rank of a group holds some rows of both heads: one small collective a chunk instead of whole heads.

The ranks see the same hidden states. Each applies its own rows of the vocabulary and knows the softmax within them; what the whole softmax needs are
a few numbers a row from every rank: with w the share of rank r in the teacher's mass and u in the student's, the chain rule of the divergence gives

    KL(P ‖ Q) = Σ_r w_r (KL(P_r ‖ Q_r) + log w_r − log u_r)

where P_r, Q_r are the softmaxes within the rank's rows. All summands are small where the models agree, so that nothing cancels there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from minitron.ops.head import Head
from minitron.ops.kd_chunk import constant, row_term
from minitron.ops.kd_gradients import Gradients
from minitron.ops.kd_loss import StudentRows, SweptLosses, WeightedRowLoss, default_chunk_size
from minitron.ops.kd_rows import IGNORE_INDEX
from minitron.ops.kd_walk import Walk
from minitron.ops.softmax import log_probabilities

_KINDS = ("cross_entropy", "forward_kl", "reverse_kl")


def vocabulary_parallel_losses(
    student_hidden: torch.Tensor,
    student_head: Head,
    labels: torch.Tensor,
    losses: Sequence[WeightedRowLoss],
    *,
    first_token: int,
    denominator: torch.Tensor,
    teacher_hidden: torch.Tensor | None = None,
    teacher_head: Head | None = None,
    token_weights: torch.Tensor | None = None,
    temperature: float = 1.0,
    compute_dtype: torch.dtype = torch.float32,
    chunk_size: int | None = None,
    group: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`fused_linear_losses` gives for whole heads, from the rows ``first_token …`` of both that this rank holds.

    Heads may be cut anywhere, but alike for student and teacher. Hidden states, labels (numbers in the whole vocabulary) and weights are the same on
    all ranks of ``group``; so are the results, and the gradient of the hidden states, summed over the ranks. That of the head is this rank's.
    Without a process group this rank has all rows.

    Raises:
        ValueError: a loss other than cross entropy, forward or reverse KL, or shapes that do not match.
    """
    unknown = [loss.name for loss in losses if getattr(row_term(loss.function), "kind", "") not in _KINDS]
    if unknown:
        raise ValueError(f"loss '{unknown[0]}' needs whole rows of logits; over a shared vocabulary there are {', '.join(_KINDS)}")
    student, rows = StudentRows(student_hidden, student_head), chunk_size or default_chunk_size(labels.device)
    teacher = None if teacher_head is None else teacher_head.detached()
    walk = Walk(labels, tuple(losses), denominator, token_weights, teacher_hidden, teacher, None, temperature, compute_dtype, rows)
    _check(walk, student)
    needed = [
        tensor is not None and torch.is_grad_enabled() and tensor.requires_grad for tensor in (student_hidden, student_head.weight, student_head.bias)
    ]
    with torch.no_grad(), torch.autocast(labels.device.type, enabled=False):
        swept = _Sweep(walk, first_token, group, needed).run(student)
    return swept.attached(student)


def _check(walk: Walk, student: StudentRows) -> None:
    if any(loss.function.needs_teacher for loss in walk.losses) and (walk.teacher_hidden is None or walk.teacher_head is None):
        raise ValueError("a divergence needs the teacher's hidden states and its rows of the head")
    if student.head.num_tokens == 0:
        raise ValueError("this rank holds no row of the head: cut it so that each has one at least")
    if walk.teacher_head is not None and walk.teacher_head.num_tokens != student.head.num_tokens:
        raise ValueError(f"this rank holds {student.head.num_tokens} rows of the student's head and {walk.teacher_head.num_tokens} of the teacher's")
    if len(walk.labels) != len(student.hidden) or (walk.teacher_hidden is not None and len(walk.labels) != len(walk.teacher_hidden)):
        raise ValueError(f"{len(walk.labels)} labels for {len(student.hidden)} rows of hidden states")


@dataclass(frozen=True)
class _Sweep:
    walk: Walk
    first_token: int
    group: Any
    needed: Sequence[bool]

    def run(self, student: StudentRows) -> SweptLosses:
        """All chunks of one student."""
        walk, hidden = self.walk, student.hidden.detach()
        head, weight = student.head.detached().ready(walk.compute_dtype), student.head.weight.detach()
        teacher = None if walk.teacher_head is None else walk.teacher_head.ready(walk.compute_dtype)
        values = torch.zeros(len(walk.losses), dtype=torch.float32, device=hidden.device)
        gradients = Gradients.of(hidden, weight, student.head.bias, self.needed)
        for start in range(0, len(walk.labels), walk.chunk_size):
            rows = slice(start, start + walk.chunk_size)
            states = hidden[rows].to(head.weight.dtype)
            slope = self._chunk(head.logits(states), walk.said(teacher, rows), rows, values, head)
            if any(self.needed):
                gradients.add(rows, slope, states.masked_fill((walk.labels[rows] == IGNORE_INDEX)[:, None], 0.0), head.weight)
        gradients.done(None, hidden.shape)
        if gradients.hidden is not None and distributed.is_initialized():
            distributed.all_reduce(gradients.hidden, group=self.group)
        weights = constant(tuple(loss.weight for loss in walk.losses), values.device)
        bias = None if student.head.bias is None or gradients.bias is None else gradients.bias.to(student.head.bias.dtype)
        return SweptLosses((values * weights).sum(), values, (gradients.hidden, gradients.weight_as(weight.dtype), bias))

    def _chunk(self, logits: torch.Tensor, theirs: Any, rows: slice, values: torch.Tensor, head: Head) -> torch.Tensor:
        """Add a chunk's terms to ``values``; the gradient of this rank's products [rows, own vocab]."""
        walk, labels = self.walk, self.walk.labels[rows]
        valid, temperature = labels != IGNORE_INDEX, self.walk.temperature
        hard = [getattr(row_term(loss.function), "kind", "") == "cross_entropy" for loss in walk.losses]
        local = labels - self.first_token
        mine = valid & (local >= 0) & (local < logits.shape[1])
        local = torch.where(mine, local, 0)
        found: dict[str, torch.Tensor] = {}
        if any(hard):
            found["mass"] = torch.logsumexp(logits, dim=-1)
            found["label"] = torch.where(mine, logits.gather(1, local[:, None])[:, 0], 0.0)
        if not all(hard):
            log_q, log_p = log_probabilities(logits, temperature), log_probabilities(theirs, temperature)  # within this rank's rows
            found["student"], found["teacher"] = (torch.logsumexp(each / temperature, dim=-1) for each in (logits, theirs))
            difference = log_p - log_q
            found["forward"], found["reverse"] = (log_p.exp() * difference).sum(dim=-1), -(log_q.exp() * difference).sum(dim=-1)
        everyone = self._gathered(torch.stack(list(found.values())))
        stats = dict(zip(found, everyone.unbind(1), strict=True))  # each [ranks, rows]
        total = torch.zeros_like(logits)
        for index, (loss, scale) in enumerate(zip(walk.losses, walk.scales(rows, valid), strict=True)):
            kind = getattr(row_term(loss.function), "kind", "")
            if kind == "cross_entropy":
                mass = torch.logsumexp(stats["mass"], dim=0)
                value, slope = mass - stats["label"].sum(dim=0), (logits - mass[:, None]).exp_()
                slope.scatter_add_(1, local[:, None], -mine.to(slope.dtype)[:, None])
            else:
                log_w, log_u = (stats[name] - torch.logsumexp(stats[name], dim=0) for name in ("teacher", "student"))
                whole_p, whole_q = (log + own[self._rank()][:, None] for log, own in ((log_p, log_w), (log_q, log_u)))
                if kind == "forward_kl":
                    kl = (log_w.exp() * (stats["forward"] + log_w - log_u)).sum(dim=0)
                    slope = whole_q.exp_().sub_(whole_p.exp_())
                else:
                    kl = (log_u.exp() * (stats["reverse"] + log_u - log_w)).sum(dim=0)
                    slope = (whole_q - whole_p).sub_(kl[:, None]).mul_(whole_q.exp())
                value, slope = (temperature**2 * kl).clamp_min(0.0), slope.mul_(temperature)
            values[index] += (torch.where(valid, value, 0.0) * scale).sum()
            total.add_(slope.mul_((scale * loss.weight)[:, None]))
        return head.transform.backward_(total, logits).masked_fill_(~valid[:, None], 0.0)

    def _gathered(self, mine: torch.Tensor) -> torch.Tensor:
        """[numbers, rows] of this rank → [ranks, numbers, rows]: the one collective of a chunk."""
        if not distributed.is_initialized():
            return mine.unsqueeze(0)
        size = distributed.get_world_size(self.group)
        everyone = mine.new_empty(size, *mine.shape)
        distributed.all_gather_into_tensor(everyone.view(-1, mine.shape[-1]), mine, group=self.group)
        return everyone

    def _rank(self) -> int:
        return int(distributed.get_rank(self.group)) if distributed.is_initialized() else 0
