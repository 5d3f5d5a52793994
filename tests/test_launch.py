"""The launchers for real: two processes give the scores and losses of one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_models import tiny_llama
from helpers_text import write_jsonl
from safetensors.torch import load_file

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
