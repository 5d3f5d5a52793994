"""First-order Taylor importance of layers (Shortened LLaMA, arXiv 2402.02834, section 2.2, after LLM-Pruner)."""

from __future__ import annotations

from typing import Any

import torch

from minitron.distill.losses import LossConfig, build_losses
from minitron.importance.depth.config import Batch, DepthConfig, Subject
from minitron.importance.depth.losses import TokenLosses, labels_of
from minitron.importance.depth.walk import Tensors, Walk
from minitron.log import get_logger
from minitron.models.packing import hidden_states
from minitron.ops.kd_loss import IGNORE_INDEX, fused_linear_losses

logger = get_logger(__name__)


class LayerTaylorPass:
    """Per layer: Σ |w · g| over all its weights, g the gradient of the mean loss over all samples (summed first, as the authors' code does).

    Memory beyond the model: 4 bytes for every weight of every layer (gradients are summed in float32 in one buffer), the gradients of the
    layer at work, and all activations of one batch; checkpoints of the pass hold the buffer. No ``[tokens, vocab]`` tensor is made.
    """

    needs_gradients = True
    needs_gradients = True
    aggregation = "sum over weights of |weight * gradient|"

    def __init__(self, config: DepthConfig | None = None, *, seed: int = 0) -> None:
        self.details: dict[str, Any] = {}

    def run(self, subject: Subject, walk: Walk) -> Tensors:
        """``layer`` [layers]."""
        model, family = subject.model, subject.family
        named = dict(model.named_parameters())
        owners = [(spec.layer, named[spec.name]) for spec in family.layout.parameters if spec.layer is not None and not spec.buffer]
        sizes = [parameter.numel() for _, parameter in owners]
        device = owners[0][1].device
        self.details = {"gradient_bytes": 4 * sum(sizes)}
        logger.info("depth: Taylor scores keep %.1f MB of summed gradients beside the activations of a batch", 4 * sum(sizes) / 1e6)
        buffer = torch.zeros(sum(sizes) + 1, dtype=torch.float32, device=device)  # the last one counts tokens; exact up to 2**24 of them
        wanted = {id(parameter) for _, parameter in owners}
        before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        handles = []
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        for (_, parameter), piece in zip(owners, buffer[:-1].split(sizes), strict=True):
            handles.append(parameter.register_post_accumulate_grad_hook(_adder(piece)))
        try:
            total = walk.total(
                "depth", subject.batches(), self._step(subject, buffer), {"gradient": buffer}, finish=lambda sums: _scores(owners, sums)
            )
        finally:
            for handle in handles:
                handle.remove()
            for parameter, required in before:
                parameter.requires_grad_(required)
                parameter.grad = None
        return {"layer": total["layer"]}

    def _step(self, subject: Subject, buffer: torch.Tensor) -> Any:
        model, separator, head = subject.model, subject.separator, TokenLosses(subject.model).head
        losses = build_losses(LossConfig(terms={"cross_entropy": 1.0}))
        one = torch.ones((), device=buffer.device)

        def step(batch: Batch) -> None:
            batch = batch.to(buffer.device)
            labels = labels_of(batch.ids, batch.counted, batch.attended, separator=separator)
            buffer[-1] += (labels != IGNORE_INDEX).sum()
            with torch.enable_grad():
                hidden = hidden_states(model, batch.ids, separator=separator, attended=batch.attended)[:, :-1].flatten(0, 1)
                total, _ = fused_linear_losses(hidden, head, labels.flatten(), losses, denominator=one, compute_dtype=hidden.dtype)
                total.backward()  # type: ignore[no-untyped-call]

        return step


def _adder(piece: torch.Tensor) -> Any:
    """Adds a finished gradient to its place in the buffer and lets go of it."""

    def add(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        piece.add_(parameter.grad.flatten())
        parameter.grad = None

    return add


def _scores(owners: list[tuple[int, torch.nn.Parameter]], sums: Tensors) -> Tensors:
    """Sums over the weights of each layer, in float64."""
    buffer = sums["gradient"]
    result = torch.zeros(1 + max(layer for layer, _ in owners), dtype=torch.float64, device=buffer.device)
    pieces = buffer[:-1].split([parameter.numel() for _, parameter in owners])
    with torch.no_grad():
        for (layer, parameter), piece in zip(owners, pieces, strict=True):
            result[layer] += torch.linalg.vector_norm(parameter.detach().flatten().float() * piece, ord=1, dtype=torch.float64)
    return {"layer": result / buffer[-1].double()}
