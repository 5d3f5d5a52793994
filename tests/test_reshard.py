"""One training handed from engine to engine and from one number of ranks to another goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_engines import Case, FixedBatches, column, start
from helpers_models import tiny_llama
from helpers_ranks import run_ranks

from minitron import dist
from minitron.checkpoint import Checkpointer
from minitron.core.share import whole
from minitron.distill.loop import Progress, StepReport, train
from minitron.distill.resume import moved
from minitron.engine.shares import differing_weights, spans_from

STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_llama(root / "teacher-untied", seed=1)
    tiny_llama(root / "student-untied", layers=2, hidden=32, ffn=40, heads=4, seed=2)
    return root


def leg(case: Case, number: int) -> dict[str, Any]:
    """Go on from the checkpoint of the leg before, train some steps, save; gives the curve, and moments and weights as rank 0 sees them whole."""
    engine, pair = start(case)
    checkpointer = Checkpointer(case.folder / "handed-on")
    first = engine.shares()
    found = checkpointer.load_latest(wanted=spans_from(first), foreign=lambda meta, shapes: differing_weights(first, shapes)) if number else None
    if found is not None:
        engine.load_state_dict(found[0])
    curve: list[dict[str, float]] = []

    def hook(report: StepReport) -> None:
        curve.append(report.read())

    progress = Progress(step=number * STEPS)
    batches = FixedBatches(case.num_micro, progress.step)
    train(pair, engine, batches, learning_rate=lambda step: case.rate, num_steps=progress.step + STEPS, progress=progress, hooks=[hook])
    checkpointer.save(progress.step, engine.state_dict(), {}, shares=engine.shares())
    state = checkpointer.load_latest(wanted=lambda name, shape: (0, whole(shape).stop))
    assert state is not None
    return {"curve": curve, "state": state[0] if dist.is_main() else {}}


def legs(case: Case, count: int) -> list[dict[str, Any]]:
    """All legs one after the other."""
    return [leg(case, number) for number in range(count)]


#: (engine, ZeRO stage, ranks, sharding).
CHAINS = {
    "fsdp": [("fsdp", 0, 1, "full"), ("fsdp", 0, 2, "full"), ("fsdp", 0, 4, "full"), ("fsdp", 0, 1, "full")],
    "engines": [("local", 0, 1, "full"), ("fsdp", 0, 3, "full"), ("deepspeed", 2, 2, "full"), ("deepspeed", 3, 3, "full"), ("local", 0, 1, "full")],
    "more": [("deepspeed", 1, 2, "full"), ("fsdp", 0, 4, "hybrid"), ("deepspeed", 0, 2, "full"), ("deepspeed", 3, 1, "full")],
}


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[dict[str, Any]]:
    """The legs of one process under engine=local."""
    return run_ranks(legs, 1, Case(folder, num_micro=1), max(map(len, CHAINS.values())))[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("chain", CHAINS)
def test_a_training_is_handed_on(folder: Path, tmp_path: Path, alone: list[dict[str, Any]], chain: str) -> None:
    for part in ("teacher-untied", "student-untied"):
        (tmp_path / part).symlink_to(folder / part)
    if any(engine == "deepspeed" for engine, *_ in CHAINS[chain]):
        pytest.importorskip("deepspeed")
    for number, (engine, stage, ranks, sharding) in enumerate(CHAINS[chain]):
        size, expected = 2 if sharding == "hybrid" else None, alone[number]
        settings = Case(tmp_path, num_micro=1, engine=engine, zero_stage=stage, sharding=sharding, shard_size=size)
        result = run_ranks(leg, ranks, settings, number)[0]
        for name in ("loss", "gradient_norm"):
            assert torch.allclose(column(result, name), column(expected, name), rtol=1e-5), (number, name)
        for name, tensor in expected["state"].items():
            if not name.startswith("random/"):
                assert result["state"][name].shape == tensor.shape, (number, name)
                assert torch.allclose(result["state"][name], tensor, rtol=1e-3, atol=2e-5), (number, name)


def skipped(case: Case) -> list[Any]:
    """Whether a step whose loss is NaN leaves weights and moments as they were, bit for bit; the next one works."""
    engine, pair = start(case)
    (batch,) = FixedBatches(1).next()
    states, norms, blamed = [], [], ""
    for factor in (1.0, float("nan"), 1.0):
        engine.backward(pair.losses(batch, torch.tensor(257.0))["loss"] * factor, boundary=True)
        norms.append(float(engine.step(1e-3)))
        states.append({name: tensor.clone() for name, tensor in engine.state_dict().items()})
        blamed = engine.blame() or blamed
    same = all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    moves = any(not torch.equal(tensor, states[2][name]) for name, tensor in states[1].items() if name.startswith("weight/"))
    return [same, moves, [norm == norm for norm in norms], blamed, len(states[1]) == len(states[0])]


@pytest.mark.parametrize(
    ("engine", "stage", "optimizer"),
    [
        ("local", 0, "adamw"),
        ("local", 0, "lion"),
        ("local", 0, "muon"),
        ("local", 0, "sgd"),
        ("fsdp", 0, "adamw"),
        ("fsdp", 0, "muon"),
        ("fsdp", 0, "sgd"),
    ]
    + [("deepspeed", stage, "adamw") for stage in (0, 2, 3)],
)
def test_a_step_that_is_not_finite_changes_nothing(folder: Path, engine: str, stage: int, optimizer: str) -> None:
    case = Case(folder, engine=engine, zero_stage=stage, optimizer=optimizer, num_micro=1)
    for same, moves, finite, blamed, complete in run_ranks(skipped, 1 if engine == "local" else 2, case):
        assert (same, moves, finite, complete) == (True, True, [True, False, True], True)
        assert blamed == ("" if engine == "deepspeed" else "student.model.embed_tokens.weight")


def test_going_back_leaves_counts_and_moves_streams() -> None:
    state = {"inner": {"step": 4, "phase": 0, "stream": {"drawn": 16}}, "step": 4}
    place = {"inner": {"step": 9, "phase": 1, "stream": {"drawn": 36}}, "step": 9}
    assert moved(state, place) == {"inner": {"step": 4, "phase": 0, "stream": {"drawn": 36}}, "step": 4}
