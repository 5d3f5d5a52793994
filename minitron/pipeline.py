"""Walk a recipe: skip what is done, rerun what has changed, refuse what was made by other settings, stop cleanly on a signal."""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from minitron import __version__, dist
from minitron.checkpoint import Heartbeat, RunLock, StopSignal, discard
from minitron.config import Config
from minitron.core.events import attempt
from minitron.core.manifest import CHECKPOINTS, Manifest, fingerprint_folder, plain, publish, set_aside, write_text
from minitron.core.protocols import StageModule
from minitron.errors import CheckpointError, ConfigError, Interrupted, LaunchError, MinitronError
from minitron.finished import BEGUN, RUN_FILE
from minitron.log import duration, get_logger
from minitron.paths import source_commit
from minitron.search.placement import TASKS
from minitron.search.ranking import task_of
from minitron.stages import load_stage
from minitron.stages.context import StageContext
from minitron.stages.tracked import track_stage

logger = get_logger(__name__)


def run_stages(config: Config, stages: list[str], *, command: str, experiment: str | None = None) -> None:
    """Run stages in order in the configured run folder.

    Raises:
        MinitronError: bad input, in one sentence.
        Interrupted: a signal asked for a stop; what was done is kept.
    """
    stop = StopSignal()
    stop.install()
    run_dir = Path(config.run_dir).expanduser()
    modules = [(name, load_stage(name)) for name in stages]
    place = _own_place(config, stages, run_dir)
    lock = RunLock(place)
    _on_main(lambda: _take_folder(place, lock))
    heartbeat = Heartbeat(place, also=lock.beat if dist.is_main() else lambda: None)
    heartbeat.start()
    try:
        _on_main(lambda: _record_run(place, config, stages, command, experiment))
        with attempt(place, command=command, stages=stages, num_processes=dist.world_size(), host=platform.node()):
            _run_modules(config, modules, run_dir, stop)
    except RuntimeError as error:
        told = heartbeat.explain(error)
        if told is None:
            raise
        raise told from error
    finally:
        heartbeat.stop()
        lock.release()


def _run_modules(config: Config, modules: list[tuple[str, StageModule]], run_dir: Path, stop: StopSignal) -> None:
    memory: dict[str, Any] = {"config": {**config.resolved(), "git": source_commit()}}  # for trackers
    for number, (name, module) in enumerate(modules, start=1):
        if stop.requested():
            raise Interrupted(f"stopped before {name}; the same command goes on from there")
        context = StageContext(run_dir, config.title, config.seed, config.view(module.SECTIONS), stop.requested, memory)
        if "teacher" in module.SECTIONS:
            context.original_teacher()  # may fetch or convert it, which takes every rank
        for folder in _on_main(lambda m=module, c=context: _folders(m, c)):
            _run_stage(config, name, module, context, folder, f"[{number}/{len(modules)}] {name}")
        if name == "correct":
            memory.pop("text", None)


def _own_place(config: Config, stages: list[str], run_dir: Path) -> Path:
    """Where lock, signs of life and record of this run lie: the run folder, but of a task, which works there beside others, one of its own."""
    task = config.sections["ranking"].task
    return run_dir / TASKS / "{}-of-{}.run".format(*task_of(task)) if task is not None and stages == ["rank"] else run_dir


def _folders(module: StageModule, context: StageContext) -> list[str]:
    listing = getattr(module, "folders", None)
    return listing(context) if listing else [module.FOLDER]


def _take_folder(run_dir: Path, lock: RunLock) -> None:
    """Make the run folder and be the only run in it.

    Raises:
        LaunchError: it cannot be written, is on a full disk, or another run is at work in it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(run_dir).free
        if free < 200 * 2**20:
            raise LaunchError(f"there are only {free / 2**20:.0f} MB free at {run_dir}: give run_dir=FOLDER on a disk with room")
        lock.acquire()
    except OSError as error:
        raise LaunchError(f"run_dir={run_dir} cannot be written: {error.strerror or error}") from error


def _record_run(run_dir: Path, config: Config, stages: list[str], command: str, experiment: str | None) -> None:
    """Record what is being run."""
    import torch
    import transformers

    try:
        known = json.loads((run_dir / RUN_FILE).read_text()) if (run_dir / RUN_FILE).is_file() else {}
        if known and not any(load_stage(name).SECTIONS for name in stages):
            return  # what reads no settings, as a report, says nothing of how the run was made
        recorded = stages if len(stages) > 1 or not known else known.get("stages", stages)
        document = {
            "recipe": config.recipe.name,
            "experiment": experiment,
            "stages": recorded,
            "folders": {name: load_stage(name).FOLDER for name in {*recorded, *stages}},
            "command": command,
            "minitron_version": __version__,
            "git": source_commit(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "host": platform.node(),
            "num_processes": dist.world_size(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "config": config.resolved(),
        }
        write_text(run_dir / RUN_FILE, json.dumps(document, indent=1, default=str))
    except OSError as error:
        raise LaunchError(f"run_dir={run_dir} cannot be written: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{run_dir / RUN_FILE} is damaged: {error}") from error


def _on_main(function: Any) -> Any:
    """Rank 0's answer on every rank; its errors too, so that no rank waits for one that has given up."""
    answer: Any = None
    if dist.is_main():
        try:
            answer = function()
        except MinitronError as error:
            answer = error
        except Exception as error:
            if dist.world_size() > 1:
                dist.broadcast_object(RuntimeError(f"{type(error).__name__}: {error}"))
            raise
    answer = dist.broadcast_object(answer)
    if isinstance(answer, Exception):
        raise answer
    return answer


def _run_stage(config: Config, name: str, module: StageModule, context: StageContext, folder: str, label: str) -> None:
    """One stage into one folder."""
    final = context.run_dir / folder
    partial = final.with_name(f"{final.name}.partial")
    effective = getattr(module, "effective", None)  # a stage may use a section only in part, or changed by another one
    settings = {**config.settings(module.SECTIONS), **(effective(context) if effective else {})}
    if "packing" in settings.get("data", {}):  # what auto comes to is a result-relevant choice
        settings["data"] = {**settings["data"], "packing": context.packing()}
    verdict = _on_main(lambda: _decide(config, name, module, context, final, partial, settings, label))
    if verdict is None:
        return
    context.memory["inputs"] = verdict
    started, clock = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), time.monotonic()
    main_only = getattr(module, "MAIN_ONLY", False)
    try:
        results = _on_main(lambda: module.run(context, partial)) if main_only else module.run(context, partial)
    except OSError as error:
        raise LaunchError(f"{name} cannot write to {partial}: {error.strerror or error}") from error
    if dist.is_main():
        manifest = Manifest(
            stage=name,
            settings=plain(settings),
            inputs=verdict,
            recorded={
                "num_processes": dist.world_size(),
                "command": sys.argv[1:],
                **plain(config.resolved().get("engine", {})),
                **{name: plain(config.resolved()[name]) for name in ("data",) if name in module.SECTIONS},
            },
            code_version=__version__,
            started=started,
            wall_seconds=round(time.monotonic() - clock, 2),
            peak_memory_bytes=_peak_memory(),
            tokens=int(results.get("tokens", 0)),
            results=plain(results),
        )
        manifest.write(partial)
        publish(partial, final)
        # Only now: killed a moment earlier, the stage would have to start over.
        discard(final / CHECKPOINTS)
        (final / BEGUN).unlink(missing_ok=True)
        logger.info("  done in %s → %s", duration(manifest.wall_seconds), final)
        about = {"run_dir": context.run_dir, "title": config.title, "config": context.memory["config"]}
        track_stage(final, manifest, tracking=config.tracking, **about)
    dist.barrier()


def _decide(
    config: Config, name: str, module: StageModule, context: StageContext, final: Path, partial: Path, settings: dict[str, dict[str, Any]], label: str
) -> dict[str, str] | None:
    """None to skip the stage, else the fingerprints of its inputs; leaves a ``partial`` folder to work in.

    Raises:
        ConfigError: the folder was made or begun with other settings and ``rerun`` is not set.
    """
    inputs = _fingerprints(name, module.inputs(context))
    done = Manifest.read(final) if final.is_dir() else None
    begun = _read_begun(partial, name)
    for manifest, where in ((done, final), (begun, partial)):
        if manifest is None:
            continue
        differing = manifest.differing_settings(settings)
        if differing and not config.rerun:
            state = "finished" if manifest is done else "begun"
            raise ConfigError(
                f"{where} was {state} with other settings ({'; '.join(differing)}); rerun=true sets it aside and goes on, or give another run_dir"
            )
        if differing:
            logger.info("%s: set aside as %s", label, set_aside(where).name)
    if done is not None and final.is_dir():
        changed = done.differing_inputs(inputs)
        if not changed:
            logger.info("%s: nothing to do, %s is complete", label, final)
            shutil.rmtree(partial, ignore_errors=True)
            return None
        logger.info("%s: again, because %s changed", label, " and ".join(changed))
    else:
        logger.info("%s", label)
    if begun is not None and partial.is_dir() and begun.differing_inputs(inputs):
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    Manifest(name, plain(settings), inputs).write(partial)
    os.replace(partial / "manifest.json", partial / BEGUN)
    return inputs


def _read_begun(partial: Path, name: str) -> Manifest | None:
    """The manifest of a begun stage; a partial folder without one, or with nothing else (bad input was refused), is not worth keeping."""
    path = partial / BEGUN
    if not path.is_file() or all(entry == path for entry in partial.iterdir()):
        shutil.rmtree(partial, ignore_errors=True)
        return None
    try:
        return Manifest(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        shutil.rmtree(partial, ignore_errors=True)
        return None


def _fingerprints(name: str, inputs: dict[str, Any]) -> dict[str, str]:
    found = {}
    for key, value in inputs.items():
        if isinstance(value, Path):
            if not value.is_dir():
                raise CheckpointError(f"{name} needs {key} at {value}, which does not exist: run the stage that makes it first")
            value = fingerprint_folder(value)
        found[key] = str(value)
    return found


def _peak_memory() -> int:
    """Peak bytes of this process: resident on the CPU, allocated on a GPU."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


__all__ = ["run_stages"]
