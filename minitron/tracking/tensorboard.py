"""Metrics as TensorBoard event files in the stage's own folder."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minitron.errors import ConfigError
from minitron.tracking.member import RunInfo

FOLDER = "tensorboard"


class TensorboardTracker:
    """One event file per start; what a resumed run repeats is marked, so that TensorBoard shows each step once."""

    def __init__(self, run: RunInfo, *, flush_seconds: int = 30) -> None:
        self.check(flush_seconds=flush_seconds)
        self._folder, self._flush = run.folder / FOLDER, flush_seconds
        self._writer = self._open(self._folder, purge_step=run.step + 1 if run.step > 0 else 0)
        if run.config:
            self._writer.add_text("configuration", f"```json\n{json.dumps(run.config, indent=1, default=str)}\n```")

    @staticmethod
    def check(*, flush_seconds: int = 30) -> None:
        """Refuse what cannot work, before anything is trained.

        Raises:
            ConfigError: the package is missing, or a time below 1.
        """
        if importlib.util.find_spec(FOLDER) is None:
            raise ConfigError("tracking=tensorboard needs the package tensorboard: pip install 'minitron[tensorboard]'")
        if flush_seconds < 1:
            raise ConfigError(f"tracking.tensorboard.flush_seconds={flush_seconds} must be at least 1")

    def _open(self, folder: Path, *, purge_step: int) -> Any:
        module = importlib.import_module("torch.utils.tensorboard")
        return module.SummaryWriter(log_dir=str(folder), purge_step=purge_step, flush_secs=self._flush)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one step."""
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and name != "step":
                self._writer.add_scalar(name, value, global_step=int(step))

    def curve(self, name: str, points: Sequence[Mapping[str, float]], facts: Mapping[str, Any]) -> None:
        """A folder of its own for each, which TensorBoard draws into one chart."""
        writer = self._open(self._folder / name, purge_step=0)
        for point in points:
            for key, value in point.items():
                if key != "step" and isinstance(value, (int, float)):
                    writer.add_scalar(key, value, global_step=int(point["step"]))
        writer.close()

    def close(self) -> None:
        """Flush and leave."""
        self._writer.close()
