"""Metrics to Weights & Biases, online or offline. Its troubles never stop training."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import secrets
import string
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minitron.errors import ConfigError
from minitron.log import get_logger
from minitron.tracking.member import RunInfo

MODES = ("online", "offline", "disabled")
ID_FILE = "wandb_run_id"
#: Metrics that tell of trouble when they are not finite.
_WATCHED = ("loss", "gradient_norm", "validation_loss")

_logger = get_logger(__name__)
_told_offline = False


class WandbTracker:
    """One wandb run per run folder; a resumed run goes on under the same id.

    ``WANDB_MODE`` in the environment goes before the option, as in wandb itself. Without an API key online falls back to offline. Numbers that are
    not finite, leaps of the loss, and ``stall_minutes`` without metrics (0: nobody looks) raise an alert.
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
        stall_minutes: float = 30.0,
    ) -> None:
        self.check(mode=mode, stall_minutes=stall_minutes)
        mode = os.environ.get("WANDB_MODE") or mode
        self._wandb = importlib.import_module("wandb")
        self._run: Any = None
        self._info, self._alerted = run, set[str]()
        run.folder.mkdir(parents=True, exist_ok=True)
        try:
            if mode == "online" and not _has_key(self._wandb):
                _say_offline()
                mode = "offline"
            self._common = {"mode": mode, "project": project, "entity": entity, "group": group or run.group, "dir": str(run.folder)}
            self._run = self._wandb.init(
                id=_run_id(run.folder),
                resume="allow" if mode == "online" else None,  # offline, the id alone joins the parts when they are synced
                name=name or run.run_name,
                job_type=run.job,
                config=run.config,
                **self._common,
            )
            # a step metric of our own: wandb's counter refuses the steps that a resumed run repeats
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # network, quota, service process, disk: none of it is worth a training run
            self._give_up("start", error)
        self._stall = _Stall(stall_minutes * 60, self._stalled) if stall_minutes > 0 and self._run is not None else None

    @staticmethod
    def check(*, mode: str = "online", stall_minutes: float = 30.0, **_: Any) -> None:
        """Refuse what cannot work, before anything is trained.

        Raises:
            ConfigError: the package is missing, an unknown mode, or a negative time.
        """
        mode = os.environ.get("WANDB_MODE") or mode
        if mode not in MODES:
            raise ConfigError(f"tracking.wandb.mode='{mode}' is unknown: {', '.join(MODES)} are accepted")
        if stall_minutes < 0:
            raise ConfigError(f"tracking.wandb.stall_minutes={stall_minutes} must be 0 or more")
        try:
            importlib.import_module("wandb")
        except ImportError as error:
            raise ConfigError("tracking=wandb needs the package wandb: pip install wandb") from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one step."""
        self._guard("take metrics", lambda run: run.log({**metrics, "step": int(step)}))
        if self._stall is not None:
            self._stall.moved()
        for name in _WATCHED:
            if name in metrics and not math.isfinite(metrics[name]):
                self._alert("numbers", f"{name} is {metrics[name]}", f"{self._info.run_name}, step {step}: {name} is {metrics[name]}")
        if "loss_spike" in metrics:
            told = f"{self._info.run_name}, step {step}: the loss leapt by {metrics['loss_spike']:.0f} robust standard deviations"
            self._alert(f"spike {step}", "the loss leapt", told)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table in the run."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        data = [[row.get(column) for column in columns] for row in rows]
        self._guard("take a table", lambda run: run.log({name: self._wandb.Table(columns=columns, data=data)}))

    def curve(self, name: str, points: Sequence[Mapping[str, float]], facts: Mapping[str, Any]) -> None:
        """A run of its own in the same group."""

        def work(_: Any) -> None:
            settings = {**self._info.config, **facts}
            other = self._wandb.init(
                id=_run_id(self._info.folder / "curves" / name),
                resume="allow" if self._common["mode"] == "online" else None,
                name=f"{self._info.run_name}/{name}",
                job_type="candidate",
                config=settings,
                reinit="create_new",
                **self._common,
            )
            other.define_metric("step")
            other.define_metric("*", step_metric="step")
            for point in points:
                other.log(dict(point))
            other.finish()

        self._guard("take a curve", work)

    def reference(self, name: str, folder: Path, facts: Mapping[str, Any]) -> None:
        """An artifact that points at a folder; nothing is uploaded."""

        def work(run: Any) -> None:
            artifact = self._wandb.Artifact(name, type="model", metadata=dict(facts))
            artifact.add_reference(folder.resolve().as_uri(), checksum=False)
            run.log_artifact(artifact)

        self._guard("take a reference", work)

    def close(self) -> None:
        """Finish the run; what is not finished may lose its last lines."""
        if self._stall is not None:
            self._stall.stop()
        self._guard("finish", lambda run: run.finish())
        self._run = None

    def _stalled(self, seconds: float) -> None:
        told = f"{self._info.run_name} has sent no metrics for {seconds / 60:.0f} minutes"
        self._alert(f"stall {time.monotonic():.0f}", "no metrics", told)

    def _alert(self, key: str, title: str, text: str) -> None:
        """Once for each kind of trouble."""
        if key not in self._alerted:
            self._alerted.add(key)
            self._guard("send an alert", lambda run: run.alert(title=title, text=text, level="WARN"))

    def _guard(self, what: str, work: Callable[[Any], None]) -> None:
        if self._run is not None:
            try:
                work(self._run)
            except Exception as error:  # as at the start
                self._give_up(what, error)

    def _give_up(self, what: str, error: Exception) -> None:
        self._run = None
        _logger.warning("wandb could not %s (%s: %s); training goes on without it", what, type(error).__name__, error)


class _Stall:
    """A thread that calls once when nothing has moved for a while, and again after the next silence."""

    def __init__(self, seconds: float, call: Callable[[float], None]) -> None:
        self._seconds, self._call = seconds, call
        self._last, self._told, self._over = time.monotonic(), False, threading.Event()
        threading.Thread(target=self._work, name="stall", daemon=True).start()

    def moved(self) -> None:
        """Something has happened."""
        self._last, self._told = time.monotonic(), False

    def stop(self) -> None:
        """Look no more."""
        self._over.set()

    def _work(self) -> None:
        while not self._over.wait(min(self._seconds / 4, 30.0)):
            silent = time.monotonic() - self._last
            if silent > self._seconds and not self._told:
                self._told = True
                self._call(silent)


def _say_offline() -> None:
    """Once a process, however many stages have a tracker."""
    global _told_offline
    if not _told_offline:
        _logger.warning("wandb has no API key, so this run is kept offline in the run folder (wandb login, or wandb sync later)")
    _told_offline = True


def _run_id(folder: Path) -> str:
    path = folder / ID_FILE
    if path.is_file() and (stored := path.read_text(encoding="utf-8").strip()):
        return stored
    # not from `random`, whose seed is the run's: two runs of one seed would share an id
    fresh = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
    folder.mkdir(parents=True, exist_ok=True)
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
