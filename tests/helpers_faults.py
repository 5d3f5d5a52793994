"""Small real jobs that are killed, stopped and starved: the command line in processes from the fork server."""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from helpers_models import tiny_llama
from helpers_ranks import ENVIRONMENT, PRELOAD, _fork_server, _free_port
from helpers_text import write_jsonl
from safetensors.torch import load_file

from minitron.tracking.jsonl import read_metrics

#: What the command line imports before it begins; where the fork server runs already, jobs take a second longer each.
PRELOAD += [
    "hydra",
    "minitron.cli",
    "minitron.config",
    "minitron.pipeline",
    "minitron.checks",
    "minitron.stages.distill",
    "minitron.stages.importance",
]

#: Runs in a job's process before the command line does; importable by its module's name.
Prepare = Callable[..., None]


@dataclass
class Job:
    """A command at work on one or several ranks; ``log`` gathers what each says."""

    processes: list[BaseProcess]
    logs: list[Path]
    seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def kill(self, number: int = signal.SIGKILL, ranks: list[int] | None = None) -> None:
        """Send a signal to all ranks, or to some."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            process = self.processes[rank]
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    def wait(self, timeout: float = 60.0, ranks: list[int] | None = None) -> list[int | None]:
        """Exit codes when all (or some) ranks have left; what is left then is killed."""
        end = time.monotonic() + timeout
        chosen = self.processes if ranks is None else [self.processes[rank] for rank in ranks]
        for process in chosen:
            process.join(max(0.0, end - time.monotonic()))
        self.seconds = time.monotonic() - self.began
        codes = [process.exitcode for process in chosen]
        if ranks is None:
            self.kill()
        return codes

    def said(self, rank: int = 0) -> str:
        """What a rank wrote to its screen."""
        return self.logs[rank].read_text(errors="replace") if self.logs[rank].is_file() else ""

    def until(self, condition: Callable[[], bool], timeout: float = 30.0) -> None:
        """Wait for something to happen while the job runs."""
        end = time.monotonic() + timeout
        while not condition():
            assert any(process.is_alive() for process in self.processes), f"the job has ended:\n{self.said()}"
            assert time.monotonic() < end, f"nothing happened in {timeout} s:\n{self.said()}"
            time.sleep(0.002)


def start(words: list[str], log: Path, *, world_size: int = 1, prepare: tuple[Prepare, tuple[Any, ...]] | None = None) -> Job:
    """Start ``minitron words…``; ``prepare`` is called first on every rank."""
    context, port = _fork_server(), _free_port()
    job = Job([], [log.with_name(f"{log.name}-{rank}.log") for rank in range(world_size)])
    for rank in range(world_size):
        process: BaseProcess = context.Process(target=_child, args=(words, str(job.logs[rank]), rank, world_size, port, prepare), daemon=True)
        process.start()
        job.processes.append(process)
    return job


def run(words: list[str], log: Path, *, world_size: int = 1, prepare: tuple[Prepare, tuple[Any, ...]] | None = None, code: int = 0) -> Job:
    """Start a command, wait for its end and check how it ended."""
    job = start(words, log, world_size=world_size, prepare=prepare)
    codes = job.wait()
    assert codes == [code] * world_size, f"exit codes {codes}, not {code}:\n" + "\n".join(job.said(rank)[-3000:] for rank in range(world_size))
    return job


def _child(words: list[str], log: str, rank: int, world_size: int, port: int, prepare: tuple[Prepare, tuple[Any, ...]] | None) -> None:
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in environment.items()}, MASTER_ADDR="127.0.0.1", **ENVIRONMENT)
    import gc

    import torch

    from minitron.cli import main

    gc.freeze()
    torch.set_num_threads(1)
    code: int | None = 1
    try:
        if prepare is not None:
            prepare[0](*prepare[1])
        code = main(words)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code if code is not None else 0)


# ------------------------------------------------------------------------------------------------------------ what is done to a job


def trap(module: str, attribute: str, call: int, *, rank: int = 0, after: bool = False) -> None:
    """The process kills itself (SIGKILL) in the ``call``-th call of a function, before it or after it."""
    if int(os.environ["RANK"]) != rank:
        return
    owner, last = _owner(module, attribute)
    whole, count = getattr(owner, last), [0]

    def trapped(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        answer = whole(*args, **kwargs)
        if count[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    setattr(owner, last, trapped)


def small_disk(num_bytes: int, call: int) -> None:
    """From the ``call``-th checkpoint on no file may grow beyond a size: the system's own error, in the middle of a write."""
    from minitron.checkpoint import writing

    whole, count = writing.write_share, [0]

    def limited(*args: Any, **kwargs: Any) -> None:
        count[0] += 1
        if count[0] >= call:
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
        whole(*args, **kwargs)

    writing.write_share = limited


def poison(tokens: list[list[int]], factor: float) -> None:
    """The loss of every batch that holds one of these sequences is multiplied, by NaN or by a number."""
    from minitron.distill.pair import TeacherStudent

    whole, bad = TeacherStudent.losses, {tuple(row) for row in tokens}

    def losses(self: TeacherStudent, batch: dict[str, Any], denominator: Any, *, validate: bool = False) -> dict[str, Any]:
        terms = whole(self, batch, denominator, validate=validate)
        if not validate and any(tuple(row) in bad for row in batch["input_ids"].tolist()):
            terms = {**terms, "loss": terms["loss"] * factor}
        return terms

    TeacherStudent.losses = losses  # type: ignore[method-assign]


def record_batches(path: str) -> None:
    """Write down the sequences of every batch that is trained on."""
    import json

    from minitron.distill.pair import TeacherStudent

    whole = TeacherStudent.losses

    def losses(self: TeacherStudent, batch: dict[str, Any], denominator: Any, *, validate: bool = False) -> dict[str, Any]:
        if not validate:
            with open(path, "a") as file:
                file.write(json.dumps(batch["input_ids"].tolist()) + "\n")
        return whole(self, batch, denominator, validate=validate)

    TeacherStudent.losses = losses  # type: ignore[method-assign]


def other_host(name: str) -> None:
    """The machine is called otherwise, its clock is an hour behind, and locks of others are watched for a short time."""
    import platform
    import time as clock

    from minitron.checkpoint import lock

    now = clock.time
    platform.node = lambda: name
    clock.time = lambda: now() - 3600.0
    lock.WATCH_SECONDS = 0.5


def several(*calls: tuple[Prepare, tuple[Any, ...]]) -> None:
    """One preparation after another."""
    for function, arguments in calls:
        function(*arguments)


def _owner(module: str, attribute: str) -> tuple[Any, str]:
    owner: Any = importlib.import_module(module)
    *path, last = attribute.split(".")
    for name in path:
        owner = getattr(owner, name)
    return owner, last


# --------------------------------------------------------------------------------------------------------------------- the jobs


def make_place(folder: Path) -> Path:
    """A teacher, a student and a corpus."""
    tiny_llama(folder / "teacher", layers=2)
    tiny_llama(folder / "student", layers=2, ffn=32, seed=1)
    write_jsonl(folder / "text.jsonl", num_documents=60)
    return folder


def distill_words(place: Path, run_dir: Path, *more: str, engine: str = "local") -> list[str]:
    """A distillation of 24 steps with a checkpoint every 4."""
    data = [f"teacher.path={place / 'teacher'}", f"student.path={place / 'student'}", f"data.path={place / 'text.jsonl'}", "data.sequence_length=24"]
    train = [
        "training.num_steps=24",
        "training.batch_size=4",
        "training.micro_batch_size=2",
        "training.learning_rate=1e-3",
        "training.checkpoint_every=4",
    ]
    train += ["training.num_validation_sequences=3", "data.validation_fraction=0.2", "training.precision=float32", "teacher.dtype=float32"]
    return ["distill", f"run_dir={run_dir}", *data, *train, f"engine={engine}", *more]


def outcome(run_dir: Path) -> tuple[dict[str, Any], list[tuple[Any, ...]]]:
    """Final weights as bytes, and the losses of every step."""
    weights = {name: tensor.numpy().tobytes() for name, tensor in load_file(str(run_dir / "student" / "model.safetensors")).items()}
    rows = read_metrics(run_dir / "student" / "metrics.jsonl")
    return weights, [(row["step"], row.get("loss"), row.get("validation_loss"), row.get("gradient_norm")) for row in rows]


def steps_on_disk(run_dir: Path, stage: str = "student") -> list[int]:
    """Steps of the whole checkpoints of a stage at work."""
    folder = run_dir / f"{stage}.partial" / "checkpoints"
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit())
