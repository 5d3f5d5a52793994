"""Batches that the student has partly written itself: the data source of on-policy distillation."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from minitron import dist
from minitron.data.stream import mix
from minitron.distill.on_policy.minillm import POLICY_GRADIENT, token_weights
from minitron.distill.on_policy.sampling import Continuations, ContinuationSampler, uniforms
from minitron.ops.kd_loss import IGNORE_INDEX


class ResumableBatches(Protocol):
    """Micro-batches of one optimiser step after another, from a place that can be written down."""

    def next(self) -> list[dict[str, torch.Tensor]]:
        """This rank's micro-batches of the next step."""

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""


class OnPolicyBatches:
    """Replaces, in a share of the steps, each sequence after its prompt by what the student writes there (GKD, arXiv 2306.13649, alg. 1).

    Whether a step is replaced, and every sample in it, follows from the seed, the step and the place in the global batch: the same on
    any number of ranks and micro-batches, up to the rounding of the logits. The state is the step.
    """

    def __init__(self, inner: ResumableBatches, sampler: ContinuationSampler, *, seed: int) -> None:
        """``inner`` gives the data's batches, equally many sequences on every rank."""
        self._inner, self._sampler, self._seed = inner, sampler, seed
        self._config, self._losses = sampler.config, sampler.losses
        self._step = 0

    def next(self) -> list[dict[str, torch.Tensor]]:
        """This rank's micro-batches of the next step, on the CPU.

        Sampled ones are ``input_ids`` and ``labels`` [micro, prompt + new], labels on sampled tokens only. ``weights``
        [losses, micro, sequence] come with them where losses differ in which tokens they weigh.
        """
        step, self._step = self._step, self._step + 1
        micro_batches = self._inner.next()
        if not self.replaces(step):
            return [self._from_data(batch) for batch in micro_batches]
        row = dist.rank() * sum(len(batch["input_ids"]) for batch in micro_batches)
        sampled = []
        for batch in micro_batches:
            prompts = batch["input_ids"][:, : self._config.prompt_tokens]
            uniform = uniforms(len(prompts), self._config.max_new_tokens, first_row=row, step=step, seed=self._seed)
            sampled.append(self._from_student(self._sampler(prompts, uniform)))
            row += len(prompts)
        return sampled

    def replaces(self, step: int) -> bool:
        """Whether the step of that number, from 0, is on the student's text; every rank gives the same answer."""
        return float(mix(np.array([step]), seed=self._seed, salt=5)[0]) / 2.0**64 < self._config.fraction

    def state_dict(self) -> dict[str, Any]:
        """Where the data stands, and the step."""
        return {"inner": self._inner.state_dict(), "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the step after the one the state was taken at."""
        self._inner.load_state_dict(state["inner"])
        self._step = int(state["step"])

    def _from_data(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The data's own text: every loss but the policy gradient, which is about sampled tokens."""
        if not any(loss.name == POLICY_GRADIENT for loss in self._losses):
            return batch
        shape = batch["labels"].shape
        weights = [torch.full(shape, 0.0 if loss.name == POLICY_GRADIENT else 1.0) for loss in self._losses]
        return {**batch, "weights": torch.stack(weights)}

    def _from_student(self, found: Continuations) -> dict[str, torch.Tensor]:
        """Sampled text: its tokens are nobody's labels, so losses on labels alone have weight 0, save the policy gradient."""
        num_new = found.valid.shape[1]
        labels = torch.full_like(found.tokens, IGNORE_INDEX)
        labels[:, -num_new - 1 : -1] = torch.where(found.valid, found.tokens[:, -num_new:], IGNORE_INDEX)
        batch = {"input_ids": found.tokens.cpu(), "labels": labels.cpu()}
        minillm = self._config.method == "minillm"
        if not minillm and all(loss.function.needs_teacher for loss in self._losses):
            return batch
        single = long_term = torch.ones_like(found.student)
        if minillm:
            teacher = self._sampler.teacher_log_probs(found)
            single, long_term = token_weights(student=found.student, teacher=teacher, sampled=found.sampled, valid=found.valid)
        weights = torch.zeros(len(self._losses), *labels.shape)
        for row, loss in zip(weights, self._losses, strict=True):
            if loss.name == POLICY_GRADIENT:
                row[:, -num_new - 1 : -1] = long_term
            elif loss.function.needs_teacher:
                row[:, -num_new - 1 : -1] = single
        return {**batch, "weights": weights}
