"""Several teachers: the weighted mean of their losses, its gradient, and what a run records and refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers_engines import blocks_of
from helpers_models import tiny_llama, tiny_model
from helpers_ranks import run_ranks
from helpers_text import tiny_tokenizer, write_jsonl

from minitron import dist
from minitron.cli import main
from minitron.distill.losses import LossConfig
from minitron.distill.pair import StudentLosses, TeacherStudent
from minitron.distill.teacher import TeacherSignal
from minitron.engine import EngineConfig, OptimizerConfig, build_engine

TEACHERS, WEIGHTS, SHAPE = ("teacher", "second", "third"), (1.0, 0.5, 2.0), (4, 12)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    tiny_llama(folder / "teacher", seed=1)
    tiny_llama(folder / "second", layers=2, hidden=32, heads=4, seed=5)
    tiny_llama(folder / "third", tied=True, vocab=304, seed=6)  # one tokenizer, four rows of padding more
    tiny_tokenizer(300).save_pretrained(folder / "third")
    tiny_llama(folder / "student", layers=2, hidden=32, ffn=40, heads=4, seed=2)
    write_jsonl(folder / "text.jsonl", num_documents=40)
    return folder


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 300, SHAPE, generator=torch.Generator().manual_seed(7))
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    return {"input_ids": ids, "labels": labels}


def terms_and_gradient(
    place: Path, teachers: Sequence[tuple[str, float]], loss: LossConfig, engine_name: str = "local"
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Summed over ranks; the gradient is read off a step of plain gradient descent with rate 1."""
    optimizer = OptimizerConfig(name="sgd", beta1=0.0, gradient_clipping=0.0)
    engine = build_engine(EngineConfig(name=engine_name, zero_stage=3), optimizer=optimizer, precision="float32")
    root = StudentLosses(tiny_model(place / "student").train(), loss, compute_dtype=torch.float32)
    placement = "replicate" if engine_name == "local" else "shard"
    models = [(tiny_model(place / name), weight) for name, weight in teachers]
    signals = [(TeacherSignal(model, engine, blocks=blocks_of(model), placement=placement), weight) for model, weight in models]
    pair = TeacherStudent(engine.prepare(root, blocks=blocks_of(root.student)), signals[0][0], others=signals[1:])
    before = {name: tensor.clone() for name, tensor in engine.full_weights()}
    mine = {name: tensor.tensor_split(dist.world_size())[dist.rank()] for name, tensor in batch().items()}
    terms = pair.losses(mine, torch.tensor(float(SHAPE[0] * (SHAPE[1] - 1))))
    engine.backward(terms["loss"], boundary=True)
    engine.step(1.0)
    after = dict(engine.full_weights())
    return {name: float(dist.all_reduce_sum(value.detach().clone())) for name, value in terms.items()}, {n: before[n] - after[n] for n in before}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    a, b = (torch.cat([tensors[name].double().flatten() for name in sorted(expected)]) for tensors in (found, expected))
    assert b.norm() > 1e-3
    return float((a - b).norm() / b.norm())


def by_hand(place: Path, temperature: float) -> tuple[float, dict[str, torch.Tensor]]:
    """Value of the mean forward KL, and the gradient of the KL from the mixture of the teachers' probabilities, in float64."""
    student = tiny_model(place / "student").double()
    ids = batch()["input_ids"]
    with torch.no_grad():
        logits = [tiny_model(place / name).double()(ids).logits[:, :-1, :300] / temperature for name in TEACHERS]
    p = [row.softmax(-1) for row in logits]
    shares = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    mixture = torch.stack([share * row for share, row in zip(shares, p, strict=True)]).sum(0)
    q = (student(ids).logits[:, :-1] / temperature).log_softmax(-1)
    each = [(row * (row.log() - q)).sum(-1).mean() for row in p]
    ((mixture * (mixture.log() - q)).sum(-1).mean() * temperature**2).backward()
    value = sum(share * float(kl.detach()) for share, kl in zip(shares, each, strict=True)) * temperature**2
    return value, {f"student.{name}": parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mean_of_divergences_has_the_gradient_of_the_mixture(place: Path, temperature: float) -> None:
    expected, gradient = by_hand(place, temperature)
    loss = LossConfig(temperature=temperature)
    terms, found = terms_and_gradient(place, list(zip(TEACHERS, WEIGHTS, strict=True)), loss)
    assert terms["loss"] == pytest.approx(expected, rel=1e-5) and terms["forward_kl"] == pytest.approx(expected, rel=1e-5)
    assert distance(found, gradient) < 1e-5


def test_a_mixture_of_losses_is_the_mean_of_what_each_teacher_gives(place: Path) -> None:
    loss = LossConfig(terms={"forward_kl": 1.0, "cross_entropy": 0.3})
    parts = [terms_and_gradient(place, [(name, 1.0)], loss) for name in TEACHERS]
    terms, gradient = terms_and_gradient(place, list(zip(TEACHERS, WEIGHTS, strict=True)), loss)
    for name in ("loss", "forward_kl", "cross_entropy"):
        mean = sum(weight * part[0][name] for weight, part in zip(WEIGHTS, parts, strict=True)) / sum(WEIGHTS)
        assert terms[name] == pytest.approx(mean, rel=1e-5)
    assert terms["cross_entropy"] == pytest.approx(parts[0][0]["cross_entropy"], rel=1e-5)
    mixed = {name: sum(w * part[1][name] for w, part in zip(WEIGHTS, parts, strict=True)) / sum(WEIGHTS) for name in gradient}
    assert distance(gradient, mixed) < 1e-4


def test_one_teacher_twice_is_one_teacher(place: Path) -> None:
    once, twice = (terms_and_gradient(place, [("teacher", 1.0)] * number, LossConfig()) for number in (1, 2))
    assert twice[0]["loss"] == pytest.approx(once[0]["loss"], rel=1e-6) and distance(twice[1], once[1]) < 1e-5


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_sharded_teachers_say_the_same(place: Path, engine: str) -> None:
    teachers = list(zip(TEACHERS, WEIGHTS, strict=True))
    terms, gradient = terms_and_gradient(place, teachers, LossConfig())
    for found, its in run_ranks(terms_and_gradient, 2, place, teachers, LossConfig(), engine):
        assert found["loss"] == pytest.approx(terms["loss"], rel=1e-5) and distance(its, gradient) < 1e-4


def words(place: Path, run: Path, *more: str) -> list[str]:
    found = [f"run_dir={run}", f"teacher.path={place / 'teacher'}", f"student.path={place / 'student'}", f"data.path={place / 'text.jsonl'}"]
    found += ["data.sequence_length=16", "data.validation_fraction=0.2", "teacher.dtype=float32", "training.precision=float32"]
    return [*found, "training.batch_size=4", "training.num_steps=2", "training.num_validation_sequences=4", *more]


def test_a_run_names_all_teachers_and_follows_their_content(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = f"teacher.more=[{{path: {place / 'second'}, weight: 0.5}}]"
    assert main(["distill", *words(place, tmp_path / "run", more)]) == 0
    inputs = json.loads((tmp_path / "run" / "student" / "manifest.json").read_text())["inputs"]
    assert {"teacher", "teacher 2 of weight 0.5"} <= set(inputs)
    capsys.readouterr()
    assert main(["distill", *words(place, tmp_path / "run", more)]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert main(["distill", *words(place, tmp_path / "run", more.replace("0.5", "2"))]) == 0
    assert "again, because teacher 2 of weight 0.5 and teacher 2 of weight 2 changed" in capsys.readouterr().err


def test_a_teacher_of_another_tokenizer_is_refused_before_weights_are_read(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stranger = tiny_llama(tmp_path / "stranger", vocab=310)
    (stranger / "model.safetensors").write_bytes(b"no weights at all")
    assert main(["distill", *words(place, tmp_path / "run", f"teacher.more=[{{path: {stranger}}}]")]) == 2
    err = capsys.readouterr().err
    assert f"{place / 'student'} and the teacher {stranger} have different tokenizers" in err and "distillation needs one" in err


def test_a_further_teacher_that_is_missing_or_too_short(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", *words(place, tmp_path / "run", f"teacher.more=[{{path: {tmp_path / 'none'}}}]")]) == 2
    assert f"teacher.more[0].path={tmp_path / 'none'} does not exist" in capsys.readouterr().err
    short = tiny_llama(tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    assert main(["distill", *words(place, tmp_path / "run", f"teacher.more=[{{path: {short}}}]")]) == 2
    assert "data.sequence_length=16 is longer than the 8 positions of" in capsys.readouterr().err
