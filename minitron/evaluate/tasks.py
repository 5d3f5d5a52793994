"""Scores on tasks of the lm-eval harness, its own or those of a local folder of task files."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from minitron import dist
from minitron.errors import ConfigError, DataError, nearest
from minitron.evaluate.settings import EvaluateConfig
from minitron.log import get_logger

logger = get_logger(__name__)

#: Resamples for standard errors that have no formula (perplexities).
_RESAMPLES = 1000


@dataclass(frozen=True)
class TaskFile:
    """A task file of one's own: what it names, and its content with functions left as text."""

    path: Path
    names: tuple[str, ...]
    content: dict[str, Any]


def check_tasks(settings: EvaluateConfig) -> None:
    """Refuse tasks that cannot be asked, before a model is loaded.

    Raises:
        ConfigError: the harness is not installed, a task file does not parse or names data that is not there, or a task does not exist.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"evaluate.tasks={settings.tasks} needs the package lm-eval: pip install 'minitron[evaluate]'")
    own = {name for file in task_files(settings.task_path) for name in file.names}
    asked = [name for name in settings.tasks if name not in own]
    if asked:
        known = _manager(settings.task_path, with_defaults=True).all_tasks
        for name in asked:
            if name not in known:
                where = f", nor in evaluate.task_path={settings.task_path}" if settings.task_path else ""
                raise ConfigError(f"evaluate.tasks: the harness has no task '{name}'{where}; {nearest(name, {*own, *known})}")


def task_files(task_path: str | None) -> list[TaskFile]:
    """Every task file below a folder; files without a task or group are parts of others.

    Raises:
        ConfigError: there is no such folder, a file does not parse, or its data is not there.
    """
    if task_path is None:
        return []
    folder = Path(task_path).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"evaluate.task_path={task_path} is no folder: give one that holds task files (*.yaml)")
    return [file for path in sorted(folder.rglob("*.yaml")) if (file := _read(path)).names]


def _read(path: Path) -> TaskFile:
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: str(node.value))
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)  # a safe loader, with one more tag
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}: {getattr(error, 'problem', error)})" if mark is not None else f" ({str(error).splitlines()[0]})"
        raise ConfigError(f"the task file {path} does not parse{place}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"the task file {path} does not parse (it holds no mapping of options to values)")
    names = [content[key] for key in ("task", "group") if isinstance(content.get(key), str)]
    tags = content.get("tag") or []
    names += [tags] if isinstance(tags, str) else list(tags)
    for file in _data_files(content):
        if not _found(path, file).exists() and "://" not in file and not any(sign in file for sign in "*?["):
            raise ConfigError(f"the task file {path} names data that is not there: {file} (looked for beside it, then in the current folder)")
    return TaskFile(path, tuple(names), content)


def _data_files(content: Mapping[str, Any]) -> list[str]:
    """The local data files that a task file names."""
    given = (content.get("dataset_kwargs") or {}).get("data_files") or []
    values = given.values() if isinstance(given, dict) else [given]
    return [file for value in values for file in ([value] if isinstance(value, str) else value)]


def _found(path: Path, file: str) -> Path:
    """A data file beside its task file, else from the current folder."""
    beside = path.parent / Path(file).expanduser()
    return beside if beside.exists() else Path(file).expanduser()


def _manager(task_path: str | None, *, with_defaults: bool) -> Any:
    """The harness's index of tasks, in which those of one's own find the data beside them. Its own 14,000 files take seconds to list."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    with _quiet():
        manager = TaskManager(include_path=str(Path(task_path).expanduser()) if task_path else None, include_defaults=with_defaults)
        for file in task_files(task_path):
            entry = manager.task_index.get(str(file.content.get("task")))
            if entry is not None and _data_files(file.content):
                content = load_yaml(file.path)
                given = content["dataset_kwargs"]["data_files"]
                whole = {key: _placed(file.path, value) for key, value in given.items()} if isinstance(given, dict) else _placed(file.path, given)
                content["dataset_kwargs"] = {**content["dataset_kwargs"], "data_files": whole}
                manager.task_index[entry.name] = replace(entry, yaml_path=None, cfg=content)
    return manager


def _placed(path: Path, value: Any) -> Any:
    return str(_found(path, value).resolve()) if isinstance(value, str) and "://" not in value else value


class Tasks:
    """Tasks with their data, ready to be asked of one model after another; each rank asks its share of them."""

    def __init__(self, settings: EvaluateConfig, *, seed: int) -> None:
        """``seed`` chooses the solved examples.

        Raises:
            DataError: the data of a task cannot be had.
        """
        self._settings = settings
        self._mine = settings.tasks[dist.rank() :: dist.world_size()]
        own = {name for file in task_files(settings.task_path) for name in file.names}
        self._loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
        manager: Any = _manager(settings.task_path, with_defaults=not own.issuperset(self._mine)) if self._mine else None
        for name in self._mine:
            try:
                with _quiet():
                    found = manager.load([name])
            except Exception as error:  # data sets fail with assorted types: offline, not found, wrong columns
                raise DataError(f"the task '{name}' cannot be made ready ({_first_line(error)})") from error
            for kind, members in self._loaded.items():
                members |= found.get(kind, {})
        for task in self._loaded["tasks"].values():
            own_number = task.get_config("num_fewshot")  # a task that says 0 means it
            task.set_config(key="num_fewshot", value=own_number or 0 if settings.num_fewshot is None or own_number == 0 else settings.num_fewshot)
            task.set_fewshot_seed(seed=seed)

    def measure(self, model: nn.Module, tokenizer: Any, *, what: str) -> dict[str, dict[str, Any]]:
        """Every task's ``metrics`` (name → ``value``, ``stderr`` or None, ``higher_is_better``), ``num_examples`` and ``num_fewshot``.

        Raises:
            DataError: a task cannot be asked.
        """
        found = self._ask(model, tokenizer, what=what) if self._mine else {}
        return {name: row for part in dist.gather_objects(found) for name, row in part.items()}

    def _ask(self, model: nn.Module, tokenizer: Any, *, what: str) -> dict[str, dict[str, Any]]:
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        settings = self._settings
        logger.info("  %s: %s", what, ", ".join(self._mine))
        try:
            with _quiet():
                asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size)
                results: Any = evaluate(asked, self._loaded, limit=settings.limit, bootstrap_iters=_RESAMPLES, log_samples=False)
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:  # a task file that asks for what its data does not have
            raise DataError(f"the tasks {', '.join(self._mine)} cannot be asked ({type(error).__name__}: {_first_line(error)})") from error
        return {name: _row(name, results) for name in results["results"]}


def _row(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """One task of the harness's results, in our words. Its keys are ``metric,filter`` and ``metric_stderr,filter``."""
    values, better = results["results"][name], results.get("higher_is_better", {}).get(name, {})
    metrics: dict[str, Any] = {}
    for key, value in values.items():
        metric, comma, how = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = values.get(f"{metric}_stderr,{how}")
        metrics[metric if how == "none" else f"{metric} ({how})"] = {
            "value": float(value),
            "stderr": float(error) if isinstance(error, (int, float)) else None,
            "higher_is_better": better.get(metric),
        }
    counts = results.get("n-samples", {}).get(name, {})
    return {"metrics": metrics, "num_examples": counts.get("effective"), "num_fewshot": results.get("n-shot", {}).get(name)}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's advice, its processes, and, where nobody sits at a terminal, its bars."""
    import tqdm

    levels = {name: logging.getLogger(name).level for name in ("lm_eval", "datasets")}
    alone, begin = os.environ.get("DISABLE_MULTIPROC"), tqdm.tqdm.__init__
    os.environ["DISABLE_MULTIPROC"] = "1"
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        tqdm.tqdm.__init__ = lambda bar, *values, **named: begin(bar, *values, **{**named, "disable": True})  # the harness has no setting for it
    try:
        yield
    finally:
        tqdm.tqdm.__init__ = begin
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if alone is None:
            os.environ.pop("DISABLE_MULTIPROC", None)
        else:
            os.environ["DISABLE_MULTIPROC"] = alone
