"""Continuations of prompts, drawn from the student or from a mixture of student and teacher, under any engine.

Every rank does the same number of forwards whatever it samples, so the collectives of sharded engines match. A prompt is read once, then
one token at a time: keys and values of earlier tokens are kept, so ``n`` new tokens cost the forward work of ``prompt + n`` tokens,
though in ``n`` forwards, in each of which a sharded engine gathers the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from minitron import dist
from minitron.data.stream import mix
from minitron.distill.on_policy.root import new_cache
from minitron.distill.on_policy.settings import OnPolicyConfig
from minitron.distill.teacher import TeacherSignal
from minitron.ops.kd_loss import WeightedRowLoss
from minitron.ops.token_loss import token_losses

#: Token ids [batch, new] that follow those of the calls before → logits of the token after them, [batch, vocab] float32.
Step = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Continuations:
    """Sampled tokens and what the models say about them; n new tokens a row.

    ``tokens`` [batch, prompt + n] int64; ``valid`` [batch, n] is False after a row's end of text; log-probabilities [batch, n] float32
    of each new token: ``student`` and ``teacher`` at temperature 1, ``sampled`` under the distribution that it was drawn from.
    """

    tokens: torch.Tensor
    valid: torch.Tensor
    student: torch.Tensor
    sampled: torch.Tensor
    teacher: torch.Tensor | None


def uniforms(num_rows: int, num_tokens: int, *, first_row: int, step: int, seed: int) -> torch.Tensor:
    """Random numbers in [0, 1), [rows, tokens] float64, that depend on seed, step and the row's number in the global batch alone.

    So samples do not depend on how rows are shared out over ranks and micro-batches, and resuming needs only the step.
    """
    key = int(mix(np.array([step]), seed=seed, salt=3)[0])
    counters = np.arange(first_row * num_tokens, (first_row + num_rows) * num_tokens)
    bits = mix(counters, seed=key, salt=4) >> np.uint64(11)
    return torch.from_numpy(bits.astype(np.float64) / 2.0**53).view(num_rows, num_tokens)


def draw(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One index a row by inversion of the cumulative distribution: [batch, vocab] float64 and [batch] → [batch] int64."""
    cumulative = probabilities.cumsum(-1)
    target = (uniform * cumulative[:, -1])[:, None]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_max(probabilities.shape[1] - 1)


@torch.no_grad()
def sample(
    prompts: torch.Tensor,
    *,
    student: Step,
    teacher: Step | None,
    uniform: torch.Tensor,
    temperature: float = 1.0,
    teacher_mix: float = 0.0,
    end_of_text: int | None = None,
) -> Continuations:
    """Continue prompts by as many tokens as ``uniform`` [batch, n] has columns.

    With a ``teacher`` each token comes from teacher_mix · p + (1 − teacher_mix) · q (MiniLLM, arXiv 2306.08543, eq. 4), both softened by
    ``temperature``. A row goes on after its end of text, with that token repeated, and is not valid there.

    Args:
        prompts: [batch, prompt] int64 on the device of the models.
    """
    pieces, fed = [prompts], prompts
    alive = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
    columns: dict[str, list[torch.Tensor]] = {"valid": [], "student": [], "sampled": [], "teacher": []}
    for number in uniform.to(prompts.device).unbind(1):
        logits = student(fed)  # [batch, vocab]
        probabilities = torch.softmax(logits.double() / temperature, -1)
        teacher_logits = teacher(fed) if teacher is not None else None
        if teacher_logits is not None:
            theirs = torch.softmax(teacher_logits.double() / temperature, -1)
            probabilities = teacher_mix * theirs + (1.0 - teacher_mix) * probabilities
        token = draw(probabilities, number)
        if end_of_text is not None:
            token = torch.where(alive, token, end_of_text)
        index = token[:, None]
        columns["valid"].append(alive)
        columns["sampled"].append(probabilities.gather(1, index)[:, 0].log().float())
        columns["student"].append(torch.log_softmax(logits, -1).gather(1, index)[:, 0])
        if teacher_logits is not None:
            columns["teacher"].append(torch.log_softmax(teacher_logits, -1).gather(1, index)[:, 0])
        if end_of_text is not None:
            alive = alive & (token != end_of_text)
        pieces.append(index)
        fed = index
    found = {name: torch.stack(column, 1) for name, column in columns.items() if column}
    return Continuations(torch.cat(pieces, 1), found["valid"], found["student"], found["sampled"], found.get("teacher"))


class _Seen:
    """All ids that one model has read, which says where each row's present document begins."""

    def __init__(self) -> None:
        self._ids: list[torch.Tensor] = []

    def with_new(self, ids: torch.Tensor) -> torch.Tensor:
        """Add ids [batch, new]; [batch, total]."""
        self._ids = [torch.cat([*self._ids, ids], 1)]
        return self._ids[0]


class ContinuationSampler:
    """Samples through an engine's wrapped root and, where asked for, the teacher's signal; nothing reaches into either."""

    def __init__(
        self,
        root: Callable[..., dict[str, torch.Tensor]],
        signal: TeacherSignal,
        config: OnPolicyConfig,
        *,
        losses: Sequence[WeightedRowLoss],
        student_config: Any,
        end_of_text: int | None,
    ) -> None:
        """``root`` is what the engine made of a ``SamplingRoot`` with those ``losses``; ``end_of_text`` None: rows never end."""
        self.config, self.losses = config, tuple(losses)
        self._root, self._signal, self._student_config, self._end_of_text = root, signal, student_config, end_of_text
        self._teacher_mix = config.teacher_mix if config.method == "minillm" else 0.0
        # One tokenizer, padded differently: the padding rows of the larger vocabulary are never sampled.
        self._vocabulary = min(int(each.get_text_config().vocab_size) for each in (student_config, signal.config))

    def __call__(self, prompts: torch.Tensor, uniform: torch.Tensor) -> Continuations:
        """Continue prompts [batch, prompt], on the CPU as the loop's batches are; every rank must call it equally often."""
        return sample(
            prompts.to(dist.device()),
            student=self._student_step(),
            teacher=self._teacher_step() if self._teacher_mix > 0 else None,
            uniform=uniform,
            temperature=self.config.temperature,
            teacher_mix=self._teacher_mix,
            end_of_text=self._end_of_text,
        )

    def teacher_log_probs(self, found: Continuations) -> torch.Tensor:
        """The teacher's log-probabilities of the new tokens, [batch, n] float32: known from sampling, else by one forward."""
        if found.teacher is not None:
            return found.teacher
        num_new = found.valid.shape[1]
        hidden = self._signal.hidden(found.tokens.cpu())[:, -num_new - 1 : -1]
        with self._signal.head() as head:
            losses = token_losses(hidden.flatten(0, 1), head.first(self._vocabulary), found.tokens[:, -num_new:].flatten())
        return -losses.view(-1, num_new)

    def _student_step(self) -> Step:
        cache, seen = new_cache(self._student_config), _Seen()
        return lambda ids: self._root(ids, cache=cache, so_far=seen.with_new(ids))["logits"][:, : self._vocabulary]

    def _teacher_step(self) -> Step:
        cache, seen = new_cache(self._signal.config), _Seen()

        def step(ids: torch.Tensor) -> torch.Tensor:
            hidden = self._signal.hidden(ids.cpu(), cache=cache, so_far=seen.with_new(ids))[:, -1]
            with self._signal.head() as head:
                return head.first(self._vocabulary).logits(hidden.to(head.weight.dtype))

        return step
