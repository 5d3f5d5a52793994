"""Metrics to Weights & Biases, online or offline. Its troubles never stop training."""

from __future__ import annotations

import importlib
import os
import secrets
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron.errors import ConfigError
from minitron.log import get_logger
from minitron.tracking.member import RunInfo

MODES = ("online", "offline", "disabled")
ID_FILE = "wandb_run_id"

_logger = get_logger(__name__)


class WandbTracker:
    """One wandb run per run folder; a resumed run goes on under the same id.

    ``WANDB_MODE`` in the environment goes before the option, as in wandb itself. Without an API key online falls back to offline.
    """

    def __init__(
        self,
        run: RunInfo,
        *,
        mode: str = "online",
        project: str = "minitron",
        entity: str | None = None,
        group: str | None = None,
        name: str | None = None,
    ) -> None:
        mode = os.environ.get("WANDB_MODE") or mode
        if mode not in MODES:
            raise ConfigError(f"tracking.wandb.mode='{mode}' is unknown: {', '.join(MODES)} are accepted")
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ConfigError("tracking=wandb needs the package wandb: pip install wandb") from error
        self._run: Any = None
        run.folder.mkdir(parents=True, exist_ok=True)
        try:
            if mode == "online" and not _has_key(wandb):
                _logger.warning("wandb has no API key, so this run is kept offline in %s (wandb login, or wandb sync later)", run.folder / "wandb")
                mode = "offline"
            self._run = wandb.init(
                dir=str(run.folder),
                id=_run_id(run.folder),
                resume="allow" if mode == "online" else None,  # offline, the id alone joins the parts when they are synced
                mode=mode,
                project=project,
                entity=entity,
                group=group or run.group,
                name=name or run.run_name,
                config=run.config,
            )
            # a step metric of our own: wandb's counter refuses the steps that a resumed run repeats
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # network, quota, service process, disk: none of it is worth a training run
            self._give_up("start", error)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one step."""
        if self._run is not None:
            try:
                self._run.log({**metrics, "step": int(step)})
            except Exception as error:  # as above
                self._give_up("take metrics", error)

    def close(self) -> None:
        """Finish the run; what is not finished may lose its last lines."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:  # as above
                self._give_up("finish", error)
            self._run = None

    def _give_up(self, what: str, error: Exception) -> None:
        self._run = None
        _logger.warning("wandb could not %s (%s: %s); training goes on without it", what, type(error).__name__, error)


def _run_id(folder: Path) -> str:
    path = folder / ID_FILE
    if path.is_file() and (stored := path.read_text(encoding="utf-8").strip()):
        return stored
    # not from `random`, whose seed is the run's: two runs of one seed would share an id
    fresh = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
    path.write_text(fresh + "\n", encoding="utf-8")
    return fresh


def _has_key(wandb: Any) -> bool:
    """Whether wandb finds credentials, without asking at the terminal."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except TypeError:  # versions without these arguments
        return bool(wandb.api.api_key)
