"""Speed, memory and traces of a training: figures against a clock and a count of one's own, and nobody waits between log lines."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_models import tiny_llama
from helpers_text import write_jsonl
from torch.utils.flop_counter import FlopCounterMode

from minitron import dist
from minitron.cli import main
from minitron.core.cost import DEVICES
from minitron.distill import loop
from minitron.distill.hooks import log_hook
from minitron.distill.loop import StepReport
from minitron.distill.pace import MEASURED, Pace, device_peak
from minitron.distill.profile import Profiler, check_profile
from minitron.errors import ConfigError
from minitron.log import Progress
from minitron.tracking.jsonl import read_metrics


def report(step: int, *, seconds: float, tokens: int = 100, waited: float = 0.0) -> StepReport:
    return StepReport(step, step * tokens, 1e-3, torch.tensor(1.0), seconds, tokens, waited, {"loss": torch.tensor(2.0)})


class Sink:
    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def log(self, step: int, metrics: Any) -> None:
        self.rows[step] = dict(metrics)

    def close(self) -> None: ...


def test_rates_are_those_of_all_steps_since_the_last_line_and_of_the_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("minitron.distill.pace.time.perf_counter", lambda: clock[0])
    reads: list[int] = []
    read = StepReport.read

    def waits(self: StepReport) -> dict[str, float]:
        reads.append(self.step)
        clock[0] += 6.0  # the device is behind its host
        return read(self)

    monkeypatch.setattr(StepReport, "read", waits)
    sink, pace = Sink(), Pace(lambda step: 1e6 * step, peak=1e9)
    hook = log_hook(sink, Progress("t", total=9), pace, every=3, num_steps=4)
    for step in range(1, 5):
        hook(report(step, seconds=1.0))
    assert reads == [3, 4]  # nobody asked the device in between
    assert sink.rows[3]["tokens_per_second"] == pytest.approx(300 / 9.0) and sink.rows[4]["tokens_per_second"] == pytest.approx(100 / 7.0)
    assert sink.rows[3]["model_flops_per_second"] == pytest.approx(100 * 1e6 * (1 + 2 + 3) / 9.0)
    assert sink.rows[3]["mfu"] == pytest.approx(sink.rows[3]["model_flops_per_second"] / 1e9)
    assert sink.rows[3]["peak_memory_bytes"] > 1e7


def test_the_peak_is_that_of_the_named_device() -> None:
    assert device_peak("NVIDIA H100 80GB HBM3") == DEVICES["h100"].flops and device_peak("NVIDIA GeForce RTX 4090") == DEVICES["rtx4090"].flops
    assert device_peak("NVIDIA H200") == DEVICES["h200"].flops and device_peak("Some GPU") is None


def test_the_rank_that_others_wait_for_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: 4)
    monkeypatch.setattr(dist, "all_reduce_sum", lambda told: told + torch.tensor([0.0, 0.0, 0.1, 0.2, 5.5])[: len(told)])
    with caplog.at_level(logging.WARNING, logger="minitron"):
        assert report(7, seconds=1.0, waited=0.1).read()["data_seconds"] == pytest.approx(5.5)
    (line,) = caplog.messages
    assert "step 7: rank 3 waited 5.5 s for its text, most ranks 0.1 s" in line
    caplog.clear()
    loop._name_slow_rank(8, [0.1, 1.9, 0.1])
    loop._name_slow_rank(8, [9.0])
    assert not caplog.messages


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short distillation whose steps 2 and 3 are traced."""
    place = tmp_path_factory.mktemp("pace")
    tiny_llama(place / "teacher", layers=2)
    tiny_llama(place / "student", layers=1, seed=1)
    write_jsonl(place / "text.jsonl", num_documents=40)
    words = [
        f"run_dir={place / 'run'}",
        f"teacher.path={place / 'teacher'}",
        f"student.path={place / 'student'}",
        f"data.path={place / 'text.jsonl'}",
    ]
    words += ["data.sequence_length=24", "teacher.dtype=float32", "training.precision=float32", "training.num_steps=4", "training.batch_size=2"]
    words += ["training.num_validation_sequences=1", "training.checkpoint_every=0", "training.profile=[2,3]"]
    assert main(["distill", *words]) == 0
    return place


def test_lines_of_a_run_hold_the_promised_names(traced: Path) -> None:
    rows = [row for row in read_metrics(traced / "run" / "student" / "metrics.jsonl") if "loss" in row]
    wanted = {"step", "tokens", "loss", "forward_kl", "learning_rate", "gradient_norm", "skipped_steps", *MEASURED} - {"mfu"}  # no GPU, no peak
    assert len(rows) == 4 and all(set(row) - {"mfu"} == wanted for row in rows)
    validation = [row for row in read_metrics(traced / "run" / "student" / "metrics.jsonl") if "validation_loss" in row]
    assert all({"validation_loss", "validation_kl", "validation_agreement"} <= set(row) for row in validation)


def test_model_flops_are_those_that_torch_counts(traced: Path) -> None:
    """Forward and backward of the student and a forward of the teacher, counted by torch on plain models."""
    from transformers import AutoModelForCausalLM

    ids = torch.arange(48).reshape(2, 24)
    counted = 0.0
    for name in ("teacher", "student"):
        model = AutoModelForCausalLM.from_pretrained(traced / name, attn_implementation="eager")
        with FlopCounterMode(display=False) as counter:
            logits = model(input_ids=ids).logits
            if name == "student":
                logits.sum().backward()
        counted += counter.get_total_flops()
    row = next(row for row in read_metrics(traced / "run" / "student" / "metrics.jsonl") if "loss" in row)
    per_token = row["model_flops_per_second"] / row["tokens_per_second"]
    # torch counts the whole attention square where we count its causal half, and no gradient of the first layer's input products
    assert per_token == pytest.approx(counted / ids.numel(), rel=0.1)


def test_the_trace_holds_the_steps_asked_for(traced: Path) -> None:
    (path,) = (traced / "run" / "student" / "profile").iterdir()
    assert path.name == "steps-2-3.json.gz"
    with gzip.open(path, "rt") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert any(name.startswith("aten::") for name in names)
    optimiser = sum(name.startswith("Optimizer.step#") for name in names)
    assert optimiser == 2


@pytest.mark.parametrize(
    ("start", "stop", "file"), [(0, 9, "steps-3-5.json.gz"), (3, 9, "steps-4-5.json.gz"), (0, 4, "steps-3-4.json.gz"), (5, 9, None)]
)
def test_a_range_is_traced_as_far_as_it_is_taken(tmp_path: Path, start: int, stop: int, file: str | None) -> None:
    profiler = Profiler(tmp_path, [3, 5], step=start)
    for step in range(start + 1, stop + 1):
        torch.ones(2) + 1
        profiler.hook(report(step, seconds=0.1))
    profiler.close()
    assert [path.name for path in (tmp_path / "profile").glob("*")] == ([file] if file else [])


@pytest.mark.parametrize("steps", [[3], [0, 2], [5, 4], [1, 2, 3]])
def test_a_range_that_is_none_is_refused(steps: list[int]) -> None:
    with pytest.raises(ConfigError, match="is no range of steps: give the first and the last one"):
        check_profile(steps)
