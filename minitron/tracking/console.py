"""Metrics as plain log lines."""

from __future__ import annotations

from collections.abc import Mapping

from minitron.errors import ConfigError
from minitron.log import get_logger
from minitron.tracking.member import RunInfo

_logger = get_logger(__name__)


class ConsoleTracker:
    """Logs the first step it sees and every ``every``-th."""

    def __init__(self, run: RunInfo, *, every: int = 10) -> None:
        self.check(every=every)
        self._name, self._every, self._fresh = run.run_name, every, True

    @staticmethod
    def check(*, every: int = 10) -> None:
        """Refuse what cannot work, before anything is trained.

        Raises:
            ConfigError: a number below 1.
        """
        if every < 1:
            raise ConfigError(f"tracking.console.every={every} must be at least 1")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one step."""
        if self._fresh or step % self._every == 0:
            values = "  ".join(f"{name} {_short(value)}" for name, value in metrics.items())
            _logger.info("%s step %d  %s", self._name, step, values)
            self._fresh = False

    def close(self) -> None:
        """Nothing is held back."""


def _short(value: float) -> str:
    number = float(value)
    return f"{number:,.0f}" if number.is_integer() and abs(number) < 1e15 or abs(number) >= 1e4 else f"{number:.4g}"
