"""Taylor importance of LLM-Pruner (Ma et al., arXiv 2305.11627, section 3.2): what the loss would do without a unit, from its gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from minitron.core.axes import ParameterSpec
from minitron.distill.losses import LossConfig, build_losses
from minitron.importance.depth.config import Subject
from minitron.importance.depth.losses import labels_of
from minitron.importance.depth.walk import Tensors, Walk
from minitron.importance.width.config import ImportanceConfig
from minitron.importance.width.groups import CoupledGroups
from minitron.log import get_logger
from minitron.models.head import head_of
from minitron.models.packing import hidden_states
from minitron.ops.kd_loss import IGNORE_INDEX, fused_linear_losses

logger = get_logger(__name__)

Batch = tuple[torch.Tensor, torch.Tensor]


class TaylorPass:
    """Per unit: element scores summed within each matrix of its coupled group, the matrices put together by sum, max or product.

    Of a weight w: |w·g| (``first``), w²·F (``second``) or |w·g - w²·F/2| (``mixed``), g the gradient of the mean loss over all tokens that are
    predicted and count, and F the mean over samples of the squared gradient of each one's own mean loss, the diagonal of the Fisher matrix.

    Memory beyond the model: 4 bytes for every weight (8 for ``mixed``) in which gradients are summed in float32, the gradient of one matrix
    in the teacher's dtype, and all activations of one batch (for F of one sample). Checkpoints of the pass are as large as those sums.
    No ``[tokens, vocab]`` tensor is made.
    """

    needs_gradients = True

    def __init__(self, config: ImportanceConfig | None = None, *, seed: int = 0) -> None:
        config = config or ImportanceConfig(name="taylor")
        self._order, self._group = config.order, config.group
        self.aggregation = f"order={config.order}, sum within each matrix, group={config.group}"
        self.details: dict[str, Any] = {}

    def run(self, subject: Subject, walk: Walk) -> Tensors:
        """Score tensors by name, float64 on the CPU."""
        gradients = _Gradients(subject, self._order)
        self.details = {"gradient_bytes": gradients.num_bytes}
        logger.info("importance: Taylor scores keep %.1f MB of summed gradients beside the activations of a batch", gradients.num_bytes / 1e6)
        with gradients:
            total = walk.total(
                "importance", gradients.batches, gradients.step, {"gradients": gradients.sums}, finish=lambda sums: self._scores(subject, gradients)
            )
        return total

    @torch.no_grad()
    def _scores(self, subject: Subject, gradients: _Gradients) -> Tensors:
        groups = CoupledGroups(subject.family, self._group)
        for spec, parameter in gradients.owners:
            groups.take(spec, lambda: gradients.elements(parameter))  # noqa: B023 - called at once
        return groups.scores()


class _Gradients:
    """Sums of gradients over samples, and of their squares, of every parameter that can be cut; a context that puts on the hooks."""

    def __init__(self, subject: Subject, order: str) -> None:
        self._model, self._order, self._separator = subject.model, order, subject.separator
        named = dict(subject.model.named_parameters())
        self.owners: list[tuple[ParameterSpec, nn.Parameter]] = [
            (spec, named[spec.name]) for spec in subject.family.layout.parameters if not spec.buffer and spec.axes()
        ]
        sizes = [parameter.numel() for _, parameter in self.owners]
        kinds = [kind for kind, needed in (("g", order != "second"), ("squares", order != "first")) if needed]
        self._device = self.owners[0][1].device
        self.sums = torch.zeros(len(kinds), sum(sizes), dtype=torch.float32, device=self._device)
        self.num_bytes = self.sums.nbytes
        pieces = {kind: row.split(sizes) for kind, row in zip(kinds, self.sums, strict=True)}
        self._pieces = {id(parameter): {kind: pieces[kind][i] for kind in kinds} for i, (_, parameter) in enumerate(self.owners)}
        counted = subject.counted if subject.counted is not None else torch.ones_like(subject.samples, dtype=torch.bool)
        self.batches: list[Batch] = list(zip(subject.samples.split(subject.batch_size), counted.split(subject.batch_size), strict=True))
        predicted = (labels_of(subject.samples, counted, separator=subject.separator) != IGNORE_INDEX).sum(dim=1)
        self._num_tokens, self._num_samples = max(1, int(predicted.sum())), max(1, int((predicted > 0).sum()))
        self._scale = 1.0
        self._undo: list[Callable[[], Any]] = []

    def __enter__(self) -> None:
        for parameter in self._model.parameters():
            self._undo.append(partial(parameter.requires_grad_, parameter.requires_grad))
            parameter.requires_grad_(id(parameter) in self._pieces)
        for _, parameter in self.owners:
            self._undo.append(parameter.register_post_accumulate_grad_hook(self._add).remove)
        self._head, self._losses = head_of(self._model), build_losses(LossConfig(terms={"cross_entropy": 1.0}))

    def __exit__(self, *error: Any) -> None:
        for undo in reversed(self._undo):
            undo()

    def step(self, batch: Batch) -> None:
        """Forward and backward of one batch, sample by sample where squares are needed."""
        ids, counted = batch
        if self._order == "first":
            self._backward(ids, self._labels(ids, counted), 1.0)
            return
        for row, label in zip(ids, self._labels(ids, counted), strict=True):
            num_predicted = int((label != IGNORE_INDEX).sum())  # still on the CPU
            if num_predicted:
                self._backward(row.unsqueeze(0), label.unsqueeze(0), float(num_predicted))

    def _labels(self, ids: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        return labels_of(ids, counted, separator=self._separator)

    def _backward(self, ids: torch.Tensor, labels: torch.Tensor, denominator: float) -> None:
        """Gradients of the summed loss / ``denominator``, which the hook turns back into those of the sum."""
        ids, labels = ids.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)
        self._scale = denominator
        with torch.enable_grad():
            hidden = hidden_states(self._model, ids, separator=self._separator)[:, :-1].flatten(0, 1)
            total, _ = fused_linear_losses(
                hidden,
                self._head,
                labels.flatten(),
                self._losses,
                denominator=torch.full((), denominator, device=self._device),
                compute_dtype=hidden.dtype,
            )
            total.backward()  # type: ignore[no-untyped-call]

    def _add(self, parameter: torch.Tensor) -> None:
        """Takes a finished gradient in and lets go of it."""
        assert parameter.grad is not None
        gradient = parameter.grad.flatten().float()
        pieces = self._pieces[id(parameter)]
        if "g" in pieces:
            pieces["g"].add_(gradient, alpha=self._scale)
        if "squares" in pieces:
            pieces["squares"].addcmul_(gradient, gradient)
        parameter.grad = None

    def elements(self, parameter: nn.Parameter) -> torch.Tensor:
        """The score of every element, in float32."""
        pieces, weight = self._pieces[id(parameter)], parameter.detach().float()
        first = weight * pieces["g"].view_as(weight) / self._num_tokens if "g" in pieces else None
        if "squares" not in pieces:
            assert first is not None
            return first.abs()
        second = weight.square() * pieces["squares"].view_as(weight) / self._num_samples
        return second if first is None else (first - second / 2).abs()
