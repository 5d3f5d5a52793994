"""Training with losses on intermediate states: the dynamic weight, the filters' first stage, every engine, splits, resuming."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_models import tiny_model
from helpers_ranks import run_ranks
from helpers_states import ALL_TERMS, KEPT, Case, RewindableBatches, both_ways, gradients, models, scenario, start
from helpers_text import tiny_tokenizer, write_jsonl
from torch import Tensor

from minitron.data import DataConfig, Text, open_text
from minitron.distill.alpha import DynamicWeight, build_alpha
from minitron.distill.filters import FilteredSide
from minitron.distill.losses import DYNAMIC, STATE_LOSSES, LossConfig
from minitron.distill.losses.state import StatesConfig, lifting_matrix
from minitron.distill.opening import first_terms, open_losses
from minitron.distill.pace import MEASURED
from minitron.distill.settings import TrainingConfig
from minitron.distill.training import TrainingResult, TrainingRun
from minitron.engine import EngineConfig
from minitron.errors import Interrupted
from minitron.ops.head import Head
from minitron.ops.kd_loss import IGNORE_INDEX
from minitron.tracking import build_trackers
from minitron.tracking.jsonl import read_metrics


def dynamic(**limits: float) -> DynamicWeight:
    states = StatesConfig(**limits)  # type: ignore[arg-type]
    weight = build_alpha(LossConfig(terms={"forward_kl": 0.5, "reverse_kl": 2.0, "cross_entropy": 9.0, "hidden_states": DYNAMIC}, states=states))
    assert weight is not None
    return weight


def terms(**values: float) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in ({"cross_entropy": 3.0, "reverse_kl": 0.25} | values).items()}


def test_alpha_is_the_ratio_of_the_last_sums() -> None:
    """(0.5 · 3 + 2 · 0.25) / 0.4; cross-entropy compares with no teacher and is left out, as in the paper."""
    weight = dynamic()
    weight.update(terms(forward_kl=3.0, hidden_states=0.4))
    assert float(weight.value) == pytest.approx(5.0)  # type: ignore[arg-type]
    for kept in ({"forward_kl": float("nan"), "hidden_states": 0.4}, {"forward_kl": 3.0, "hidden_states": 0.0}):
        weight.update(terms(**kept))  # a step that diverged, or a wholly masked one
        assert float(weight.value) == pytest.approx(5.0)  # type: ignore[arg-type]
    for limits, expected in (({"alpha_max": 2.0}, 2.0), ({"alpha_min": 7.0}, 7.0)):
        weight = dynamic(**limits)
        weight.update(terms(forward_kl=3.0, hidden_states=0.4))
        assert float(weight.value) == expected  # type: ignore[arg-type]
    only_labels = build_alpha(LossConfig(terms={"cross_entropy": 2.0, "hidden_states": DYNAMIC}))
    assert only_labels is not None
    only_labels.update(terms(hidden_states=1.5))
    assert float(only_labels.value) == pytest.approx(4.0)  # type: ignore[arg-type]
    assert build_alpha(LossConfig(terms={"forward_kl": 1.0, "hidden_states": 0.3})) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    models(root)
    return root


@pytest.fixture(scope="module")
def local(folder: Path) -> dict[str, Any]:
    """The curve of ``local`` in float32."""
    return run_ranks(scenario, 1, Case(folder))[0]


def test_the_scenario_has_every_loss() -> None:
    assert set(STATE_LOSSES) <= set(ALL_TERMS)


def test_every_step_weighs_by_the_step_before(folder: Path, local: dict[str, Any]) -> None:
    """Recomputed from the logged raw terms; the first step's from a pass of its own, which sees the first batch and leaves it there."""
    curve = local["curve"]
    for row in curve:
        dynamic_part = row["alpha"] * (row["hidden_states"] + row["task_aware_filters"])
        rest = 0.7 * row["forward_kl"] + 0.3 * row["cross_entropy"] + 0.5 * row["attention_relation"]
        assert row["loss"] == pytest.approx(rest + dynamic_part, rel=1e-5)
    for before, after in zip(curve, curve[1:], strict=False):
        assert after["alpha"] == pytest.approx(0.7 * before["forward_kl"] / (before["hidden_states"] + before["task_aware_filters"]), rel=1e-5)
    first = curve[0]  # nothing has been updated yet: the pass saw the same values as the step itself
    assert first["alpha"] == pytest.approx(0.7 * first["forward_kl"] / (first["hidden_states"] + first["task_aware_filters"]), rel=1e-5)
    assert 0.01 < first["alpha"] < 1000.0 and curve[1]["alpha"] == pytest.approx(first["alpha"]) and curve[2]["alpha"] != curve[1]["alpha"]


def test_the_filters_learn_the_task_first(folder: Path) -> None:
    """The first stage lowers the loss behind every filter, moves no weight of the student, and uses up no batch."""
    case = Case(folder, states=replace(Case(folder).states, filter_steps=30, filter_learning_rate=3e-3))
    engine, pair = start(case)
    before = {name: tensor.clone() for name, tensor in engine.full_weights()}
    batches = RewindableBatches(2)
    untrained = {name: [w.clone() for w in weights] for name, weights in pair.module.states.members["task_aware_filters"].start.items()}  # type: ignore[union-attr]
    open_losses(pair, engine, batches, stop=lambda: False)
    assert batches.step == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.full_weights())
    trained = pair.module.states.members["task_aware_filters"].start  # type: ignore[union-attr]
    (batch,) = RewindableBatches(1).next()
    theirs, _ = pair.states(batch)
    head = tiny_model(folder / "teacher").lm_head.weight.detach()
    reads, _ = pair.module.states.reads(pair.module.states.members["task_aware_filters"])  # type: ignore[union-attr]

    def excess(filters: list[Tensor]) -> float:
        """How much worse than a uniform guess, the best there is on random tokens, the teacher's head does behind its filters."""
        losses = [F.cross_entropy((theirs[i] @ w.T @ head.T).flatten(0, 1), batch["labels"].flatten()) for i, w in zip(reads, filters, strict=True)]
        return float(torch.stack(losses).mean()) - math.log(300)

    assert excess(untrained["teacher"]) > 0.1
    assert excess(trained["teacher"]) < 0.5 * excess(untrained["teacher"])


# ------------------------------------------------------------------------------------------------------------------------- the engines

ENGINES = [("fsdp", 0, "shard"), ("deepspeed", 2, "replicate"), ("deepspeed", 3, "shard")]


@pytest.mark.parametrize(("engine", "stage", "placement"), ENGINES)
def test_an_engine_follows_local(folder: Path, local: dict[str, Any], engine: str, stage: int, placement: str) -> None:
    result = run_ranks(scenario, 2, Case(folder, engine=engine, zero_stage=stage, placement=placement))[0]
    for mine, other in zip(result["curve"], local["curve"], strict=True):
        assert mine.keys() == other.keys()
        for name in ("loss", "alpha", "gradient_norm", *ALL_TERMS):
            assert mine[name] == pytest.approx(other[name], rel=2e-5), name
    assert result["weights"].keys() == local["weights"].keys()
    for name, tensor in result["weights"].items():
        torch.testing.assert_close(tensor, local["weights"][name], rtol=0, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


CHECKPOINTED = [("local", 0, 1, "full"), ("local", 0, 1, "selective"), ("fsdp", 0, 2, "full"), ("deepspeed", 3, 2, "full")]


@pytest.mark.parametrize(("engine", "stage", "ranks", "mode"), CHECKPOINTED)
def test_activation_checkpointing_changes_nothing(folder: Path, local: dict[str, Any], engine: str, stage: int, ranks: int, mode: str) -> None:
    result = run_ranks(scenario, ranks, Case(folder, engine=engine, zero_stage=stage, checkpointing=mode))[0]
    for mine, other in zip(result["curve"], local["curve"], strict=True):
        for name in ("loss", "alpha", "gradient_norm", *ALL_TERMS):
            assert mine[name] == pytest.approx(other[name], rel=2e-5), name


@pytest.mark.parametrize(("engine", "ranks"), [("local", 1), ("fsdp", 2)])
def test_bf16_stays_near_float32(folder: Path, local: dict[str, Any], engine: str, ranks: int) -> None:
    result = run_ranks(scenario, ranks, Case(folder, engine=engine, precision="bf16"))[0]
    for mine, other in zip(result["curve"], local["curve"], strict=True):
        for name in ("loss", "alpha", *ALL_TERMS):
            assert mine[name] == pytest.approx(other[name], rel=2e-2), name


@pytest.mark.parametrize(("engine", "stage", "ranks"), [("local", 0, 1), ("deepspeed", 2, 2)])
def test_resuming_is_exact(folder: Path, engine: str, stage: int, ranks: int) -> None:
    """The dynamic weight, the filters of the first stage and the maps are in the checkpoint, bit for bit."""
    whole, halves = run_ranks(both_ways, ranks, Case(folder, engine=engine, zero_stage=stage))[0]
    for row, other in zip(halves["curve"], whole["curve"], strict=True):
        assert {**row, **dict.fromkeys(MEASURED, 0)} == {**other, **dict.fromkeys(MEASURED, 0)}
    assert all(torch.equal(halves["weights"][name], tensor) for name, tensor in whole["weights"].items())
    assert halves["extra"].keys() == whole["extra"].keys() and len(whole["extra"]) == 5
    assert all(torch.equal(halves["extra"][name], tensor) for name, tensor in whole["extra"].items())


@pytest.fixture(scope="module")
def whole_gradient(folder: Path) -> dict[str, Tensor]:
    return run_ranks(gradients, 1, Case(folder, num_micro=1))[0]


@pytest.mark.parametrize(("engine", "stage", "ranks", "num_micro"), [("local", 0, 1, 8), ("fsdp", 0, 2, 4), ("deepspeed", 2, 2, 2)])
def test_the_gradient_does_not_depend_on_the_split(
    folder: Path, whole_gradient: dict[str, Tensor], engine: str, stage: int, ranks: int, num_micro: int
) -> None:
    """With one sequence a micro-batch, the last has no label at all."""
    found = run_ranks(gradients, ranks, Case(folder, engine=engine, zero_stage=stage, num_micro=num_micro))[0]
    for part in ("student.", "states."):
        names = [name for name in sorted(whole_gradient) if name.startswith(part)]
        flat, expected = (torch.cat([tensors[name].flatten() for name in names]) for tensors in (found, whole_gradient))
        assert expected.norm() > 1e-2 and torch.isfinite(flat).all()
        assert (flat - expected).norm() / expected.norm() < 1e-5


def test_maps_are_trained_and_never_exported(folder: Path, local: dict[str, Any]) -> None:
    engine, pair = start(Case(folder))
    names = {name for name, _ in engine.full_weights()}
    maps = {name for name in names if not name.startswith("student.")}
    assert maps == {"states.members.hidden_states.map", *(f"states.members.task_aware_filters.change.{i}" for i in range(2))}
    exported = {name for name, _ in TrainingResult(engine, 0, 0, []).student_weights()}
    assert exported == {name for name, _ in tiny_model(folder / "student").named_parameters()}
    initial = dict(engine.full_weights())["states.members.hidden_states.map"]
    assert torch.equal(initial, lifting_matrix(48, 32, sorted(KEPT), seed=0))
    assert not torch.equal(local["weights"]["states.members.hidden_states.map"], initial)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    path = write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", num_documents=20)
    return open_text(DataConfig(path=str(path), sequence_length=16, validation_fraction=0.2), tiny_tokenizer(300), seed=0)


def training(folder: Path, text: Text, out: Path, *, stop: Callable[[], bool] = lambda: False) -> TrainingRun:
    case = Case(folder)
    return TrainingRun(
        student=tiny_model(folder / "student"),
        teacher=tiny_model(folder / "teacher"),
        stream=text.stream(),
        validation=torch.stack(list(islice(text.stream(split="validation").first_epoch(), 2))),
        sequence_length=16,
        training=TrainingConfig(num_steps=4, batch_size=4, micro_batch_size=2, precision="float32", learning_rate=3e-3, checkpoint_every=1),
        loss=case.loss,
        engine=EngineConfig(),
        blocks_of=lambda model: list(model.model.layers),
        open_tracker=lambda step: build_trackers({"jsonl": {}}, folder=out, run_name="x", group="x", config={}),
        what="distill",
        folder=out,
        stop=stop,
        kept_hidden=sorted(KEPT),
    )


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in read_metrics(folder / "metrics.jsonl")]


def test_a_stopped_training_goes_on_as_if_it_had_not_been_stopped(folder: Path, text: Text, tmp_path: Path) -> None:
    """Stopped among the filters it starts over; stopped after a step it goes on with the same dynamic weight, filters and maps."""
    whole = training(folder, text, tmp_path / "whole").run()
    for calls, words in ((2, "while the filters were trained"), (3 + 2, "stopped at step 2 of 4")):
        counter = itertools.count(1)
        with pytest.raises(Interrupted, match=words):
            training(folder, text, tmp_path / "parts", stop=lambda counter=counter, calls=calls: next(counter) == calls).run()
    done = training(folder, text, tmp_path / "parts").run()
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole") and rows_of(tmp_path / "whole")[1]["alpha"] > 0
    assert all(torch.equal(a[1], b[1]) for a, b in zip(done.student_weights(), whole.student_weights(), strict=True))


def test_masked_tokens_are_inert_in_the_filters_first_stage() -> None:
    generator = torch.Generator().manual_seed(0)
    head = Head(torch.randn(50, 8, generator=generator))
    labels = torch.randint(0, 50, (2, 7), generator=generator)
    labels[0, 3], labels[1, 5:] = IGNORE_INDEX, IGNORE_INDEX
    clean = torch.randn(2, 7, 8, generator=generator)
    dirty = torch.where((labels != IGNORE_INDEX)[..., None], clean, float("nan"))
    found = []
    for states in (clean, dirty):
        side = FilteredSide(lambda: nullcontext(head), [lifting_matrix(6, 8, None, seed=0)])
        side.loss([states], labels, torch.tensor(11.0), torch.float32).backward()
        found.append([weight.grad for weight in (*side.filters, *side.back)])
    for one, other in zip(*found, strict=True):
        assert one is not None and one.any() and torch.equal(one, other)


def test_a_first_pass_leaves_nothing_behind(folder: Path) -> None:
    engine, pair = start(Case(folder))
    before = {name: tensor.clone() for name, tensor in engine.full_weights()}
    found = first_terms(pair, RewindableBatches(2).next())
    assert not any(value.requires_grad for value in found.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.full_weights())
