"""The launchers for real: two processes give the scores and losses of one; what fails says so in its last line; ports, nodes and logs."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_models import tiny_llama
from helpers_text import write_jsonl
from safetensors.torch import load_file

from minitron.finished import finished
from minitron.tracking.jsonl import read_metrics

LAUNCH = Path(__file__).resolve().parent.parent / "launch"


def options(place: Path, run: str) -> list[str]:
    """A run of six steps, all in float32."""
    data = [f"teacher.path={place / 'teacher'}", f"data.path={place / 'text.jsonl'}", "data.sequence_length=24", "data.validation_fraction=0.2"]
    cut = ["importance.num_samples=8", "importance.batch_size=2", "target=explicit", "target.ffn_size=32", "target.num_layers=3"]
    train = ["training.num_steps=6", "training.batch_size=4", "training.micro_batch_size=1", "training.learning_rate=1e-3"]
    train += ["training.num_validation_sequences=3", "evaluate.num_sequences=5", "training.precision=float32", "teacher.dtype=float32"]
    return [f"run_dir={place / run}", *data, *cut, *train]


def launch(command: list[str], **extra: str) -> None:
    """Run a command to its end; its output is shown when it fails."""
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **extra}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a corpus, and the run of one process."""
    folder = tmp_path_factory.mktemp("launch")
    tiny_llama(folder / "teacher", layers=4)
    write_jsonl(folder / "text.jsonl", num_documents=60)
    launch([sys.executable, str(LAUNCH / "run.py"), "compress", *options(folder, "one")])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "engine"),
    [
        ("torchrun.sh", ["engine=fsdp"]),
        ("torchrun.sh", ["engine=deepspeed", "engine.zero_stage=3", "teacher.placement=shard"]),
        ("deepspeed.sh", ["engine=deepspeed", "engine.zero_stage=2"]),
    ],
    ids=["torchrun-fsdp", "torchrun-zero3", "deepspeed-zero2"],
)
def test_two_processes_equal_one(place: Path, script: str, engine: list[str]) -> None:
    if "deepspeed" in engine[0]:
        pytest.importorskip("deepspeed")
    shutil.rmtree(place / "two", ignore_errors=True)
    launch(["bash", str(LAUNCH / script), "compress", *options(place, "two"), *engine], NPROC_PER_NODE="2", MASTER_PORT="29731")
    alone, together = (load_file(str(place / run / "scores" / "scores.safetensors")) for run in ("one", "two"))
    assert alone.keys() == together.keys()
    for name, scores in alone.items():
        assert float((scores - together[name]).abs().max() / scores.abs().max()) < 1e-6, name
    first, second = (read_metrics(place / run / "student" / "metrics.jsonl") for run in ("one", "two"))
    assert [row["step"] for row in first] == [row["step"] for row in second] and len(first) >= 8
    for one, two in zip(first, second, strict=True):
        for key in one.keys() & {"loss", "validation_loss", "validation_kl"}:
            assert two[key] == pytest.approx(one[key], rel=1e-4), (one["step"], key)
    assert (place / "two" / "export" / "model.safetensors").stat().st_size == (place / "one" / "export" / "model.safetensors").stat().st_size


def attempt(command: list[str], **extra: str) -> subprocess.CompletedProcess[str]:
    """A command that may fail."""
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **extra}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


WRONG = ["data=python_docs", "engine=fsdp", "training.num_steps=1", "teacher.path=/nowhere"]


@pytest.mark.slow
def test_bad_input_is_one_sentence_whatever_the_number_of_ranks(tmp_path: Path) -> None:
    done = attempt(["bash", str(LAUNCH / "torchrun.sh"), "distill", *WRONG, f"run_dir={tmp_path}"], NPROC_PER_NODE="2")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "minitron: teacher.path=/nowhere does not exist\n")
    assert [path.read_text() for path in sorted((tmp_path / "logs").glob("*.log"))] == [done.stderr] * 2


#: Stands for run.py: the first rank to fail is not rank 0, which is told of it a moment later.
RANK = """
import os, signal, sys, time, traceback
from pathlib import Path
from minitron import dist, log
log.setup(); log.to_files(Path(os.environ["MINITRON_LOGS"]))
print("rank", dist.rank(), "was here", flush=True)
if dist.rank() == 0:
    time.sleep(60)
if "kill" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    raise RuntimeError("the cause")
except RuntimeError:
    log.tell_error(traceback.format_exc(), sentence=False)
    sys.exit(1)
"""


@pytest.mark.slow
def test_the_first_error_is_the_last_thing_shown(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    launcher = [sys.executable, "-c", "import sys; from minitron.launcher import main; sys.exit(main(sys.argv[1:]))"]
    command = [*launcher, "torchrun", "--standalone", "--nproc-per-node", "2", str(tmp_path / "rank.py")]
    logs = tmp_path / "logs"
    done = attempt(command, MINITRON_LOGS=str(logs), TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1")
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and lines[0] == f"minitron: rank 1 failed first; its log is {logs / 'rank-00001.log'}", done.stderr
    assert lines[1] == "Traceback (most recent call last):" and lines[-1] == "RuntimeError: the cause" and len(lines) == 5, done.stderr
    assert done.stdout == "rank 0 was here\n" and "rank 1 was here" in (logs / "rank-00001.log").read_text()
    done = attempt([*command, "kill"], MINITRON_LOGS=str(logs), TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1")
    assert done.returncode == 137 and done.stderr.count("\n") == 1, "the error of the run before is forgotten"
    assert done.stderr.startswith("minitron: rank 1 (process ") and "was ended by SIGKILL (the system does so when memory is short)" in done.stderr


@pytest.mark.slow
def test_a_rendezvous_that_cannot_be_reached_names_its_address(tmp_path: Path) -> None:
    with socket.socket() as probe:  # bound, but nobody listens
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        words = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RENDEZVOUS_TIMEOUT": "1"}
        done = attempt(["bash", str(LAUNCH / "torchrun.sh"), "distill", f"run_dir={tmp_path}"], **words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"minitron: node 1 of 2 cannot meet the others at 127.0.0.1:{port}, the address of node 0: " in done.stderr


NODES = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("script", "extra", "sentence"),
    [
        ("torchrun.sh", {"NNODES": "2"}, "NODE_RANK is not set, and NNODES=2 nodes need it"),
        ("torchrun.sh", {"NNODES": "2", "NODE_RANK": "1"}, "MASTER_ADDR is not set, and NNODES=2 nodes need it"),
        ("torchrun.sh", {**NODES, "NODE_RANK": "2"}, "NODE_RANK=2 does not exist: 2 nodes have the numbers 0 to 1"),
        ("torchrun.sh", {**NODES, "MASTER_PORT": "TAKEN"}, "port TAKEN of 127.0.0.1, this node, is taken: give every node another MASTER_PORT"),
        ("torchrun.sh", {"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE=two is no number of processes"),
        ("deepspeed.sh", {"NPROC_PER_NODE": "3", "CUDA_VISIBLE_DEVICES": "0,1"}, "NPROC_PER_NODE=3, but this node has 2 GPUs"),
        ("deepspeed.sh", {"HOSTFILE": "/nowhere"}, "HOSTFILE=/nowhere cannot be read"),
        ("deepspeed.sh", {"HOSTFILE": "HOSTS"}, "HOSTFILE=HOSTS has lines that are not of the form 'name slots=8'"),
    ],
)
def test_settings_of_the_launchers_that_cannot_be(script: str, extra: dict[str, str], sentence: str, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# two nodes\nn1 slots=8\nn2 8\n")
    with socket.create_server(("", 0)) as taken:
        real = {"TAKEN": str(taken.getsockname()[1]), "HOSTS": str(hosts)}
        for name, value in real.items():
            extra, sentence = {key: old.replace(name, value) for key, old in extra.items()}, sentence.replace(name, value)
        done = attempt(["bash", str(LAUNCH / script), "distill", f"run_dir={tmp_path}"], **{"CUDA_VISIBLE_DEVICES": "", **extra})
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_taken_port_gives_way_to_the_next() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        found = attempt(["bash", "-c", 'source "$0/environment.sh" && free_port "$PYTHON" "$1"', str(LAUNCH), str(port)])
    assert found.returncode == 0 and port < int(found.stdout) <= port + 100


#: Stand for ssh and pdsh: every node is this machine; %n is the number of the node, as pdsh counts them.
SSH, PDSH = (
    "#!/bin/sh\nexit 0\n",
    """#!/bin/bash
while [[ "$1" != -w ]]; do shift; done
IFS=, read -r -a nodes <<<"$2"; shift 2
echo "nodes ${nodes[*]}"
for number in "${!nodes[@]}"; do bash -c "${*//%n/$number}" & done
code=0; for job in $(jobs -p); do wait "$job" || code=$?; done; exit "$code"
""",
)


@pytest.mark.slow
def test_deepspeed_reaches_the_nodes_of_a_hostfile(tmp_path: Path) -> None:
    """Two nodes of one rank each, with the settings and the user's folder: both ranks write their logs there, and the error is shown last."""
    pytest.importorskip("deepspeed")
    for name, text in (("ssh", SSH), ("pdsh", PDSH)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    extra = {"HOSTFILE": str(tmp_path / "hosts"), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29741", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = attempt(["bash", str(LAUNCH / "deepspeed.sh"), "distill", *WRONG, f"run_dir={tmp_path / 'run'}"], **extra)
    sentence = "minitron: teacher.path=/nowhere does not exist\n"
    assert done.returncode == 2 and "nodes one two" in done.stdout and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr
    errors = [json.loads(path.read_text()) for path in sorted((tmp_path / "run" / "logs").glob("*.error"))]
    assert [(error["rank"], error["text"]) for error in errors] == [(0, sentence), (1, sentence)]


def test_a_stage_at_work_is_not_finished(tmp_path: Path) -> None:
    """Not by what stands from before, and not by another stage's completeness; a stage's own folder answers for itself."""
    (tmp_path / "run.json").write_text(json.dumps({"stages": ["prune", "distill"], "folders": {"prune": "pruned", "distill": "student"}}))
    for folder in ("pruned/a", "student"):
        assert not finished(tmp_path)
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "manifest.json").write_text("{}")
    assert finished(tmp_path) and finished(tmp_path, "prune") and finished(tmp_path / "student") and not finished(tmp_path / "pruned")
    for folder, stage, other in (("student.partial", "distill", "prune"), ("pruned/b.partial", "prune", "distill")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / ".begun.json").write_text("{}")
        assert not finished(tmp_path) and not finished(tmp_path, stage) and finished(tmp_path, other)
        shutil.rmtree(tmp_path / folder)
