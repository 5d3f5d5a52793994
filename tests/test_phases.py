"""Phases of a training: their arithmetic, the identical batches after a restart, one stream of text through them all, and what is refused."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_models import tiny_llama, tiny_model
from helpers_ranks import run_ranks
from helpers_text import tiny_tokenizer, write_jsonl
from safetensors.torch import load_file

from minitron import dist
from minitron.checks import check_config
from minitron.cli import compose, main
from minitron.config import build_config
from minitron.data import DataConfig, GlobalBatches, Text, data_fingerprint, open_text
from minitron.distill.losses import LossConfig
from minitron.distill.pace import MEASURED
from minitron.distill.phases import PhasedBatches, phase_at, phase_table
from minitron.distill.settings import TrainingConfig, later_blends
from minitron.distill.training import TrainingResult, TrainingRun
from minitron.engine import EngineConfig
from minitron.errors import CheckpointError, ConfigError, Interrupted
from minitron.tracking import CompositeTracker, build_trackers
from minitron.tracking.jsonl import read_metrics, truncate_after

LENGTH, BATCH = 16, 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phases")
    for name, first in {"a": 0, "b": 1000, "c": 2000}.items():
        write_jsonl(folder / f"{name}.jsonl", num_documents=40, first=first)
    tiny_llama(folder / "teacher", seed=1)
    tiny_llama(folder / "student", layers=2, hidden=32, ffn=40, heads=4, seed=2)
    return folder


def data_of(place: Path) -> DataConfig:
    return DataConfig(path=str(place / "a.jsonl"), sequence_length=LENGTH, validation_fraction=0.2)


def training_of(place: Path, **more: Any) -> TrainingConfig:
    """Three phases over ten steps: 256 tokens of a; then a and b, 32 long; then c with twice the batch."""
    blend = {"sources": [{"path": str(place / "a.jsonl"), "weight": 1}, {"path": str(place / "b.jsonl"), "weight": 3}]}
    phases = [{"at_tokens": 200, "data": blend, "sequence_length": 32}, {"at_tokens": 600, "data": {"path": str(place / "c.jsonl")}, "batch_size": 8}]
    settings: dict[str, Any] = {"num_steps": 10, "batch_size": BATCH, "micro_batch_size": 2, "learning_rate": 1e-3, "phases": phases}
    return TrainingConfig(**settings | {"num_validation_sequences": 4, "precision": "float32", "checkpoint_every": 2} | more)


def text_of(place: Path, training: TrainingConfig) -> Text:
    return open_text(data_of(place), tiny_tokenizer(), seed=3, later=later_blends(training, data_of(place)))


# ---------------------------------------------------------------------------------------------------------------- arithmetic


def walked(phases: list[dict[str, Any]], num_steps: int | None, num_tokens: float | None) -> list[tuple[int, int]]:
    """Batch and length of every step, one step after another."""
    shape, steps, drawn, left = {"batch_size": BATCH, "sequence_length": LENGTH}, [], 0, list(phases)
    while len(steps) < num_steps if num_steps is not None else drawn < (num_tokens or 0):
        while left and drawn >= left[0]["at_tokens"]:
            shape |= {key: value for key, value in left.pop(0).items() if key in shape}
        steps.append((shape["batch_size"], shape["sequence_length"]))
        drawn += shape["batch_size"] * shape["sequence_length"]
    return steps


@pytest.mark.parametrize(("num_steps", "num_tokens"), [(30, None), (None, 5000.0), (None, 4097.0)])
@pytest.mark.parametrize("at", [(64, 640), (65, 641), (1, 1500), (999, 2001)])
def test_steps_and_tokens_are_those_of_a_walk(at: tuple[int, int], num_steps: int | None, num_tokens: float | None) -> None:
    phases = [{"at_tokens": at[0], "sequence_length": 48}, {"at_tokens": at[1], "batch_size": 6, "sequence_length": 10}]
    expected = walked(phases, num_steps, num_tokens)
    table = phase_table(phases, batch_size=BATCH, sequence_length=LENGTH, num_steps=num_steps, num_tokens=num_tokens)
    assert [shape for phase in table for shape in [(phase.batch_size, phase.sequence_length)] * phase.num_steps] == expected
    settings = TrainingConfig(num_steps=num_steps, num_tokens=num_tokens, batch_size=BATCH, phases=phases)
    assert settings.steps(LENGTH) == len(expected) and settings.tokens(LENGTH) == sum(a * b for a, b in expected)
    changes = [number for number, (a, b) in enumerate(itertools.pairwise(expected), 2) if a != b]
    assert [step for step in range(2, len(expected) + 1) if phase_at(table, step) != phase_at(table, step - 1)] == changes


def test_without_phases_a_budget_is_what_it_was() -> None:
    assert TrainingConfig(num_tokens=1000, batch_size=4).steps(16) == 16 and TrainingConfig(num_tokens=1, batch_size=4).steps(16) == 1
    assert TrainingConfig(num_steps=7, num_tokens=1e9).steps(16) == 7


@pytest.mark.parametrize(
    ("phases", "sentence"),
    [
        (
            [{"at_tokens": 200, "batch_size": 2}, {"at_tokens": 200, "batch_size": 4}],
            r"phases\[1\].at_tokens=200 must be a number of tokens above 200",
        ),
        ([{"at_tokens": 0, "batch_size": 2}], "at_tokens=0 must be a number of tokens above 0"),
        ([{"batch_size": 2}], "at_tokens=None must be a number"),
        ([{"at_tokens": 10}], r"phases\[0\] changes nothing"),
        ([{"at_tokens": 10, "sequence_lenght": 2}], "has no key 'sequence_lenght'; did you mean 'sequence_length'"),
        ([{"at_tokens": 10, "batch_size": 2.5}], "batch_size=2.5 must be a whole number"),
        ([{"at_tokens": 10, "data": "b.jsonl"}], "data='b.jsonl' is no mapping"),
        ([{"at_tokens": 10_000, "batch_size": 2}], r"phases\[0\] would begin at step 157 with 10048 tokens drawn, .* before the budget of 9 steps"),
        ([{"at_tokens": 10, "batch_size": 2}, {"at_tokens": 40, "batch_size": 4}], r"leaves no step before the next phase at 40 tokens"),
        ([{"at_tokens": 10, "data": {"pth": "b"}}], r"training.phases\[0\].data has no key 'pth'"),
        ([{"at_tokens": 10, "data": {"path": 3}}], r"training.phases\[0\].data.path=3 is not of type str"),
        ([{"at_tokens": 10, "data": {"split": "train"}}], r"training.phases\[0\].data needs a source of text"),
        ([{"at_tokens": 10, "data": {"sources": [{"path": "b", "weight": 0}]}}], r"training.phases\[0\].data.sources\[0\].weight=0"),
    ],
)
def test_phases_that_cannot_work_are_refused(phases: list[dict[str, Any]], sentence: str) -> None:
    training = TrainingConfig(num_steps=9, batch_size=BATCH, phases=phases)
    with pytest.raises(ConfigError, match=sentence):
        training.check()
        training.phase_table(LENGTH)
        later_blends(training, DataConfig(path="a"))


# ---------------------------------------------------------------------------------------------------------------- batches


def phased(place: Path, *, rank: int = 0, world_size: int = 1) -> PhasedBatches:
    training = training_of(place)
    text, table = text_of(place, training), training.phase_table(LENGTH)
    parts = [
        GlobalBatches(
            text.stream(blend=number, sequence_length=phase.sequence_length),
            batch_size=phase.batch_size,
            micro_batch_size=2,
            rank=rank,
            world_size=world_size,
        )
        for number, phase in enumerate(table)
    ]
    return PhasedBatches(table, parts)


def ids(batches: PhasedBatches) -> torch.Tensor:
    return torch.cat([batch["input_ids"] for batch in batches.next()])


def test_a_restart_inside_any_phase_goes_on_with_the_same_batches(place: Path) -> None:
    batches, states, expected = phased(place), [], []
    for _ in range(10):
        states.append(json.loads(json.dumps(batches.state_dict())))
        expected.append(ids(batches))
    assert [tuple(batch.shape) for batch in expected] == [(4, 16)] * 4 + [(4, 32)] * 3 + [(8, 32)] * 3
    for step, state in enumerate(states):
        again = phased(place)
        again.load_state_dict(state)
        assert all(torch.equal(ids(again), batch) for batch in expected[step:])
    shares = [phased(place, rank=rank, world_size=2) for rank in range(2)]
    for batch in expected:
        assert torch.equal(torch.cat([ids(share) for share in shares]), batch)


def test_phase_zero_is_what_it_would_be_alone_and_sources_go_on_where_they_stood(place: Path) -> None:
    """The tokens of each source, over all phases, are those of a stream of that source by itself: nothing repeated, nothing left out."""
    batches, tokenizer = phased(place), tiny_tokenizer()
    alone = open_text(data_of(place), tokenizer, seed=3).stream()
    first = torch.cat([ids(batches) for _ in range(4)])
    assert torch.equal(first, torch.stack([alone.next() for _ in range(16)]))
    second = torch.cat([ids(batches) for _ in range(3)])
    carried = open_text(data_of(place), tokenizer, seed=3).stream(sequence_length=32)
    carried.load_state_dict(alone.state_dict())
    wanted, found = carried.next(), 0
    for row in second:
        if torch.equal(row, wanted):
            wanted, found = carried.next(), found + 1
    assert 1 <= found <= 8  # a quarter of twelve sequences, in a's own order and from where phase 0 stopped
    documents = tokenizer.batch_decode(torch.cat([ids(batches) for _ in range(3)]))
    numbers = [int(number) for text in documents for number in re.findall(r"document (\d{4}):", text)]
    assert numbers and all(number >= 2000 for number in numbers)


def test_the_fingerprint_follows_the_later_text(place: Path) -> None:
    training = training_of(place)
    later = later_blends(training, data_of(place))
    own, both = data_fingerprint(data_of(place)), data_fingerprint(data_of(place), later=later)
    assert own != both == data_fingerprint(data_of(place), later=list(later))
    assert data_fingerprint(data_of(place), later=later[:1]) not in (own, both)


# ---------------------------------------------------------------------------------------------------------------- training


def run_of(
    place: Path, folder: Path, training: TrainingConfig, *, stop: Callable[[], bool] = lambda: False, engine: EngineConfig | None = None
) -> TrainingResult:
    text = text_of(place, training)
    rows = list(itertools.islice(text.stream(split="validation").first_epoch(), 4))

    def tracker(step: int) -> Any:
        if not dist.is_main():
            return CompositeTracker([])
        truncate_after(folder / "metrics.jsonl", step if step > 0 else -1)
        return build_trackers({"jsonl": {}}, folder=folder, run_name="x", group="x", config={})

    return TrainingRun(
        student=tiny_model(place / "student"),
        teacher=tiny_model(place / "teacher"),
        stream=text.stream(),
        later_stream=lambda number: text.stream(blend=number, sequence_length=training.phase_table(LENGTH)[number].sequence_length),
        validation=torch.stack(rows),
        sequence_length=LENGTH,
        training=training,
        loss=LossConfig(),
        engine=engine or EngineConfig(),
        blocks_of=lambda model: list(model.model.layers),
        open_tracker=tracker,
        what="distill",
        folder=folder,
        stop=stop,
    ).run()


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in read_metrics(folder / "metrics.jsonl")]


def stop_after(number: int) -> Callable[[], bool]:
    """Asks for a stop after so many steps."""
    calls = itertools.count(1)
    return lambda: next(calls) == number


def test_a_training_stopped_in_each_phase_ends_as_if_it_had_not_been(place: Path, tmp_path: Path) -> None:
    training = training_of(place)
    whole = run_of(place, tmp_path / "whole", training)
    for steps in (2, 4, 2):  # at steps 2, 6 and 8
        with pytest.raises(Interrupted):
            run_of(place, tmp_path / "parts", training, stop=stop_after(steps))
    done = run_of(place, tmp_path / "parts", training)
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    assert all(torch.equal(a[1], b[1]) for a, b in zip(done.student_weights(), whole.student_weights(), strict=True))
    steps_of = [row for row in rows_of(tmp_path / "whole") if "loss" in row]
    assert [row["phase"] for row in steps_of] == [0] * 4 + [1] * 3 + [2] * 3
    assert [row["tokens"] for row in steps_of] == list(itertools.accumulate([4 * 15] * 4 + [4 * 31] * 3 + [8 * 31] * 3))


# ---------------------------------------------------------------------------------------------------------------- the best weights


def best_of(place: Path, **more: Any) -> TrainingConfig:
    """A rate that rises without end ruins the student after a while."""
    settings = {"phases": None, "num_steps": 10, "num_warmup_steps": 10, "learning_rate": 0.3, "evaluate_every": 1, "keep_best": True}
    return training_of(place, **settings | more)


def divergence(place: Path, weights: dict[str, torch.Tensor]) -> float:
    """KL from the teacher on the held-out sequences, in float64."""
    student, teacher = tiny_model(place / "student"), tiny_model(place / "teacher")
    student.load_state_dict(weights)
    rows = torch.stack(list(itertools.islice(text_of(place, best_of(place)).stream(split="validation").first_epoch(), 4)))
    with torch.no_grad():
        q, p = (model(rows).logits[:, :-1].double().log_softmax(-1) for model in (student, teacher))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_the_best_weights_are_those_of_the_best_validation(place: Path, tmp_path: Path) -> None:
    training = best_of(place)
    whole = run_of(place, tmp_path / "whole", training)
    validations = {row["step"]: row["validation_kl"] for row in rows_of(tmp_path / "whole") if row.get("validation_kl") and row["step"] > 0}
    best = min(validations, key=validations.__getitem__)
    assert whole.best is not None and whole.best.step == best < 10 and validations[10] > 1.1 * validations[best]
    whole.best.copy_to(tmp_path / "best")
    assert divergence(place, load_file(tmp_path / "best" / "model.safetensors")) == pytest.approx(validations[best], rel=1e-4)
    assert divergence(place, dict(whole.student_weights())) == pytest.approx(validations[10], rel=1e-4)


def test_the_best_weights_outlive_stops_and_only_named_ones_stay(place: Path, tmp_path: Path) -> None:
    training = best_of(place)
    whole = run_of(place, tmp_path / "whole", training)
    assert whole.best is not None and whole.best.step is not None
    checkpoints = tmp_path / "parts" / "checkpoints"
    for steps in (2, 4):  # stops at steps 2 and 6
        with pytest.raises(Interrupted):
            run_of(place, tmp_path / "parts", training, stop=stop_after(steps))
        named = {json.loads(path.read_text())["best"]["step"] for path in checkpoints.glob("step-*/state.json")}
        assert {path.name for path in checkpoints.glob("best-*")} == {f"best-{step}" for step in named}
    parts = run_of(place, tmp_path / "parts", training)
    assert parts.best is not None and parts.best.state_dict() == whole.best.state_dict()
    for name, result in {"one": whole, "two": parts}.items():
        assert result.best is not None
        result.best.copy_to(tmp_path / name)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_best_weights_that_are_gone_are_missed(place: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run_of(place, tmp_path, best_of(place), stop=stop_after(2))
    for folder in (tmp_path / "checkpoints").glob("best-*"):
        shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="best-., the best weights so far, is gone: remove"):
        run_of(place, tmp_path, best_of(place))


def kept_by_ranks(place: Path, folder: Path, engine: str) -> tuple[int | None, dict[str, torch.Tensor]]:
    """Best step and weights of a sharded training; rank 0 reads the file."""
    training = best_of(place, num_steps=3)
    result = run_of(place, folder, training, engine=EngineConfig(name=engine, zero_stage=3))
    assert result.best is not None
    result.best.copy_to(folder / "best")
    return result.best.step, load_file(folder / "best" / "model.safetensors") if dist.is_main() else {}


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_sharded_weights_are_kept_whole(place: Path, tmp_path: Path, engine: str) -> None:
    (step, weights), (other, _) = run_ranks(kept_by_ranks, 2, place, tmp_path, engine)
    metrics = {row["step"]: row["validation_kl"] for row in rows_of(tmp_path) if row.get("validation_kl")}
    assert step == other and divergence(place, weights) == pytest.approx(metrics[step], rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------- from the command line


def words(place: Path, run: Path, *more: str) -> list[str]:
    """A small distillation of the student."""
    found = [f"run_dir={run}", f"teacher.path={place / 'teacher'}", f"student.path={place / 'student'}", f"data.path={place / 'a.jsonl'}"]
    found += [f"data.sequence_length={LENGTH}", "data.validation_fraction=0.2", "teacher.dtype=float32", "training.precision=float32"]
    return [*found, "training.batch_size=4", "training.num_validation_sequences=4", *more]


def test_distill_hands_on_the_best_or_the_last(place: Path, tmp_path: Path) -> None:
    ruin = ["training.num_steps=6", "training.num_warmup_steps=6", "training.learning_rate=3", "training.evaluate_every=1"]
    assert main(["distill", *words(place, tmp_path / "last", *ruin, "training.keep_best=true")]) == 0
    assert main(["distill", *words(place, tmp_path / "best", *ruin, "training.result=best")]) == 0
    last, kept, best = (tmp_path / name for name in ("last/student", "last/student/best", "best/student"))
    assert not (best / "best").exists() and not list(tmp_path.rglob("best-*"))
    one, two, three = (load_file(folder / "model.safetensors") for folder in (last, kept, best))
    assert all(torch.equal(two[name], three[name]) for name in two) and not torch.equal(one["lm_head.weight"], two["lm_head.weight"])
    found = [json.loads((folder / "manifest.json").read_text())["results"] for folder in (last, best)]
    assert found[0]["best_step"] == found[1]["best_step"] < 6 and found[1]["validation_loss"] < found[0]["validation_loss"]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder in (kept, best):
        assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() and AutoTokenizer.from_pretrained(folder)


def test_distill_in_phases_and_its_plan(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phases = f"training.phases=[{{at_tokens: 200, sequence_length: 32, data: {{path: {place / 'b.jsonl'}}}}}, {{at_tokens: 500, batch_size: 2}}]"
    given = words(place, tmp_path / "run", phases, "training.num_tokens=700", "recipe=distill_only")
    assert main(["plan", *given, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    # 4 x 64 tokens, 2 x 128 from 256 on, 3 x 64 from 512 on
    assert plan["num_steps"] == 4 + 2 + 3 and plan["tokens"]["distill"] == 4 * 64 + 2 * 128 + 3 * 64
    assert main(["distill", *given]) == 0
    steps = [row for row in rows_of(tmp_path / "run" / "student") if "loss" in row]
    assert [row["phase"] for row in steps] == [0] * 4 + [1] * 2 + [2] * 3
    assert json.loads((tmp_path / "run" / "student" / "manifest.json").read_text())["results"]["steps"] == 9


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("data.sequence_length=257", "data.sequence_length=257 is longer than the 256 positions of"),
        ("training.phases=[{at_tokens: 70, sequence_length: 300}]", "training.phases[0].sequence_length=300 is longer than the 256 positions of"),
        ("training.phases=[{at_tokens: 70, batchsize: 3}]", "training.phases[0] has no key 'batchsize'; did you mean 'batch_size'?"),
        ("training.phases=[{at_tokens: 7000, batch_size: 3}]", "training.phases[0] would begin at step"),
        ("training.phases=[{at_tokens: 70, data: {path: x, weight: 2}}]", "training.phases[0].data has no key 'weight'"),
        ("training.optimizer=adam", "training.optimizer=adam is unknown; did you mean 'adamw'?"),
        ("teacher.more=[{pth: x}]", "teacher.more[0] has no key 'pth'; did you mean 'path'?"),
        ("teacher.more=[{path: x, weight: -1}]", "teacher.more[0].weight=-1 must be a number above 0"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, sentence: str
) -> None:
    assert main(["distill", *words(place, tmp_path / "run", "training.num_steps=3", change)]) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_batch_that_the_ranks_cannot_share(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = build_config(
        compose(words(place, tmp_path, "training.num_steps=9", "engine=fsdp", "training.phases=[{at_tokens: 70, batch_size: 5}]"))[0]
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"training.phases\[0\].batch_size=5 sequences cannot be shared equally by 2 ranks"):
        check_config(config, ["distill"])
