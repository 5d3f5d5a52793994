"""What a model writes after a prompt."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minitron.errors import ConfigError
from minitron.evaluate.settings import GenerateConfig


@dataclass(frozen=True)
class Written:
    """A continuation: its text, its tokens, and how long it took."""

    text: str
    ids: list[int]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Written tokens per second, the prompt's reading included."""
        return len(self.ids) / max(self.seconds, 1e-9)


def prompt_ids(tokenizer: Any, settings: GenerateConfig, *, max_positions: int | None) -> torch.Tensor:
    """The prompt as ids [1, length].

    Raises:
        ConfigError: it has no tokens, does not fit the model's positions, or asks for a chat template that is not there.
    """
    if settings.chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError("generate.chat=true needs a chat template, and the tokenizer has none: leave it off")
        messages = [{"role": "user", "content": settings.prompt}]
        words = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(words, add_special_tokens=False, return_tensors="pt").input_ids
    else:
        ids = tokenizer(settings.prompt, return_tensors="pt").input_ids
    length = ids.shape[1]
    if not length:
        raise ConfigError(f"the prompt {settings.prompt!r} has no tokens: give some text")
    if max_positions is not None and length + settings.max_new_tokens > max_positions:
        raise ConfigError(
            f"the prompt of {length} tokens and generate.max_new_tokens={settings.max_new_tokens} are more than the model's {max_positions} positions"
        )
    return ids  # type: ignore[no-any-return]


def write_on(model: nn.Module, tokenizer: Any, settings: GenerateConfig, *, seed: int) -> Written:
    """Go on from the prompt, greedily at temperature 0, until the end of text or ``max_new_tokens``."""
    from transformers import GenerationConfig

    config: Any = model.config
    device = next(model.parameters()).device
    ids = prompt_ids(tokenizer, settings, max_positions=getattr(config, "max_position_embeddings", None)).to(device)
    stops = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = stops if stops is not None else tokenizer.eos_token_id
    first = stops[0] if isinstance(stops, list) else stops
    drawn = {"do_sample": True, "temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    how = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else first,
        use_cache=True,
        **(drawn if settings.temperature > 0 else {"do_sample": False}),
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        started = time.perf_counter()
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)  # type: ignore[operator]
        new = found[0, ids.shape[1] :].tolist()
        seconds = time.perf_counter() - started
    return Written(tokenizer.decode(new, skip_special_tokens=True), new, seconds)


def agreement_from_start(first: list[int], second: list[int]) -> int:
    """How many tokens two continuations share before they part."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
