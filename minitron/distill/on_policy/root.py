"""The student's root with a second way to answer: logits of the next token, for sampling under any engine."""

from __future__ import annotations

from typing import Any

import torch

from minitron.distill.on_policy.minillm import with_policy_gradient
from minitron.distill.on_policy.settings import OnPolicyConfig
from minitron.distill.pair import StudentLosses
from minitron.models.head import decoder_of
from minitron.models.packing import continuing_arguments


class SamplingRoot(StudentLosses):
    """``StudentLosses`` that, called with a ``cache``, gives ``logits`` of the token after the last one instead of losses.

    Engines wrap one forward; whoever samples asks it for logits rather than calling the student's modules, whose weights may lie sharded.
    """

    def forward(self, *args: Any, cache: Any = None, so_far: torch.Tensor | None = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Losses as ever; with a ``cache`` of keys and values, ids [batch, new] → ``logits`` [batch, vocab] float32.

        ``so_far`` [batch, total] are the ids that the cache holds, and the new ones.
        """
        if cache is None:
            return super().forward(*args, **kwargs)
        return {"logits": self._next_logits(args[0], cache, so_far if so_far is not None else args[0])}

    def _next_logits(self, input_ids: torch.Tensor, cache: Any, so_far: torch.Tensor) -> torch.Tensor:
        training = self.student.training
        self.student.eval()  # no dropout in what is sampled; and recomputing activations would forbid the cache
        decoder, more = decoder_of(self.student), continuing_arguments(so_far, input_ids.shape[1], self.separator)
        hidden = decoder(input_ids=input_ids, past_key_values=cache, use_cache=True, **more).last_hidden_state[:, -1]  # [batch, hidden]
        self.student.train(training)
        head = self.head().ready(self.compute_dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return head.logits(hidden.to(head.weight.dtype))


def new_cache(config: Any) -> Any:
    """An empty store of keys and values for the decoder of a Hugging Face config; forwards fill it in place."""
    from transformers import DynamicCache

    return DynamicCache(config=config)


class MiniLLMRoot(SamplingRoot):
    """A root with MiniLLM's long-term part among its losses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses = with_policy_gradient(self.losses)


def root_class(on_policy: OnPolicyConfig) -> type[StudentLosses]:
    """The root for a training: one that can sample only where samples are asked for."""
    if on_policy.fraction == 0:
        return StudentLosses
    return MiniLLMRoot if on_policy.method == "minillm" else SamplingRoot
