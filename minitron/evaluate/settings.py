"""Sections ``evaluate`` and ``generate``."""

from __future__ import annotations

from dataclasses import dataclass

from minitron.core.options import option
from minitron.errors import ConfigError


@dataclass(frozen=True)
class SpeedConfig:
    """What is timed of teacher and finished model, in turn."""

    batch_sizes: list[int] = option([1, 8], "sequences at a time, one measurement each; []: nothing is timed")
    prompt_tokens: int = option(128, "tokens that are read before the first one is written (prefill)")
    new_tokens: int = option(16, "tokens that are decoded")
    num_rounds: int = option(3, "times that every model has its turn, after one that warms up")

    def check(self) -> None:
        """Refuse what cannot be timed.

        Raises:
            ConfigError: a number below 1.
        """
        numbers = {f"batch_sizes[{i}]": size for i, size in enumerate(self.batch_sizes)}
        numbers |= {"prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens, "num_rounds": self.num_rounds}
        for name, value in numbers.items():
            if value < 1:
                raise ConfigError(f"evaluate.speed.{name}={value} must be at least 1")


@dataclass(frozen=True)
class EvaluateConfig:
    """Section ``evaluate``."""

    num_sequences: int = option(64, "held-out sequences, at most")
    batch_size: int = option(4, "sequences per forward", recorded=True)
    tasks: list[str] = option([], "tasks of the lm-eval harness, by name, for every model of the run: evaluate.tasks=[piqa,arc_easy]")
    task_path: str | None = option(None, "folder with task files (YAML) of your own, searched before the harness's", recorded=True)
    limit: int | None = option(None, "examples per task, at most, the first ones; null: all")
    num_fewshot: int | None = option(None, "solved examples in front of each question; null: as the task says")
    speed: SpeedConfig = option(SpeedConfig(), "latency, throughput and memory of teacher and finished model")

    def check(self) -> None:
        """Refuse numbers that cannot work; the tasks themselves are checked by :mod:`minitron.evaluate.tasks`.

        Raises:
            ConfigError: a number out of range, or a name twice.
        """
        least = {"num_sequences": (self.num_sequences, 1), "batch_size": (self.batch_size, 1), "limit": (self.limit, 1)}
        for name, (value, smallest) in {**least, "num_fewshot": (self.num_fewshot, 0)}.items():
            if value is not None and value < smallest:
                raise ConfigError(f"evaluate.{name}={value} must be at least {smallest}")
        twice = next((name for name in self.tasks if self.tasks.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"evaluate.tasks names '{twice}' twice")
        self.speed.check()


@dataclass(frozen=True)
class GenerateConfig:
    """Section ``generate``."""

    prompt: str | None = option(None, "the text to go on from", recorded=True)
    max_new_tokens: int = option(64, "tokens to write, at most", recorded=True)
    temperature: float = option(0.0, "0: the likeliest token each time; else tokens are drawn at this temperature", recorded=True)
    top_k: int = option(0, "draw from the k likeliest tokens only; 0: from all", recorded=True)
    top_p: float = option(1.0, "draw from the likeliest tokens that hold this share of the probability", recorded=True)
    chat: bool = option(False, "put the prompt into the tokenizer's chat template, as a user's message", recorded=True)

    def check(self) -> None:
        """Refuse what nothing can be written with.

        Raises:
            ConfigError: no prompt, or a number out of range.
        """
        if not self.prompt:
            raise ConfigError("there is nothing to go on from: give prompt=TEXT")
        if self.max_new_tokens < 1:
            raise ConfigError(f"generate.max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.temperature < 0:
            raise ConfigError(f"generate.temperature={self.temperature} must be 0 or more")
        if self.top_k < 0:
            raise ConfigError(f"generate.top_k={self.top_k} must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"generate.top_p={self.top_p} is not a share: give a number above 0, up to 1")
