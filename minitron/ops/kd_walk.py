"""The walk of the losses on logits over chunks of rows: what its rows count, and the row functions of the losses on a chunk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from minitron.core.protocols import RowLoss
from minitron.core.sparse import SparseTargets, with_tensors
from minitron.ops.head import Head
from minitron.ops.kd_chunk import KernelChunks, choose, row_term
from minitron.ops.kd_rows import IGNORE_INDEX


@dataclass(frozen=True)
class WeightedRowLoss:
    """A row loss, its name in logs and its weight in the total; one of weight 0 is only measured."""

    name: str
    weight: float
    function: RowLoss


def default_chunk_size(device: torch.device) -> int:
    """Rows per chunk: enough on a GPU that the head's gradient is not bound by memory traffic; on two CPU cores 256 rows cost no more
    time than 512."""
    return 1024 if device.type == "cuda" else 256


@dataclass(frozen=True)
class Walk:
    """What a walk over chunks of rows knows beside the students: everything that receives no gradient."""

    labels: torch.Tensor
    losses: tuple[WeightedRowLoss, ...]
    denominator: torch.Tensor
    token_weights: torch.Tensor | None
    teacher_hidden: torch.Tensor | None
    teacher_head: Head | None
    teacher_sparse: SparseTargets | None
    temperature: float
    compute_dtype: torch.dtype
    chunk_size: int

    def check(self, student_hidden: torch.Tensor, student_head: Head) -> None:
        """Raise ValueError where shapes do not match or the teacher is missing."""
        tokens, vocab = self.labels.shape[0], student_head.num_tokens
        needing = [loss.name for loss in self.losses if loss.function.needs_teacher]
        if needing and self.teacher_sparse is None and (self.teacher_hidden is None or self.teacher_head is None):
            raise ValueError(f"loss '{needing[0]}' needs the teacher's hidden states and head")
        if self.teacher_sparse is not None and (self.teacher_sparse.ids.shape[0] != tokens or self.teacher_sparse.num_tokens != vocab):
            found = f"{self.teacher_sparse.ids.shape[0]} rows over {self.teacher_sparse.num_tokens} tokens"
            raise ValueError(f"sparse targets of {found} for {tokens} rows over {vocab}")
        if student_hidden.shape[0] != tokens or (self.teacher_hidden is not None and self.teacher_hidden.shape[0] != tokens):
            raise ValueError(f"{tokens} labels for {student_hidden.shape[0]} rows of hidden states")
        if self.teacher_head is not None and self.teacher_head.num_tokens != vocab:
            raise ValueError(f"the student's vocabulary has {vocab} rows, the teacher's {self.teacher_head.num_tokens}")
        hard = any(getattr(row_term(loss.function), "kind", "") == "cross_entropy" for loss in self.losses)
        if hard and tokens and self.labels.device.type == "cpu" and int(self.labels.max()) >= vocab:  # a GPU would have to wait for the answer
            raise ValueError(f"label {int(self.labels.max())} is no token of a vocabulary of {vocab}")
        if self.token_weights is not None and self.token_weights.shape not in ((tokens,), (len(self.losses), tokens)):
            raise ValueError(f"weights of shape {list(self.token_weights.shape)} for {len(self.losses)} losses on {tokens} tokens")

    def kernel_chunks(self) -> KernelChunks | None:
        """The chunks as a compiled kernel takes them, or None where the row functions of the losses must."""
        device = self.labels.device
        kind = choose([(loss.name, loss.function) for loss in self.losses], device, sparse=self.teacher_sparse is not None)
        if kind == "torch":
            return None
        return KernelChunks(
            tuple(term for loss in self.losses if (term := row_term(loss.function)) is not None),
            tuple(loss.weight for loss in self.losses),
            self.labels,
            torch.stack(self.scales(slice(None), self.labels != IGNORE_INDEX)).float(),
            self.temperature,
            kind,
        )

    def valid_rows(self) -> torch.Tensor | None:
        """The numbers of rows that are not masked, where some are and asking does not make a device wait."""
        if self.labels.device.type != "cpu":
            return None
        valid = self.labels != IGNORE_INDEX
        return None if bool(valid.all()) else valid.nonzero()[:, 0]

    def taking(self, rows: torch.Tensor) -> Walk:
        """The walk over some of its rows."""
        return replace(
            self,
            labels=self.labels[rows],
            token_weights=None if self.token_weights is None else self.token_weights[..., rows],
            teacher_hidden=None if self.teacher_hidden is None else self.teacher_hidden[rows],
            teacher_sparse=None if self.teacher_sparse is None else with_tensors(self.teacher_sparse, lambda tensor: tensor[rows]),
        )

    def torch_chunk(
        self, head: Head, hidden: torch.Tensor, teacher: torch.Tensor | SparseTargets | None, rows: slice, values: torch.Tensor, *, gradient: bool
    ) -> torch.Tensor | None:
        """What :meth:`KernelChunks.terms_of` does, by the row functions of the losses; ``teacher`` is what :meth:`said` has said of the chunk."""
        logits = head.logits(hidden)
        slope = self.terms(logits, teacher, rows, values, gradient=gradient)
        if slope is None:
            return None
        # filled, not multiplied by zero: a masked row may hold inf or nan, and 0 * nan is nan
        return head.transform.backward_(slope, logits).masked_fill_((self.labels[rows] == IGNORE_INDEX)[:, None], 0.0)

    def said(self, head: Head | None, rows: slice) -> torch.Tensor | SparseTargets | None:
        """What is known of the teacher in a chunk: its sparse targets, else its logits by its ``head``, else nothing."""
        if self.teacher_sparse is not None:
            return with_tensors(self.teacher_sparse, lambda tensor: tensor[rows])
        if head is None or self.teacher_hidden is None:
            return None
        return head.logits(self.teacher_hidden[rows].to(head.weight.dtype))

    def scales(self, rows: slice, valid: torch.Tensor) -> list[torch.Tensor]:
        """For every loss what each row counts in it, [rows]: 0 where the row is ignored, one and the same tensor unless weights differ."""
        if self.token_weights is None:
            return [valid.float() / self.denominator] * len(self.losses)
        weights = torch.where(valid, self.token_weights[..., rows].float(), 0.0) / self.denominator
        return list(weights) if weights.ndim == 2 else [weights] * len(self.losses)

    def terms(self, logits: torch.Tensor, teacher: Any, rows: slice, values: torch.Tensor, *, gradient: bool) -> torch.Tensor | None:
        """Add a chunk's terms to ``values`` [losses]; the gradient of the student's logits [rows, vocab], all but masked.

        ``teacher`` is what the losses are functions of beside them: logits, sparse targets or None.
        """
        labels = self.labels[rows]
        valid = labels != IGNORE_INDEX
        scales = self.scales(rows, valid)
        one_scale = self.token_weights is None or self.token_weights.ndim == 1
        total: torch.Tensor | None = None
        for index, loss in enumerate(self.losses):
            wanted = gradient and loss.weight != 0.0
            value, slope = loss.function(logits, teacher, labels, temperature=self.temperature, gradient=wanted)
            values[index] += (torch.where(valid, value, 0.0) * scales[index]).sum()
            if slope is None:
                continue
            if not one_scale:
                slope *= (scales[index] * loss.weight)[:, None]
            elif loss.weight != 1.0:
                slope *= loss.weight
            total = slope if total is None else total.add_(slope)
        return total.mul_(scales[0][:, None]) if total is not None and one_scale else total
