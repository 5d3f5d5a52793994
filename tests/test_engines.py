"""Every engine trains like ``local``: losses, gradient norms, weights, resuming; on real gloo ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_engines import Case, both_ways, column, difference, gradients, norms_around_nan, scenario, start
from helpers_models import tiny_llama
from helpers_ranks import RankFailure, run_ranks

from minitron import dist
from minitron.engine import EngineConfig, OptimizerConfig, build_engine
from minitron.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for tied in (False, True):
        kind = "tied" if tied else "untied"
        tiny_llama(root / f"teacher-{kind}", tied=tied, seed=1)
        tiny_llama(root / f"student-{kind}", tied=tied, layers=2, hidden=32, ffn=40, heads=4, seed=2)
    return root


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[bool, dict[str, Any]]:
    """The curves of ``local`` in float32, untied and tied."""
    return {tied: run_ranks(scenario, 1, Case(folder, tied=tied))[0] for tied in (False, True)}


def test_the_reference_learns_and_clipping_bites(reference: dict[bool, dict[str, Any]]) -> None:
    for result in reference.values():
        assert column(result, "gradient_norm").min() > 2 * Case(Path()).clipping
        assert result["validations"][0]["validation_kl"] > 0.1
        assert len(result["curve"]) == 6 and result["weights"].keys() == result["initial"].keys()
    assert "student.lm_head.weight" in reference[False]["weights"] and "student.lm_head.weight" not in reference[True]["weights"]


FLOAT32 = [
    ("fsdp", 0, 1, {}),
    ("fsdp", 0, 2, {}),
    ("fsdp", 0, 2, {"placement": "shard", "tied": True}),
    ("deepspeed", 3, 1, {}),
    ("deepspeed", 0, 2, {}),
    ("deepspeed", 1, 2, {}),
    ("deepspeed", 2, 2, {"tied": True}),
    ("deepspeed", 3, 2, {}),
    ("deepspeed", 3, 2, {"placement": "shard", "tied": True}),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            ("fsdp", 0, 2, {"tied": True}),
            ("fsdp", 0, 2, {"placement": "shard"}),
            ("fsdp", 0, 4, {}),
            ("deepspeed", 2, 2, {}),
            ("deepspeed", 2, 2, {"placement": "shard"}),
            ("fsdp", 0, 3, {}),
            ("deepspeed", 2, 3, {}),
            ("deepspeed", 3, 3, {}),
            ("deepspeed", 2, 4, {}),
            ("deepspeed", 3, 2, {"placement": "shard"}),
            ("deepspeed", 3, 4, {"placement": "shard"}),
        ]
    ),
]


@pytest.mark.parametrize(("engine", "stage", "ranks", "options"), FLOAT32)
def test_an_engine_follows_local(
    folder: Path, reference: dict[bool, dict[str, Any]], engine: str, stage: int, ranks: int, options: dict[str, Any]
) -> None:
    case = Case(folder, engine=engine, zero_stage=stage, **options)
    results = run_ranks(scenario, ranks, case)
    expected = reference[case.tied]
    for result in results:
        assert difference(result, expected, "loss", "gradient_norm", "forward_kl", "cross_entropy") < 1e-5
        assert all(torch.equal(tensor, expected["initial"][name]) for name, tensor in result["initial"].items())
    assert results[0]["weights"].keys() == expected["weights"].keys()
    for name, tensor in results[0]["weights"].items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected["weights"][name], rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


BF16 = [
    ("local", 0, 1, {}),
    ("fsdp", 0, 2, {"placement": "shard"}),
    ("deepspeed", 1, 2, {}),
    ("deepspeed", 2, 2, {}),
    ("deepspeed", 3, 3, {"placement": "shard"}),  # sizes that three ranks do not divide
    pytest.param("fsdp", 0, 2, {}, marks=pytest.mark.slow),
    pytest.param("deepspeed", 3, 2, {"tied": True}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("engine", "stage", "ranks", "options"), BF16)
def test_bf16_stays_near_float32(
    folder: Path, reference: dict[bool, dict[str, Any]], engine: str, stage: int, ranks: int, options: dict[str, Any]
) -> None:
    case = Case(folder, engine=engine, zero_stage=stage, precision="bf16", **options)
    result = run_ranks(scenario, ranks, case)[0]
    expected = reference[case.tied]
    assert difference(result, expected, "loss", "cross_entropy") < 2e-3
    assert difference(result, expected, "forward_kl", "gradient_norm") < 1e-2
    # masters start from the float32 weights, not from their bf16 roundings, and are what is exported
    assert all(torch.equal(tensor, expected["initial"][name]) for name, tensor in result["initial"].items())
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in result["weights"].values())


@pytest.fixture(scope="module")
def bf16_reference(folder: Path) -> dict[str, Any]:
    """The curve of ``local`` in bf16."""
    return run_ranks(scenario, 1, Case(folder, precision="bf16"))[0]


@pytest.mark.parametrize(("engine", "stage"), [("fsdp", 0), ("deepspeed", 2), ("deepspeed", 3)])
def test_engines_agree_in_bf16(folder: Path, bf16_reference: dict[str, Any], engine: str, stage: int) -> None:
    result = run_ranks(scenario, 2, Case(folder, engine=engine, zero_stage=stage, precision="bf16"))[0]
    assert difference(result, bf16_reference, "loss", "forward_kl", "cross_entropy") < 5e-3


RESUME = [
    ("local", 0, 1, "float32"),
    ("fsdp", 0, 2, "float32"),
    ("deepspeed", 0, 2, "float32"),
    ("deepspeed", 1, 2, "float32"),
    ("deepspeed", 1, 2, "bf16"),
    ("deepspeed", 2, 2, "float32"),
    ("deepspeed", 3, 2, "float32"),
    pytest.param("fsdp", 0, 3, "bf16", marks=pytest.mark.slow),
    pytest.param("deepspeed", 2, 3, "float32", marks=pytest.mark.slow),
    pytest.param("deepspeed", 2, 2, "bf16", marks=pytest.mark.slow),
    pytest.param("deepspeed", 3, 3, "bf16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("engine", "stage", "ranks", "precision"), RESUME)
def test_resuming_is_exact(folder: Path, engine: str, stage: int, ranks: int, precision: str) -> None:
    case = Case(folder, engine=engine, zero_stage=stage, precision=precision)
    whole, halves = run_ranks(both_ways, ranks, case)[0]
    for row, other in zip(halves["curve"], whole["curve"], strict=True):
        assert {**row, "tokens_per_second": 0} == {**other, "tokens_per_second": 0}
    assert halves["validations"] == whole["validations"]
    assert all(torch.equal(halves["weights"][name], tensor) for name, tensor in whole["weights"].items())


SPLITS = [("local", 0, 1, 1), ("local", 0, 1, 8), ("fsdp", 0, 2, 4), *(("deepspeed", stage, 2, 4) for stage in (0, 1, 2, 3))]


@pytest.fixture(scope="module")
def split_reference(folder: Path) -> dict[str, torch.Tensor]:
    return run_ranks(gradients, 1, Case(folder, num_micro=3))[0]


@pytest.mark.parametrize(("engine", "stage", "ranks", "num_micro"), SPLITS)
def test_the_gradient_does_not_depend_on_the_split(
    folder: Path, split_reference: dict[str, torch.Tensor], engine: str, stage: int, ranks: int, num_micro: int
) -> None:
    """The last sequence is masked wholly: with one sequence a micro-batch there is a micro-batch without a single label."""
    found = run_ranks(gradients, ranks, Case(folder, engine=engine, zero_stage=stage, num_micro=num_micro))[0]
    flat, expected = (torch.cat([tensors[name].flatten() for name in sorted(split_reference)]) for tensors in (found, split_reference))
    assert expected.norm() > 0.1 and torch.isfinite(flat).all()
    assert (flat - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize(("engine", "stage", "precision"), [("fsdp", 0, "float32"), ("deepspeed", 1, "bf16"), ("deepspeed", 3, "float32")])
def test_a_nan_shows_in_the_gradient_norm(folder: Path, engine: str, stage: int, precision: str) -> None:
    """Not the norm of the step before, which DeepSpeed keeps when it skips an update."""
    for norms in run_ranks(norms_around_nan, 2, Case(folder, engine=engine, zero_stage=stage, precision=precision)):
        assert norms[0] > 0.1 and norms[1] != norms[1]


def refusals() -> dict[str, str]:
    found = {}
    for name, config in {"local": EngineConfig(name="local"), "bf16": EngineConfig(name="deepspeed", zero_stage=0)}.items():
        try:
            build_engine(config, optimizer=OptimizerConfig(), precision="bf16")
        except ConfigError as error:
            found[name] = str(error)
    return found


def test_what_cannot_work_is_refused_in_one_sentence() -> None:
    for found in run_ranks(refusals, 2):
        assert "engine=local is for one process, but the launcher started 2" in found["local"]
        assert "engine.zero_stage=0 with precision=bf16" in found["bf16"] and "\n" not in found["bf16"]


def foreign_state(case: Case) -> str:
    engine, _ = start(case)
    state = {name: tensor[:-1] if tensor.ndim else tensor for name, tensor in engine.state_dict().items()}
    try:
        engine.load_state_dict(state)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("engine", "stage"), [("fsdp", 0), ("deepspeed", 2), ("deepspeed", 3)])
def test_a_state_of_other_shards_is_refused(folder: Path, engine: str, stage: int) -> None:
    for sentence in run_ranks(foreign_state, 2, Case(folder, engine=engine, zero_stage=stage)):
        assert "another number of ranks" in sentence


# ---------------------------------------------------------------------------------------------------------------- the harness itself


def fail_on_rank_one(how: str) -> int:
    if dist.rank() == 1:
        if how == "raise":
            raise ValueError("rank one is unhappy")
        os._exit(7)
    dist.barrier()
    return dist.rank()


def test_ranks_return_their_results_in_order() -> None:
    assert run_ranks(ranks_and_sum, 2) == [(0, 3.0), (1, 3.0)]


def ranks_and_sum() -> tuple[int, float]:
    return dist.rank(), float(dist.all_reduce_sum(torch.tensor(float(dist.rank() + 1))))


@pytest.mark.parametrize(("how", "message"), [("raise", "rank one is unhappy"), ("die", "died with exit code 7")])
def test_a_failing_rank_is_named_at_once(how: str, message: str) -> None:
    with pytest.raises(RankFailure, match=f"(?s)rank 1 of 2 .*{message}"):
        run_ranks(fail_on_rank_one, 2, how)
