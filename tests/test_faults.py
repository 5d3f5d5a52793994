"""What can happen to a running job, done to small real ones: killed, stopped, starved of disk, fed with what is not a number."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers_faults import (
    Job,
    distill_words,
    make_place,
    other_host,
    outcome,
    poison,
    record_batches,
    run,
    several,
    small_disk,
    start,
    steps_on_disk,
    trap,
)
from helpers_models import tiny_llama

from minitron.checkpoint.lock import RunLock
from minitron.checkpoint.processes import identity
from minitron.checkpoint.space import check_room
from minitron.core.goodput import best_interval, predict, steps_between, training_share
from minitron.errors import CheckpointError, LaunchError
from minitron.tracking.jsonl import read_metrics


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[dict[str, Any], list[tuple[Any, ...]]]:
    """The uninterrupted run of one process, which also writes down its batches."""
    run(distill_words(place, place / "whole"), place / "whole", prepare=(record_batches, (str(place / "batches"),)))
    return outcome(place / "whole")


#: Where the process is when it is killed: function and which call of it. Steps call engine.step, each checkpoint the other three.
INSTANTS = [
    ("minitron.engine.local", "LocalEngine.step", 6, False),
    ("minitron.checkpoint.writing", "HostCopies.take", 1, True),
    ("minitron.checkpoint.files", "write_sum", 3, False),
    ("minitron.checkpoint.checkpointer", "write_document", 1, True),
    ("minitron.checkpoint.checkpointer", "os.replace", 2, False),
    ("minitron.checkpoint.checkpointer", "os.replace", 1, True),
    ("minitron.pipeline", "publish", 1, False),
]


def test_killed_at_any_instant_the_same_command_ends_the_same(place: Path, whole: Any, tmp_path: Path) -> None:
    """One run that is killed again and again: in a step, in the copy, in the write, before and after the rename, before the result appears."""
    words, reached = distill_words(place, tmp_path / "run"), -1
    for number, (module, attribute, call, after) in enumerate(INSTANTS):
        job = start(words, tmp_path / f"kill-{number}", prepare=(_trap, (module, attribute, call, after)))
        assert job.wait() == [-signal.SIGKILL], f"{attribute}: {job.said()}"
        steps = steps_on_disk(tmp_path / "run")
        assert max(steps, default=0) >= reached, "a checkpoint that stood is gone"
        reached = max(steps, default=0)
    assert reached == 20
    run(words, tmp_path / "last")
    assert outcome(tmp_path / "run") == whole
    assert not list((tmp_path / "run" / "student").glob("checkpoints")) and not (tmp_path / "run" / ".lock").exists()


def _trap(module: str, attribute: str, call: int, after: bool) -> None:
    trap(module, attribute, call, after=after)


def test_ranks_that_die_and_ranks_that_hang(place: Path, tmp_path: Path) -> None:
    """All killed; one killed, whom the other names; one stopped, whom the other names in time. Then the job ends as if nothing had been."""
    more = ("engine.timeout=5",)
    run(distill_words(place, tmp_path / "whole", *more, engine="fsdp"), tmp_path / "whole", world_size=2)
    words = distill_words(place, tmp_path / "run", *more, engine="fsdp")
    job = start(words, tmp_path / "all", world_size=2)
    job.until(lambda: bool(steps_on_disk(tmp_path / "run")))
    job.kill()
    job.wait()
    job = start(words, tmp_path / "one", world_size=2, prepare=(_trap_rank, (1,)))
    assert job.wait() == [2, -signal.SIGKILL]
    assert "rank 0 stops, because rank 1 (process" in job.said() and "is gone" in job.said() and "goes on from the last checkpoint" in job.said()
    _stop_one(words, tmp_path)
    run(words, tmp_path / "last", world_size=2)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def _trap_rank(rank: int) -> None:
    trap("minitron.engine.fsdp", "FsdpEngine.step", 6, rank=rank)


def _stop_one(words: list[str], folder: Path) -> None:
    job = start(words, folder / "hung", world_size=2, prepare=(_slow, ()))
    before = max(steps_on_disk(folder / "run"))
    job.until(lambda: max(steps_on_disk(folder / "run")) > before)
    job.kill(signal.SIGSTOP, ranks=[1])
    stopped = time.monotonic()
    assert job.wait(ranks=[0], timeout=40) == [2]
    assert time.monotonic() - stopped < 25, "five seconds of time-out and some for a busy machine"
    assert "rank 1 (process" in job.said() and "is stopped" in job.said(), job.said()
    job.kill()
    job.wait()


@pytest.mark.slow
def test_the_launcher_starts_a_killed_job_again(place: Path, tmp_path: Path) -> None:
    """torchrun with one restart: rank 1 is killed, both ranks come back and go on from the checkpoint."""
    words = distill_words(place, tmp_path / "run", "training.num_steps=300", engine="fsdp")
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "NPROC_PER_NODE": "2",
        "MAX_RESTARTS": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = ["bash", str(Path(__file__).resolve().parents[1] / "launch" / "torchrun.sh"), *words]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as job:
        end = time.monotonic() + 120
        while not steps_on_disk(tmp_path / "run"):
            assert time.monotonic() < end and job.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        os.kill(json.loads((tmp_path / "run" / ".ranks" / "rank-00001.json").read_text())["process"], signal.SIGKILL)
        code = job.wait(240)
    said = (tmp_path / "log").read_text()
    assert code == 0 and "rank 1 (process" in said and "distill goes on from step" in said, said
    assert read_metrics(tmp_path / "run" / "student" / "metrics.jsonl")[-1]["step"] == 300


def _slow() -> None:
    """Steps that take a tenth of a second, so that a signal comes in between."""
    from minitron.engine.fsdp import FsdpEngine
    from minitron.engine.local import LocalEngine

    for cls in (LocalEngine, FsdpEngine):
        whole_step = cls.step

        def step(self: Any, rate: float, whole_step: Any = whole_step) -> Any:
            time.sleep(0.1)
            return whole_step(self, rate)

        cls.step = step  # type: ignore[method-assign]


def test_asked_to_stop_it_leaves_a_checkpoint_and_goes_on(place: Path, whole: Any, tmp_path: Path) -> None:
    words = distill_words(place, tmp_path / "run")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        job = start(words, tmp_path / f"signal-{number}", prepare=(_slow, ()))
        seen = len(steps_on_disk(tmp_path / "run"))
        job.until(lambda seen=seen: _lines(tmp_path / "run") > 2 + 3 * seen)  # type: ignore[misc]
        job.kill(number)
        assert job.wait(timeout=20) == [0] and "stopped at step" in job.said()
        assert steps_on_disk(tmp_path / "run") and not (tmp_path / "run" / "student").exists()
        last = int(job.said().rpartition("stopped at step ")[2].split()[0])
        assert steps_on_disk(tmp_path / "run")[-1] == last, "the step at work is in the checkpoint"
    run(words, tmp_path / "last")
    assert outcome(tmp_path / "run") == whole


def _lines(run_dir: Path) -> int:
    path = run_dir / "student.partial" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def test_a_full_disk_and_damaged_checkpoints(place: Path, whole: Any, tmp_path: Path) -> None:
    """The third checkpoint does not fit; then the newest is truncated, and the one before is taken by name."""
    words = distill_words(place, tmp_path / "run")
    job = run(words, tmp_path / "full", prepare=(small_disk, (60_000, 3)), code=2)
    assert "the checkpoint of step 12 cannot be written to" in job.said() and "File too large" in job.said() and "Traceback" not in job.said()
    assert steps_on_disk(tmp_path / "run") == [4, 8] and not list((tmp_path / "run").rglob("step-*.partial"))
    (newest,) = (tmp_path / "run" / "student.partial" / "checkpoints" / "step-8").glob("*.safetensors")
    newest.write_bytes(newest.read_bytes()[:-100])
    job = run(words, tmp_path / "truncated")
    assert "step-8 is passed over: damaged: rank-00000-of-00001.safetensors does not match its checksum" in job.said()
    assert "distill goes on from step 4" in job.said() and outcome(tmp_path / "run") == whole


def test_a_checkpoint_of_another_model_is_refused(place: Path, tmp_path: Path) -> None:
    words = distill_words(place, tmp_path / "run")
    start(words, tmp_path / "first", prepare=(_trap, ("minitron.engine.local", "LocalEngine.step", 7, False))).wait()
    other = tiny_llama(tmp_path / "other", layers=2, ffn=40, seed=1)
    foreign = tmp_path / "foreign"
    start(
        [*distill_words(place, foreign), f"student.path={other}"],
        tmp_path / "second",
        prepare=(_trap, ("minitron.engine.local", "LocalEngine.step", 7, False)),
    ).wait()
    for path in (foreign / "student.partial" / "checkpoints").iterdir():
        path.rename(tmp_path / "run" / "student.partial" / "checkpoints" / "step-6")
    job = run(words, tmp_path / "last")
    assert "step-6 is passed over: it belongs to a training on other models or data" in job.said() and "goes on from step 4" in job.said()


def _batches(place: Path) -> list[list[list[int]]]:
    """Sequences of every step, in order."""
    micro = [json.loads(line) for line in (place / "batches").read_text().splitlines()]
    return [micro[2 * step] + micro[2 * step + 1] for step in range(len(micro) // 2)]


def test_bad_data_is_skipped_gone_behind_or_named(place: Path, whole: Any, tmp_path: Path) -> None:
    bad = _batches(place)
    words = distill_words(place, tmp_path / "skipped", "training.max_skipped_steps=2")
    job = run(words, tmp_path / "skipped", prepare=(poison, (bad[9] + bad[10], float("nan"))))
    rows = read_metrics(tmp_path / "skipped" / "student" / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows if "skipped_steps" in row] == [0] * 9 + [1] + [2] * 14
    assert rows[-1]["validation_loss"] == pytest.approx(whole[1][-1][2], rel=0.05) and "step 11 was skipped" in job.said()

    words = distill_words(place, tmp_path / "back", "training.max_skipped_steps=2")
    job = run(words, tmp_path / "back", prepare=(poison, (sum(bad[9:12], []), float("inf"))))
    assert "goes back to step 8, and on behind the data at fault: the 3 steps up to step 12 had gradients that are not finite" in job.said()
    rows = [row for row in read_metrics(tmp_path / "back" / "student" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 25)), "the lines of the steps that were undone are gone"
    assert rows[8]["loss"] == pytest.approx(whole[1][13][1], rel=0.3) and rows[8]["loss"] != whole[1][9][1], "step 9 is on the thirteenth batch"

    words = distill_words(place, tmp_path / "stop", "training.max_skipped_steps=2")
    job = run(words, tmp_path / "stop", prepare=(poison, (sum(bad[9:], []), float("nan"))), code=2)
    assert "stops: the 3 steps up to step 11 had gradients that are not finite; the first gradient that is not is that of" in job.said()
    assert "'student.model.embed_tokens.weight'" in job.said() and "It has gone back to a checkpoint before" in job.said()


def test_a_leap_of_the_loss_is_told_of_and_undone_when_asked(place: Path, whole: Any, tmp_path: Path) -> None:
    bad = _batches(place)[21]
    for action, told in (("warn", "the loss leapt to"), ("go_back", "goes back to step 20, and on behind the data at fault: the loss leapt to")):
        words = distill_words(place, tmp_path / action, f"training.on_spike={action}", "training.spike_deviations=8")
        job = run(words, tmp_path / action, prepare=(poison, (bad, 1e4)))
        assert told in job.said() and "at step 22" in job.said(), job.said()
        spikes = [row["step"] for row in read_metrics(tmp_path / action / "student" / "metrics.jsonl") if "loss_spike" in row]
        assert spikes == ([22] if action == "warn" else [])


def test_two_runs_in_one_folder(place: Path, whole: Any, tmp_path: Path) -> None:
    words = distill_words(place, tmp_path / "run")
    job = start(words, tmp_path / "first", prepare=(_slow, ()))
    job.until(lambda: (tmp_path / "run" / ".lock").exists() and _lines(tmp_path / "run") > 1)
    second = run(words, tmp_path / "second", code=2)
    assert f"is in use by process {job.processes[0].pid} on host {identity()['host']} since 20" in second.said()
    job.kill(signal.SIGTERM)
    assert job.wait() == [0]
    run(words, tmp_path / "third")
    assert outcome(tmp_path / "run") == whole


def test_another_host_another_hour_another_place(place: Path, whole: Any, tmp_path: Path) -> None:
    """Killed, its lock left behind; the folder is moved, the machine renamed and its clock set back by an hour."""
    job = start(distill_words(place, tmp_path / "run"), tmp_path / "first", prepare=(_trap, ("minitron.engine.local", "LocalEngine.step", 14, False)))
    assert job.wait() == [-signal.SIGKILL] and (tmp_path / "run" / ".lock").exists()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").rename(tmp_path / "elsewhere" / "moved")
    words = distill_words(place, tmp_path / "elsewhere" / "moved")
    job = run(words, tmp_path / "second", prepare=(several, ((other_host, ("renamed",)),)))
    assert "has not been renewed" in job.said() and "goes on from step 12" in job.said()
    assert outcome(tmp_path / "elsewhere" / "moved") == whole


def test_importance_keeps_the_same_promise(place: Path, tmp_path: Path) -> None:
    data = [f"teacher.path={place / 'teacher'}", f"data.path={place / 'text.jsonl'}", "data.sequence_length=24", "teacher.dtype=float32"]
    words = [
        "importance",
        *data,
        "data.validation_fraction=0.2",
        "importance.num_samples=24",
        "importance.batch_size=2",
        "importance.checkpoint_every=2",
    ]
    run([*words, f"run_dir={tmp_path / 'whole'}"], tmp_path / "whole")
    killed = start(
        [*words, f"run_dir={tmp_path / 'run'}"], tmp_path / "killed", prepare=(_trap, ("minitron.checkpoint.checkpointer", "os.replace", 2, True))
    )
    assert killed.wait() == [-signal.SIGKILL]
    run([*words, f"run_dir={tmp_path / 'run'}"], tmp_path / "last")
    first, second = ((tmp_path / name / "scores" / "scores.safetensors").read_bytes() for name in ("whole", "run"))
    assert first == second


# ----------------------------------------------------------------------------------------------------------------- in this process


def test_a_lock_is_taken_from_the_dead_and_never_from_the_living(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, watch_seconds=0.6)
    lock.acquire()
    with pytest.raises(LaunchError, match=f"in use by process {os.getpid()} on host"):
        RunLock(tmp_path, watch_seconds=0.6).acquire()
    lock.release()
    for owner in ({**identity(), "started": "1"}, {**identity(), "process": 2**22 + 1}, "half a lo"):  # a number used again; no process; torn
        (tmp_path / ".lock").write_text(owner if isinstance(owner, str) else json.dumps(owner))
        other = RunLock(tmp_path, watch_seconds=0.6)
        other.acquire()
        other.release()
    (tmp_path / ".lock").write_text(json.dumps({**identity(), "host": "far-away"}))
    os.utime(tmp_path / ".lock", (time.time() + 1e6,) * 2)  # beats of a clock that is ahead say nothing by their time
    RunLock(tmp_path, watch_seconds=0.6).acquire()
    (tmp_path / ".lock").write_text(json.dumps({**identity(), "host": "far-away"}))
    beating = threading.Timer(0.2, lambda: os.utime(tmp_path / ".lock", (1, 1)))  # a living owner, whose clock is far behind
    beating.start()
    with pytest.raises(LaunchError, match="on host far-away"):
        RunLock(tmp_path, watch_seconds=1.0).acquire()


def test_the_disk_is_asked_before_training_starts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_room(tmp_path / "checkpoints", num_bytes=10**9, keep=2, free=3 * 10**9)
    assert not caplog.records
    check_room(tmp_path / "checkpoints", num_bytes=10**9, keep=2, free=3 * 10**9 - 1)
    assert "2 checkpoints and one being written take 3.0 GB, there is room for 3.0 GB" in caplog.text
    with pytest.raises(CheckpointError, match=r"a checkpoint takes 1.5 GB and .* has room for 1.4 GB"):
        check_room(tmp_path / "checkpoints", num_bytes=10**9, keep=2, others=5 * 10**8, free=14 * 10**8)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "old").write_bytes(b"0" * 1000)
    check_room(tmp_path / "checkpoints", num_bytes=1000, keep=0, free=0)  # what is there will be replaced


def test_goodput_follows_its_formula() -> None:
    found = {number: (predict(number, stall=1.0), predict(number, stall=60.0)) for number in (256, 1024, 4096, 16384)}
    # 419 interruptions of 16,384 GPUs in 54 days; the interval and the loss worked out by hand for 1,024 GPUs.
    mtbf = 54 * 86400 * 16384 / 419 / 1024
    assert found[1024][0].mtbf == pytest.approx(mtbf) and found[1024][0].interval == pytest.approx((2 * mtbf) ** 0.5)
    assert found[1024][0].share == pytest.approx(1 - 2 / (2 * mtbf) ** 0.5 - 300 / mtbf)
    for first, second in found.values():
        for stall, chosen in ((1.0, first), (60.0, second)):  # no other interval does better
            for factor in (0.5, 0.9, 1.1, 2.0):
                assert training_share(interval=factor * chosen.interval, stall=stall, restart=300.0, mtbf=chosen.mtbf) < chosen.share
    assert best_interval(2.0, 100.0) == 20.0 and steps_between(20.0, 3.0) == 7 and steps_between(1.0, 3.0) == 1
    assert predict(16384, stall=1.0, write=1000.0).interval == 1001.0


def test_the_harness_sees_a_job_that_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="there is no command or stage"):
        run(["distil"], tmp_path / "wrong")
    job = start(["distil"], tmp_path / "wrong")
    assert isinstance(job, Job) and job.wait() == [2]
