"""The batch scripts on a real Slurm of two nodes: one process's results, failures with their message, requeues that lose nothing, searches."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_faults import distill_words, make_place, run, start, steps_on_disk
from helpers_models import tiny_llama
from helpers_slurm import ROOT, Cluster, require_slurm

from minitron.tracking.jsonl import read_metrics

#: What jobs find in their environment. On one machine the nodes' names do not resolve.
JOBS = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "SBATCH_GPUS_PER_NODE": "1"}
STEPS = 80


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require_slurm()
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def training(place: Path, run_dir: Path, *more: str, engine: str = "local") -> list[str]:
    """A distillation that lasts long enough to be met at work."""
    return distill_words(place, run_dir, f"training.num_steps={STEPS}", "training.learning_rate=1e-4", *more, engine=engine)[1:]


def curve(run_dir: Path) -> list[tuple[int, float | None, float | None]]:
    return [(row["step"], row.get("loss"), row.get("validation_loss")) for row in read_metrics(run_dir / "student" / "metrics.jsonl")]


@pytest.mark.slow
def test_a_job_that_is_warned_goes_back_and_loses_nothing(cluster: Cluster, place: Path, tmp_path: Path) -> None:
    """Two nodes of one rank each, as many as Slurm gives GPUs; warned in the middle, requeued, and in the end the run of one process."""
    alone = start(["distill", *training(place, tmp_path / "one")], tmp_path / "one")  # first: it may have to load torch, and the job is short
    job = cluster.submit("--nodes=2", "slurm/train.sbatch", *training(place, tmp_path / "run", engine="fsdp"), **JOBS)
    cluster.until(lambda: bool(steps_on_disk(tmp_path / "run")), "the job trains")
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    assert alone.wait() == [0], alone.said()
    assert cluster.wait(job) == "COMPLETED", cluster.said(job)
    said = cluster.said(job)
    assert cluster.show(job, "Restarts") == "1" and said.count("goes back into the queue") == 1 and "distill goes on from step" in said, said
    one, two = curve(tmp_path / "one"), curve(tmp_path / "run")
    assert [row[0] for row in one] == [row[0] for row in two] and one[-1][0] == STEPS
    for alone, together in zip(one, two, strict=True):
        for a, b in zip(alone[1:], together[1:], strict=True):
            assert (a is None) == (b is None) and (a is None or b == pytest.approx(a, rel=1e-4)), alone[0]
    assert {path.name for path in (tmp_path / "run" / "logs").glob("*.log")} == {"rank-00000.log", "rank-00001.log"}


@pytest.mark.slow
def test_a_rank_that_fails_fails_the_job_with_its_message(cluster: Cluster, place: Path, tmp_path: Path) -> None:
    """One rank of two nodes is killed: the job ends with its name, and does not come back."""
    words = training(place, tmp_path / "run", "training.num_steps=4000", engine="fsdp")
    job = cluster.submit("--nodes=2", "slurm/train.sbatch", *words, **JOBS)
    ranks = tmp_path / "run" / ".ranks"
    cluster.until(lambda: bool(steps_on_disk(tmp_path / "run")), "the job trains")
    os.kill(json.loads((ranks / "rank-00001.json").read_text())["process"], signal.SIGKILL)
    assert cluster.wait(job) == "FAILED"
    said = cluster.said(job)
    assert "minitron: rank 1 (process" in said and "Traceback" not in said and cluster.show(job, "Restarts") == "0", said


def search_words(place: Path, run_dir: Path) -> list[str]:
    data = [f"teacher.path={place / 'wide'}", f"data.path={place / 'text.jsonl'}", "data.sequence_length=24", "data.validation_fraction=0.2"]
    cut = ["importance.num_samples=8", "target.ratio=0.7", "target.tolerance=0.15", "search.divisor=8", "search.num_candidates=4"]
    rank = ["ranking.num_steps=200", "ranking.num_validation_sequences=5", "ranking.evaluate_every=20", "ranking.checkpoint_every=10"]
    train = ["training.batch_size=4", "training.micro_batch_size=4", "training.num_steps=1", "training.precision=float32"]
    return [f"run_dir={run_dir}", *data, *cut, *rank, *train, "teacher.dtype=float32"]


def ranking(run_dir: Path) -> list[tuple[str, float, int]]:
    rows: list[dict[str, Any]] = json.loads((run_dir / "ranking" / "ranking.json").read_text())["candidates"]
    return [(row["name"], row["loss"], row["steps"]) for row in rows]


@pytest.mark.slow
def test_a_search_over_jobs_ranks_as_one_process(cluster: Cluster, place: Path, tmp_path: Path) -> None:
    """One task of the array is warned and requeued while the ranking waits for it; a share that is missing is named."""
    tiny_llama(place / "wide", layers=4, tied=True)
    words = search_words(place, tmp_path / "run")
    told = cluster.run("bash", "slurm/search.sh", *words, NUM_TASKS="2", **JOBS)
    candidates, tasks, ranks = (word.rstrip(",") for word in told.split()[2::2])
    partial = tmp_path / "run" / "ranking.tasks" / "1-of-2.partial"
    cluster.until(lambda: any(partial.rglob("step-*")), "a task trains", 120)
    cluster.run("scancel", "--signal=USR1", "--batch", f"{tasks}_1")
    cluster.until(lambda: cluster.show(f"{tasks}_1", "JobState") == "PENDING", "the task is back in the queue")
    cluster.until(lambda: cluster.show(f"{tasks}_0", "JobState") == "COMPLETED", "the other task is done")
    assert (cluster.show(ranks, "JobState"), cluster.show(ranks, "Reason")) == ("PENDING", "Dependency")
    shutil.copytree(tmp_path / "run", tmp_path / "short")
    assert cluster.wait(f"{tasks}_1") == "COMPLETED" and cluster.wait(ranks) == "COMPLETED"
    assert cluster.show(candidates, "JobState") == "COMPLETED"
    results = json.loads((tmp_path / "run" / "ranking" / "manifest.json").read_text())["results"]
    assert results["teacher_forwards"] == 0, "the ranking job trains nothing"
    alone = tmp_path / "alone"
    for folder in ("scores", "candidates"):
        shutil.copytree(tmp_path / "run" / folder, alone / folder)
    run(["rank", *search_words(place, alone)], tmp_path / "log")
    assert ranking(tmp_path / "run") == ranking(alone)
    short = run(["rank", *search_words(place, tmp_path / "short"), "ranking.from_tasks=true"], tmp_path / "short-log", code=2).said()
    second = [json.loads(line)["name"] for line in (alone / "candidates" / "candidates.jsonl").read_text().splitlines()][1::2]
    assert f"minitron: {', '.join(second)} have not come to step 200" in short


VARIABLES = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_SUBMIT_DIR": str(ROOT)}


@pytest.mark.parametrize(
    ("variables", "words", "sentence"),
    [
        ({}, ["run_dir=x"], "SLURM_SUBMIT_DIR: is not set: submit this script with sbatch"),
        ({**VARIABLES, "SLURM_JOB_NODELIST": ""}, ["run_dir=x"], "slurm: SLURM_JOB_NODELIST is not set: submit this script with sbatch"),
        ({**VARIABLES, "SLURM_NNODES": "3"}, ["run_dir=x"], "slurm: SLURM_NNODES=3, but SLURM_JOB_NODELIST=n[1-2] names 2"),
        ({**VARIABLES, "SLURM_NTASKS": "16"}, ["run_dir=x"], "slurm: 16 tasks on 2 nodes: each node's one task starts its ranks"),
        (VARIABLES, ["training.num_steps=3"], "slurm: give run_dir=FOLDER or experiment=NAME"),
    ],
)
def test_variables_that_are_missing_or_contradict_each_other(variables: dict[str, str], words: list[str], sentence: str, tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'n1\\nn2\\n'\n")
    (tmp_path / "scontrol").chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment = {**kept, **variables, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(ROOT / "slurm" / "train.sbatch"), *words], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr
