"""Every engine trains like ``local``: losses, gradient norms, weights, resuming; on real gloo ranks."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_engines import Case, FixedBatches, HostWaits, both_ways, column, difference, gradients, norms_around_nan, scenario, start
from helpers_models import tiny_llama
from helpers_ranks import RankFailure, run_ranks

from minitron import dist
from minitron.distill.pace import MEASURED
from minitron.engine import EngineConfig, OptimizerConfig, build_engine, check_engine
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


HYBRID = {"sharding": "hybrid", "shard_size": 2}
FLOAT32 = [
    ("local", 0, 1, {"lazy": True, "tied": True, "checkpointing": "full"}),
    ("fsdp", 0, 1, {"lazy": True, "checkpointing": "selective"}),
    ("fsdp", 0, 2, {}),
    ("fsdp", 0, 2, {"placement": "shard", "tied": True, "lazy": True}),
    ("fsdp", 0, 2, {"offload": "parameters", "lazy": True, "checkpointing": "full"}),
    ("fsdp", 0, 4, {**HYBRID, "tied": True, "lazy": True}),
    ("deepspeed", 3, 1, {}),
    ("deepspeed", 0, 2, {"lazy": True}),
    ("deepspeed", 1, 2, {"checkpointing": "selective"}),
    ("deepspeed", 2, 2, {"tied": True, "lazy": True, "offload": "optimizer"}),
    ("deepspeed", 3, 2, {"offload": "parameters", "checkpointing": "full"}),
    ("deepspeed", 3, 2, {"placement": "shard", "tied": True, "lazy": True}),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            ("fsdp", 0, 2, {"tied": True}),
            ("fsdp", 0, 4, {**HYBRID, "offload": "parameters"}),
            ("fsdp", 0, 4, {"sharding": "hybrid", "shard_size": 1}),
            ("deepspeed", 1, 2, {"offload": "optimizer"}),
            ("deepspeed", 3, 3, {"offload": "optimizer", "lazy": True}),
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
    ("fsdp", 0, 4, {**HYBRID, "lazy": True}),
    ("deepspeed", 1, 2, {"lazy": True}),
    ("deepspeed", 2, 2, {"offload": "optimizer"}),
    ("deepspeed", 3, 3, {"placement": "shard", "lazy": True}),  # sizes that three ranks do not divide
    pytest.param("deepspeed", 2, 2, {}, marks=pytest.mark.slow),
    pytest.param("deepspeed", 3, 2, {"offload": "parameters"}, marks=pytest.mark.slow),
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
    ("local", 0, 1, "float32", {}),
    ("fsdp", 0, 2, "float32", {}),
    ("fsdp", 0, 4, "float32", HYBRID),
    ("fsdp", 0, 2, "bf16", {"offload": "parameters"}),
    ("deepspeed", 0, 2, "float32", {}),
    ("deepspeed", 1, 2, "float32", {}),
    ("deepspeed", 1, 2, "bf16", {}),
    ("deepspeed", 2, 2, "float32", {"offload": "optimizer"}),
    ("deepspeed", 3, 2, "float32", {"offload": "parameters", "lazy": True}),
    pytest.param("fsdp", 0, 3, "bf16", {}, marks=pytest.mark.slow),
    pytest.param("deepspeed", 2, 3, "float32", {}, marks=pytest.mark.slow),
    pytest.param("deepspeed", 2, 2, "bf16", {}, marks=pytest.mark.slow),
    pytest.param("deepspeed", 3, 2, "float32", {}, marks=pytest.mark.slow),
    pytest.param("deepspeed", 3, 3, "bf16", {}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("engine", "stage", "ranks", "precision", "options"), RESUME)
def test_resuming_is_exact(folder: Path, engine: str, stage: int, ranks: int, precision: str, options: dict[str, Any]) -> None:
    case = Case(folder, engine=engine, zero_stage=stage, precision=precision, **options)
    whole, halves = run_ranks(both_ways, ranks, case)[0]
    for row, other in zip(halves["curve"], whole["curve"], strict=True):
        assert {**row, **dict.fromkeys(MEASURED, 0)} == {**other, **dict.fromkeys(MEASURED, 0)}
    assert halves["validations"] == whole["validations"]
    assert all(torch.equal(halves["weights"][name], tensor) for name, tensor in whole["weights"].items())


SPLITS = [
    ("local", 0, 1, 1, {}),
    ("local", 0, 1, 8, {}),
    ("fsdp", 0, 2, 4, {}),
    ("fsdp", 0, 4, 2, HYBRID),
    *(("deepspeed", stage, 2, 4, {}) for stage in (0, 1, 2, 3)),
]


@pytest.fixture(scope="module")
def split_reference(folder: Path) -> dict[str, torch.Tensor]:
    return run_ranks(gradients, 1, Case(folder, num_micro=3))[0]


@pytest.mark.parametrize(("engine", "stage", "ranks", "num_micro", "options"), SPLITS)
def test_the_gradient_does_not_depend_on_the_split(
    folder: Path, split_reference: dict[str, torch.Tensor], engine: str, stage: int, ranks: int, num_micro: int, options: dict[str, Any]
) -> None:
    """The last sequence is masked wholly: with one sequence a micro-batch there is a micro-batch without a single label."""
    found = run_ranks(gradients, ranks, Case(folder, engine=engine, zero_stage=stage, num_micro=num_micro, **options))[0]
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


BAD = [
    ({"name": "fdsp"}, 1, "engine=fdsp is unknown"),
    ({"name": "deepspeed", "zero_stage": 4}, 1, "engine.zero_stage=4 is not one of 0, 1, 2, 3"),
    ({"name": "fsdp", "sharding": "half"}, 1, "engine.sharding=half is unknown"),
    ({"name": "fsdp", "offload": "disk"}, 1, "engine.offload=disk is unknown"),
    ({"name": "fsdp", "sharding": "hybrid", "shard_size": 3}, 8, "cannot divide 8 ranks into groups of 3 .engine.shard_size=3."),
    ({"name": "fsdp", "sharding": "hybrid", "shard_size": 0}, 8, "cannot divide 8 ranks into groups of 0"),
    ({"name": "fsdp", "sharding": "hybrid"}, 9, "cannot divide 9 ranks into groups of 4 .the ranks of a node."),
    ({"name": "fsdp", "shard_size": 4}, 8, "engine.shard_size=4 needs engine.sharding=hybrid"),
    ({"name": "deepspeed", "sharding": "hybrid"}, 8, "engine.sharding=hybrid is for engine=fsdp, not engine=deepspeed"),
    ({"name": "local", "sharding": "hybrid"}, 1, "engine.sharding=hybrid is for engine=fsdp, not engine=local"),
    ({"name": "local", "offload": "parameters"}, 1, "engine.offload=parameters is not for engine=local"),
    ({"name": "fsdp", "offload": "optimizer"}, 2, "engine.offload=optimizer: FSDP keeps"),
    ({"name": "deepspeed", "offload": "parameters"}, 2, "engine.offload=parameters needs engine.zero_stage=3, and it is 2"),
    ({"name": "deepspeed", "offload": "optimizer", "zero_stage": 0}, 2, "needs engine.zero_stage=1 or higher, and it is 0"),
    ({"name": "deepspeed", "compile": True, "zero_stage": 3}, 2, "engine.compile=true does not go with engine.zero_stage=3"),
    ({"name": "local", "activation_checkpointing": "some"}, 1, "engine.activation_checkpointing=some is unknown"),
    ({"name": "fsdp", "compile": True, "activation_checkpointing": "selective"}, 1, "does not go with engine.compile=true"),
    ({"name": "deepspeed", "zero_stage": 3, "activation_checkpointing": "selective"}, 1, "selective does not go with engine.zero_stage=3"),
]


@pytest.mark.parametrize(("options", "world_size", "message"), BAD)
def test_a_bad_option_is_one_sentence(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], world_size: int, message: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(min(world_size, 4)))
    with pytest.raises(ConfigError, match=message) as caught:
        check_engine(EngineConfig(**options))
    assert "\n" not in str(caught.value)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="engine=deepspeed needs the package deepspeed"):
        check_engine(EngineConfig(name="deepspeed"))


def clipping_of(case: Case) -> float:
    engine: Any = start(case)[0]
    return float(engine._engine.gradient_clipping())


def test_deepspeed_is_always_told_whether_to_clip(folder: Path) -> None:
    """It clips at 1.0 where its configuration says nothing."""
    assert run_ranks(clipping_of, 1, Case(folder, engine="deepspeed", clipping=0.0)) == [0.0]


def waits(case: Case) -> dict[str, int]:
    """Where the host waits for a device in one optimiser step of two micro-batches, each file with its number of times."""
    engine, pair = start(case)
    batches = FixedBatches(2)

    def step() -> None:
        for number, batch in enumerate(batches.next()):
            engine.backward(pair.losses(batch, torch.tensor(257.0))["loss"], boundary=number == 1)
        engine.step(1e-3)

    step()
    with HostWaits() as found:
        step()
    return dict(found.places)


@pytest.mark.parametrize(("engine", "ranks", "options"), [("local", 1, {}), ("fsdp", 2, {"placement": "shard"}), ("deepspeed", 2, {})])
def test_nothing_of_ours_waits_for_the_device(folder: Path, engine: str, ranks: int, options: dict[str, Any]) -> None:
    """transformers asks once per forward (teacher and student, two micro-batches) whether rows are packed; DeepSpeed reads its norm."""
    for found in run_ranks(waits, ranks, Case(folder, engine=engine, **options)):
        assert found.pop("transformers/masking_utils.py") <= 4
        found.pop("deepspeed/runtime/utils.py", None)
        assert not found


def first_steps(case: Case) -> tuple[list[float], int]:
    """Losses and gradient norms of two steps of one micro-batch, and the bytes of activations that the first kept for its backward."""
    engine, pair = start(case)
    batches = FixedBatches(1)
    numbers, sizes = [], []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.nbytes if tensor.ndim > 2 else 0)  # weights are matrices, of which a compiled block keeps references
        return tensor

    for step in range(2):
        (batch,) = batches.next()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = pair.losses(batch, torch.tensor(257.0))["loss"]
        if step == 0:
            kept = sum(sizes)
        engine.backward(loss, boundary=True)
        numbers += [float(loss), float(engine.step(1e-3))]
    return numbers, kept


def eager_and_compiled(case: Case, backend: str) -> tuple[list[tuple[list[float], int]], int]:
    from torch._dynamo.utils import counters

    torch.compile = partial(torch.compile, backend=backend)
    plain = replace(case, compile=False)
    found = [first_steps(replace(plain, checkpointing="none")), first_steps(plain), first_steps(case)]
    return found, int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_train_alike(folder: Path, backend: str) -> None:
    """Sharded, read from files, and with activation checkpointing, which a compilation before sharding would lose.

    Tracing and differentiation are the same for both backends; the C++ of the real one takes half a minute to compile.
    """
    case = Case(folder, engine="fsdp", compile=True, checkpointing="full", lazy=True)
    (((eager, checkpointed, ours), num_graphs),) = run_ranks(eager_and_compiled, 1, case, backend, timeout=400)
    assert ours[0] == pytest.approx(eager[0], rel=1e-5) and num_graphs == 2  # one for all blocks of the student, one for the teacher's
    assert ours[1] < 1.2 * checkpointed[1] < 0.6 * eager[1]


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
