"""The mathematics of one batch: a frozen teacher's signal, a trainable student, weighted loss terms."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from minitron import dist
from minitron.core.protocols import Engine
from minitron.distill.losses import LossConfig, build_losses
from minitron.models.head import check_linear_head, decoder_of, head_weight
from minitron.ops.kd_loss import fused_linear_losses

#: What validation measures: language-modelling loss, and the divergence from the teacher when there is one.
_VALIDATION = {"cross_entropy": 1.0, "forward_kl": 1.0}


class StudentLosses(nn.Module):
    """The root that an engine wraps: the student and its losses, so that sharded weights are whole where the loss needs them."""

    def __init__(self, student: nn.Module, config: LossConfig, *, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.student = student
        self.temperature = config.temperature
        self.losses = build_losses(config)
        self.validation_losses = {loss.name: loss for loss in build_losses(LossConfig(terms=_VALIDATION))}
        self.compute_dtype = compute_dtype

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss in use needs the teacher."""
        return any(loss.function.needs_teacher for loss in self.losses)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        denominator: torch.Tensor,
        teacher_hidden: torch.Tensor | None = None,
        teacher_weight: torch.Tensor | None = None,
        validate: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Loss terms of one micro-batch, each summed over its valid tokens and divided by ``denominator``.

        Args:
            input_ids, labels: [batch, sequence]; labels are already shifted.
            denominator: 0-d, valid tokens of the whole optimiser step.
            teacher_hidden: [batch, sequence, teacher hidden].
            teacher_weight: [vocab, teacher hidden].

        Returns:
            ``loss`` (the weighted total, differentiable) and every term by name (detached).
        """
        losses = self.losses
        if validate:
            losses = [loss for loss in self.validation_losses.values() if teacher_hidden is not None or not loss.function.needs_teacher]
        hidden = decoder_of(self.student)(input_ids=input_ids, use_cache=False).last_hidden_state
        weight: torch.Tensor = head_weight(self.student)
        if teacher_weight is not None:  # one tokenizer, padded differently: the padding rows of the larger vocabulary play no part
            vocab = min(weight.shape[0], teacher_weight.shape[0])
            weight, teacher_weight = weight[:vocab], teacher_weight[:vocab]
        total, values = fused_linear_losses(
            hidden.flatten(0, 1),
            weight,
            labels.flatten(),
            losses,
            denominator=denominator,
            teacher_hidden=None if teacher_hidden is None else teacher_hidden.flatten(0, 1),
            teacher_weight=teacher_weight,
            temperature=1.0 if validate else self.temperature,
            compute_dtype=self.compute_dtype,
        )
        return {"loss": total, **{loss.name: values[i] for i, loss in enumerate(losses)}}


class FrozenDecoder(nn.Module):
    """The teacher as its engine sees it: token ids in, hidden states out; its head lies beside, for the loss only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[batch, sequence] → [batch, sequence, hidden]."""
        return decoder_of(self.model)(input_ids=input_ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


class TeacherSignal:
    """What the teacher says about a batch: hidden states and the head that turns them into logits.

    With ``remember_bytes`` the hidden states of batches seen before are kept, up to that many bytes: several students that are
    trained on the same batches then cost one teacher forward per batch.
    """

    def __init__(self, model: nn.Module, engine: Engine, *, blocks: list[nn.Module], placement: str, remember_bytes: int = 0) -> None:
        check_linear_head(model)
        decoder = FrozenDecoder(model)
        self._engine = engine
        self._forward: Callable[..., torch.Tensor] = engine.prepare_frozen(decoder, blocks=blocks, placement=placement)
        self._head = head_weight(decoder.model)
        self._remembered: dict[bytes, torch.Tensor] = {}
        self._room = remember_bytes
        self.num_forwards = 0

    def hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[batch, sequence] ids on the CPU → [batch, sequence, hidden] on the device."""
        key = input_ids.numpy().tobytes() if self._room or self._remembered else b""
        if key and key in self._remembered:
            return self._remembered[key].to(dist.device())
        with torch.no_grad():
            states = self._forward(input_ids.to(dist.device()))
        self.num_forwards += 1
        if key and states.nbytes <= self._room:
            self._room -= states.nbytes
            self._remembered[key] = states.cpu()
        return states

    def head(self) -> Any:
        """A context that yields the whole head weight."""
        return self._engine.gathered([self._head])


class TeacherStudent:
    """Teacher signal + wrapped student root. ``losses`` is all that the loop calls."""

    def __init__(self, root: Callable[..., dict[str, torch.Tensor]], teacher: TeacherSignal | None) -> None:
        self._root, self._teacher = root, teacher

    def losses(self, batch: dict[str, torch.Tensor], denominator: torch.Tensor, *, validate: bool = False) -> dict[str, torch.Tensor]:
        """Loss terms of one micro-batch of CPU tensors."""
        device = dist.device()
        hidden = self._teacher.hidden(batch["input_ids"]) if self._teacher is not None else None
        with self._teacher.head() if self._teacher is not None else nullcontext([None]) as (weight,):
            return self._root(
                batch["input_ids"].to(device, non_blocking=True),
                batch["labels"].to(device, non_blocking=True),
                denominator,
                teacher_hidden=hidden,
                teacher_weight=weight,
                validate=validate,
            )
