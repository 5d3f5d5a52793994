"""Self-attention relations of queries, keys and values (MiniLMv2, arXiv 2012.15828)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minitron.distill.losses.state import StatesConfig, StateSetup, only_valid, weighted_sum
from minitron.errors import ConfigError
from minitron.models.states import ATTENTION, Tap

#: Entries of one tile of relations: 64 MiB in float32. Tiles are recomputed in the backward pass.
_TILE = 1 << 24


class AttentionRelation(nn.Module):
    """Σ over query, key, value of 1/A Σ_a KL(R_teacher[a, t] ‖ R_student[a, t]), mean over tokens t, summed over mapped layers.

    The vectors X of all heads are joined and split again into A relation heads of width d, so that the two models may have other
    numbers of heads; R = softmax(X Xᵀ / √d) over the tokens of its document at or before t. Masked tokens have no place in any
    relation.
    """

    #: Tokens are compared with each other, so the loss is told which of them share a document.
    relates_tokens = True

    def __init__(self, setup: StateSetup) -> None:
        super().__init__()
        self.num_heads = setup.config.relation_heads

    @staticmethod
    def taps(config: StatesConfig, layers: Sequence[int]) -> list[Tap]:
        """Queries, keys and values of the mapped layers."""
        return [Tap(kind, layer) for layer in layers for kind in ATTENTION]

    @staticmethod
    def check(setup: StateSetup) -> None:
        """Refuse a number of relation heads that does not divide every width."""
        heads = setup.config.relation_heads
        for role, shape in (("teacher", setup.teacher), ("student", setup.student)):
            for what, number in (("query heads", shape.num_heads), ("key-value heads", shape.num_kv_heads)):
                if number * shape.head_dim % heads:
                    raise ConfigError(
                        f"loss.states.relation_heads={heads} does not divide the {number} {what} of {shape.head_dim} channels of the {role}"
                    )

    def forward(
        self,
        teacher: Sequence[torch.Tensor],
        student: Sequence[torch.Tensor],
        valid: torch.Tensor,
        scale: torch.Tensor,
        documents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See StateLoss; states [batch, sequence, heads x head_dim]. ``documents`` [batch, sequence] are equal within one; None: rows are."""
        total = torch.zeros((), device=valid.device)
        length = valid.shape[1]
        rows = max(1, _TILE // (valid.numel() * self.num_heads))
        for theirs, ours in zip(teacher, student, strict=True):
            x_teacher, x_student = (self._split(only_valid(states, valid).float()) for states in (theirs, ours))
            for start in range(0, length, rows):
                arguments = (x_teacher, x_student, valid, documents, start, min(start + rows, length))
                tiled = rows < length and torch.is_grad_enabled()
                values = checkpoint(_divergence, *arguments, use_reentrant=False) if tiled else _divergence(*arguments)
                total = total + weighted_sum(values, valid[:, start : start + rows], scale[:, start : start + rows])
        return total

    def _split(self, states: torch.Tensor) -> torch.Tensor:
        """[batch, sequence, width] → [batch, relation heads, sequence, d]."""
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _divergence(
    teacher: torch.Tensor, student: torch.Tensor, valid: torch.Tensor, documents: torch.Tensor | None, start: int, stop: int
) -> torch.Tensor:
    """The mean over relation heads of KL(R_teacher ‖ R_student) for the tokens from ``start`` to ``stop``, [batch, stop − start]."""
    positions = torch.arange(stop, device=valid.device)
    here = positions[start:, None]
    # a masked token is left its own column, or its softmax would be over nothing; it is dropped by the caller
    before = (positions <= here) & valid[:, None, :stop]
    if documents is not None:
        before = before & (documents[:, start:stop, None] == documents[:, None, :stop])
    allowed = (before | (positions == here))[:, None]  # [batch, 1, rows, stop]
    log_p, log_q = (
        (x[:, :, start:stop] @ x[:, :, :stop].mT * x.shape[-1] ** -0.5).masked_fill(~allowed, float("-inf")).log_softmax(dim=-1)
        for x in (teacher.detach(), student)
    )
    value = torch.where(allowed, log_p.exp() * (log_p - log_q), 0.0).sum(dim=-1).mean(dim=1)
    return value + (value.clamp_min(0.0) - value).detach()  # rounding may turn it negative; the gradient stays
