"""Search: budgets, enumeration, a diverse choice, and which layers go."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_models import family_config, hf_config

from minitron.core.architecture import Architecture
from minitron.core.plan import select_layers
from minitron.errors import ArchitectureError, ConfigError
from minitron.models import discover
from minitron.paths import conf_dir
from minitron.search import SearchConfig, TargetConfig, Workload, axis_values, budget, explicit_shape, find_shapes, limits_of, predicted_costs
from minitron.search.enumerate import Found, diverse_points, positions, within
from minitron.search.grid import Grid, grid_of
from minitron.search.prediction import QUANTITIES, Seconds, predict

#: Minitron 4B's space: arXiv 2407.14679, table 9.
PAPER_4B: dict[str, list[Any]] = {
    "num_layers": [29, 30, 31, 32],
    "num_heads": [24, 32, 48],
    "ffn_ratio": [2.5, 3, 3.5, 4],
    "hidden_size": [2560, 3072, 3584, 4096, 4608],
}


def nemotron_15b() -> Architecture:
    """The papers' teacher, from the config that ships."""
    from transformers import AutoConfig

    values = yaml.safe_load((conf_dir() / "teacher" / "nemotron_4_15b.yaml").read_text())["config"]
    return discover(AutoConfig.for_model(values.pop("model_type"), **values)).architecture


def small() -> Architecture:
    """A tiny Llama: 4 layers, hidden 64, ffn 128, 8 heads in 4 groups."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    return discover(LlamaConfig(vocab_size=100, head_dim=8, **sizes)).architecture


def shapes_of(space: dict[str, list[Any]], teacher: Architecture) -> list[Architecture]:
    """Every shape of a space."""
    return Found(grid_of(space, teacher), 0).shapes()


WORK = Workload(1, 128, "h100")


def found_in(search: SearchConfig, teacher: Architecture, **target: Any) -> list[Architecture]:
    """What a search finds, nearest first."""
    return find_shapes(search, TargetConfig(**target), teacher, workload=WORK).shapes()


def nemotron_count(layers: int, heads: int, ffn: int, hidden: int) -> int:
    """Parameters of a Nemotron-4 of 8 groups of head width 128: untied embeddings, layer norms with bias, ungated MLP."""
    return 2 * 256_000 * hidden + 2 * hidden + layers * (2 * hidden * heads * 128 + 2 * hidden * 8 * 128 + 2 * hidden * ffn + 4 * hidden)


def test_the_papers_space_holds_18_candidates() -> None:
    """The number that the paper prints; the same set by a loop and the parameter formula."""
    teacher = nemotron_15b()
    found = found_in(SearchConfig(**PAPER_4B), teacher, num_parameters=4.0e9)
    assert len(found) == 18
    assert all(3.8e9 <= shape.num_parameters <= 4.2e9 and shape.num_kv_heads == 8 for shape in found)
    expected = set()
    for layers, heads, ratio, hidden in itertools.product(*PAPER_4B.values()):
        if abs(nemotron_count(layers, heads, round(ratio * hidden), hidden) - 4.0e9) <= 0.05 * 4.0e9:
            expected.add((layers, heads, round(ratio * hidden), hidden))
    assert {(s.num_layers, s.num_heads, s.ffn_size, s.hidden_size) for s in found} == expected
    assert (32, 24, 9216, 3072) in expected  # Minitron 4B itself
    distances = [abs(shape.num_parameters - 4.0e9) for shape in found]
    assert distances == sorted(distances)


@pytest.mark.parametrize("name", ["minitron_4b", "minitron_8b"])
def test_the_shipped_spaces_are_the_papers(name: str) -> None:
    document = yaml.safe_load((conf_dir() / "search" / f"{name}.yaml").read_text())
    document.pop("defaults")
    paper = PAPER_4B if name == "minitron_4b" else {**PAPER_4B, "num_heads": [32, 48], "hidden_size": [4096, 4608, 5120, 5632, 6144]}
    assert document == paper
    teacher = nemotron_15b()
    wanted, chosen = (8.0e9, (32, 48, 16384, 4096)) if "8b" in name else (4.0e9, (32, 24, 9216, 3072))
    found = found_in(SearchConfig(**document), teacher, num_parameters=wanted)
    assert chosen in {(s.num_layers, s.num_heads, s.ffn_size, s.hidden_size) for s in found}


def test_a_budget_that_nothing_meets_names_the_nearest() -> None:
    """The nearest by brute force, with its size and its distance."""
    teacher = small()
    space = SearchConfig(num_layers=[2, 4], hidden_size=[32, 64], ffn_size=[64, 128])
    wanted = 40_000.0
    shapes = [teacher.replace(num_layers=n, hidden_size=h, ffn_size=f) for n, h, f in itertools.product([2, 4], [32, 64], [64, 128])]
    best = min(shapes, key=lambda shape: abs(shape.num_parameters - wanted))
    with pytest.raises(ArchitectureError) as caught:
        found_in(space, teacher, num_parameters=wanted, tolerance=0.001)
    assert best.name in str(caught.value) and f"{best.num_parameters:,}" in str(caught.value) and "40,000" in str(caught.value)
    off = (best.num_parameters - wanted) / wanted
    assert f"{off:+.1%}" in str(caught.value)


def test_budgets() -> None:
    teacher = small()
    assert budget(TargetConfig(num_parameters=1000.0), teacher) == 1000.0
    assert budget(TargetConfig(ratio=0.25), teacher) == pytest.approx(teacher.num_parameters / 4)
    assert budget(TargetConfig(ratio=1.0), teacher) == teacher.num_parameters
    refused: list[tuple[dict[str, float], str]] = [
        ({}, "give target.num_parameters or target.ratio"),
        ({"num_parameters": 10.0, "ratio": 0.5}, "both"),
        ({"num_parameters": teacher.num_parameters + 1.0}, f"larger than the teacher, which has {teacher.num_parameters:,}"),
        ({"ratio": 1.5}, "larger than the teacher"),
        ({"ratio": -0.5}, "not positive"),
        ({"num_parameters": 0.0}, "not positive"),
        ({"ratio": 0.5, "tolerance": 1.0}, "target.tolerance=1.0"),
        ({"ratio": 0.5, "tolerance": -0.1}, "target.tolerance=-0.1"),
    ]
    for values, words in refused:
        with pytest.raises(ConfigError, match=words):
            budget(TargetConfig(**values), teacher)  # type: ignore[arg-type]


def test_explicit_target_keeps_what_is_not_given() -> None:
    teacher = small()
    shape = explicit_shape(TargetConfig(name="explicit", hidden_size=48, num_layers=3), teacher)
    assert shape == teacher.replace(hidden_size=48, num_layers=3)
    assert (shape.ffn_size, shape.num_heads, shape.num_kv_heads, shape.head_dim) == (128, 8, 4, 8)
    with pytest.raises(ConfigError, match="needs at least one of target.num_layers"):
        explicit_shape(TargetConfig(name="explicit"), teacher)
    for sizes, words in (
        ({"hidden_size": 65}, "target.hidden_size=65 is not between 1 and the teacher's 64"),
        ({"num_layers": 0}, "target.num_layers=0"),
        ({"num_heads": 6}, "num_heads=6 does not divide into num_kv_heads=4 groups"),
        ({"num_kv_heads": 2}, "8 heads over 2 groups"),
    ):
        with pytest.raises(ArchitectureError, match=words):
            explicit_shape(TargetConfig(name="explicit", **sizes), teacher)  # type: ignore[arg-type]


def test_spaces() -> None:
    teacher = small()
    values = axis_values(SearchConfig(divisor=16), teacher)
    assert values["num_heads"] == [8] and values["num_kv_heads"] == [4]  # not searched unless asked for
    assert all(size % 16 == 0 and size <= 64 for size in values["hidden_size"]) and 64 in values["hidden_size"]
    assert set(values["num_layers"]) == {1, 2, 3, 4}
    heads = axis_values(SearchConfig(axes=["head", "kv_head"]), teacher)
    assert heads["num_heads"] == [4, 8] and set(heads["num_kv_heads"]) == {1, 2, 3, 4} and heads["num_layers"] == [4]
    refused: list[tuple[type[Exception], dict[str, Any], str]] = [
        (ConfigError, {"axes": ["layer", "width"]}, "search.axes has 'width'"),
        (ConfigError, {"ffn_size": [64], "ffn_ratio": [2.0]}, "both set"),
        (ArchitectureError, {"hidden_size": [64, 128]}, "search.hidden_size has 128, which is not between 1 and the teacher's 64"),
        (ArchitectureError, {"num_layers": [0]}, "search.num_layers has 0"),
    ]
    for kind, given, words in refused:
        with pytest.raises(kind, match=words):
            axis_values(SearchConfig(**given), teacher)


def test_every_enumerated_shape_can_be_cut() -> None:
    """Heads divide into groups and never exceed the teacher's per group, whatever the space says."""
    teacher = small()
    space = {"num_layers": [4], "hidden_size": [64], "ffn_size": [128, 256], "num_heads": [1, 2, 3, 4, 5, 6, 7, 8], "num_kv_heads": [1, 2, 3, 4]}
    found = shapes_of(space, teacher)
    for shape in found:
        shape.check_within(teacher)
    pairs = {(shape.num_heads, shape.num_kv_heads) for shape in found}
    assert pairs == {(1, 1), (2, 1), (2, 2), (4, 2), (3, 3), (6, 3), (4, 4), (8, 4)}
    with pytest.raises(ArchitectureError, match="holds no shape"):
        within(grid_of({**space, "num_heads": [7], "num_kv_heads": [2]}, teacher), [], WORK)


def coupled() -> Architecture:
    """A tiny gpt-neox: hidden channels are 16 times the heads, every head has its own keys and values."""
    return discover(family_config("gpt_neox")).architecture


def test_coupled_sizes_follow_in_an_explicit_target() -> None:
    """128 channels, 8 heads: whichever of them is given."""
    teacher = coupled()
    for given in ({"hidden_size": 96}, {"num_heads": 6}, {"num_kv_heads": 6}, {"hidden_size": 96, "num_heads": 6, "num_kv_heads": 6}):
        shape = explicit_shape(TargetConfig(name="explicit", **given), teacher)  # type: ignore[arg-type]
        assert (shape.hidden_size, shape.num_heads, shape.num_kv_heads, shape.ffn_size) == (96, 6, 6, 160)
    for given, words in (
        ({"hidden_size": 96, "num_heads": 4}, "ties hidden_size to 16 .* num_heads: hidden_size=96 and num_heads=4 do not go together"),
        ({"hidden_size": 100}, "hidden_size=100 and num_heads=8"),
        ({"num_heads": 4, "num_kv_heads": 2}, "ties num_kv_heads to num_heads: num_kv_heads=2 and num_heads=4"),
    ):
        with pytest.raises(ArchitectureError, match=words):
            explicit_shape(TargetConfig(name="explicit", **given), teacher)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{"axes": ["hidden"]}, {"axes": ["head"]}, {"axes": ["kv_head"]}, {"axes": ["hidden", "head", "kv_head"]}])
def test_coupled_sizes_follow_in_the_grid(given: dict[str, Any]) -> None:
    """Every whole number of heads from a quarter on, whichever of the coupled axes is searched, each once."""
    teacher = coupled()
    found = shapes_of(axis_values(SearchConfig(divisor=16, **given), teacher), teacher)
    assert sorted((shape.hidden_size, shape.num_heads, shape.num_kv_heads) for shape in found) == [(16 * n, n, n) for n in range(2, 9)]
    for shape in found:
        shape.check_within(teacher)


def test_coupled_sizes_that_are_all_given_must_agree() -> None:
    teacher = coupled()
    found = shapes_of(axis_values(SearchConfig(axes=[], hidden_size=[64, 72, 96], num_heads=[4, 5]), teacher), teacher)
    assert [(shape.hidden_size, shape.num_heads, shape.num_kv_heads) for shape in found] == [(64, 4, 4)]
    shared = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_shared_experts": 1, "first_k_dense_replace": 1}
    teacher = discover(hf_config("glm4_moe", **shared)).architecture
    found = shapes_of(axis_values(SearchConfig(axes=["expert_ffn"], divisor=16), teacher), teacher)
    assert [(shape.expert_ffn_size, shape.shared_ffn_size, shape.ffn_size) for shape in found] == [(16, 16, 160), (32, 32, 160), (48, 48, 160)]


def test_experts_in_the_grid() -> None:
    """Numbers of experts, their neurons, and a shared expert's; never fewer experts than a token is sent to."""
    teacher = discover(family_config("qwen2_moe")).architecture
    assert (teacher.num_experts, teacher.num_experts_per_token, teacher.expert_ffn_size, teacher.shared_ffn_size) == (4, 2, 48, 56)
    space = axis_values(SearchConfig(axes=["expert", "expert_ffn", "shared_ffn"], divisor=16), teacher)
    assert space["num_experts"] == [1, 2, 3, 4] and space["expert_ffn_size"] == [16, 32, 48] and space["shared_ffn_size"] == [16, 32, 48, 56]
    found = shapes_of(space, teacher)
    sizes = {(shape.num_experts, shape.expert_ffn_size, shape.shared_ffn_size) for shape in found}
    assert sizes == set(itertools.product([2, 3, 4], [16, 32, 48], [16, 32, 48, 56])) and len(found) == 36
    for shape in found:
        shape.check_within(teacher)
        experts = 2 * (shape.num_experts * 3 * 96 * shape.expert_ffn_size + 96 * shape.num_experts + 3 * 96 * shape.shared_ffn_size)
        whole = 2 * (4 * 3 * 96 * 48 + 96 * 4 + 3 * 96 * 56)
        assert teacher.num_parameters - shape.num_parameters == whole - experts  # two of the three layers are sparse
    given = axis_values(SearchConfig(num_experts=[3], expert_ffn_size=[24, 48], axes=[]), teacher)
    assert {(shape.num_experts, shape.expert_ffn_size) for shape in shapes_of(given, teacher)} == {(3, 24), (3, 48)}
    with pytest.raises(ArchitectureError, match="search.num_experts has 5, which is not between 1 and the teacher's 4"):
        axis_values(SearchConfig(num_experts=[5]), teacher)
    dense = axis_values(SearchConfig(axes=["layer", "expert"]), small())
    assert dense["num_experts"] == [0] and len(shapes_of(dense, small())) == 4
    with pytest.raises(ArchitectureError, match="num_experts=1 is fewer than the 2 experts that every token is sent to"):
        explicit_shape(TargetConfig(name="explicit", num_experts=1), teacher)


def test_diverse_choice() -> None:
    """As many as asked for, the nearest to the budget among them, the same each time, and better spread than the nearest ones."""
    teacher = nemotron_15b()
    found = find_shapes(SearchConfig(**PAPER_4B), TargetConfig(num_parameters=4.0e9), teacher, workload=WORK)
    chosen = diverse_points(found.grid, 6)
    assert len(set(chosen)) == 6 and chosen[0] == 0 and chosen == sorted(chosen)
    assert diverse_points(found.grid, 6) == chosen
    assert diverse_points(found.grid, 100) == diverse_points(found.grid, 18) == list(range(18))
    assert found.diverse(6) == [found.shapes()[index] for index in chosen]
    places = positions(found.grid)
    logs = [[math.log(max(1, shape.size(axis))) for axis in ("layer", "hidden", "ffn", "head")] for shape in found.shapes()]
    extent = [max(column) - min(column) for column in zip(*logs, strict=True)]

    def smallest_gap(points: Any) -> float:
        scaled = [[value / width for value, width in zip(logs[point], extent, strict=True)] for point in points]
        return min(math.dist(a, b) for a, b in itertools.combinations(scaled, 2))

    assert smallest_gap(chosen) == pytest.approx(min(math.dist(places[a], places[b]) for a, b in itertools.combinations(chosen, 2)))
    assert smallest_gap(chosen) > smallest_gap(range(6))
    best = max(smallest_gap([0, *rest]) for rest in itertools.combinations(range(1, 18), 5))
    assert smallest_gap(chosen) >= best / 2  # what the greedy choice guarantees (Gonzalez 1985)
    odd = found.diverse(6, allowed=lambda shape: shape.num_layers != found.shapes()[0].num_layers)
    assert len(odd) == 6 and all(shape.num_layers != found.shapes()[0].num_layers for shape in odd)


@pytest.mark.parametrize("model_type", ["llama", "nemotron", "gemma2", "qwen2_moe", "mixtral", "gpt_neox", "nemotron_h", "qwen3_moe"])
def test_the_grid_counts_as_single_shapes_do(model_type: str) -> None:
    """Every quantity of every point equals that of the shape, kept layers of hybrids among them."""
    teacher = discover(family_config(model_type)).architecture
    axes = ["layer", "hidden", "ffn", "head", "kv_head", "expert", "expert_ffn", "shared_ffn"]
    if any("hidden" == coupling.axis for coupling in teacher.couplings):
        axes.remove("ffn")
    draw = random.Random(0)
    kept = {depth: tuple(sorted(draw.sample(range(teacher.num_layers), depth))) for depth in range(1, teacher.num_layers + 1)}
    grid = grid_of(axis_values(SearchConfig(axes=axes, divisor=16), teacher), teacher, kept=kept)
    assert len(grid) > 20
    columns: dict[str, Any] = {name: getattr(grid, name) for name in ("num_parameters", "num_non_embedding_parameters", "num_active_parameters")}
    flops, cache = grid.flops_per_token(64), grid.kv_cache_bytes(batch_size=3, sequence_length=64)
    for index in draw.sample(range(len(grid)), 20):
        shape = grid.shape(index)
        assert shape.kept_layers == kept[shape.num_layers]
        assert {name: int(column[index]) for name, column in columns.items()} == {name: getattr(shape, name) for name in columns}
        assert flops[index] == pytest.approx(shape.flops_per_token(64), rel=1e-12)
        assert cache[index] == shape.kv_cache_bytes(batch_size=3, sequence_length=64)
    assert grid.num_parameters.dtype.kind == "i"


def test_a_million_points_take_seconds() -> None:
    """The 15B teacher on a fine grid: as many points as the product says, the counts right, in under ten seconds."""
    teacher = nemotron_15b()
    wide = SearchConfig(
        num_layers={"from": 13, "to": 32, "step": 1},
        hidden_size={"from": 1024, "to": 6144, "step": 128},
        ffn_size={"from": 4096, "to": 24576, "step": 512},
        num_heads=[16, 24, 32, 40, 48],
        num_kv_heads=[4, 8],
    )
    started = time.process_time()
    found = find_shapes(wide, TargetConfig(num_parameters=4.0e9, tolerance=0.01), teacher, workload=WORK)
    shapes = found.diverse(20)
    assert time.process_time() - started < 10.0
    assert 7 == len({(s, g) for s in (16, 24, 32, 40, 48) for g in (4, 8) if s % g == 0 and s // g <= 6})
    assert found.num_points == 20 * 41 * 41 * 7
    assert len(shapes) == 20 and all(abs(shape.num_parameters - 4.0e9) <= 0.04e9 for shape in shapes)
    with pytest.raises(ConfigError, match="points, more than 20,000,000"):
        grid_of({**axis_values(wide, teacher), "ffn_size": list(range(1, 24577))}, teacher)


def roofline(teacher: Architecture, shape: Architecture, batch: int, length: int) -> tuple[float, float]:
    """Decode and prefill seconds of a dense untied Llama or Nemotron on an H100, spelt out."""
    head = shape.hidden_size * shape.vocab_size
    blocks = shape.num_non_embedding_parameters
    matrices = sum(math.prod(spec.shape(shape.size)) for spec in teacher.layout.by_layer[0] if len(spec.dims) == 2) * shape.num_layers  # type: ignore[union-attr]
    cache = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * batch * length * 2
    attention = 4 * length * shape.num_heads * shape.head_dim * shape.num_layers * batch
    decode = max(2 * batch * (matrices + head) / 989.5e12, 2 * (blocks + head) / 3.35e12) + max(attention / 989.5e12, cache / 3.35e12)
    return decode, max(batch * length * shape.flops_per_token(length) / 989.5e12, 2 * (blocks + head) / 3.35e12)


def test_predicted_costs() -> None:
    """Memory and roofline times by hand; small batches are bound by memory, large ones by arithmetic."""
    teacher = nemotron_15b()
    shape = teacher.replace(hidden_size=3072, ffn_size=9216, num_heads=24)
    for batch, length in ((1, 4096), (512, 1024)):
        costs = predicted_costs(shape, teacher, Workload(batch, length, "h100"))
        decode, prefill = roofline(teacher, shape, batch, length)
        assert costs["latency_ms"] == pytest.approx(1e3 * decode) and costs["prefill_ms"] == pytest.approx(1e3 * prefill)
        assert costs["throughput"] == pytest.approx(batch / decode)
        cache = 2 * 2 * 32 * 8 * 128 * batch * length
        assert costs["memory_gb"] == pytest.approx((2 * 4_190_509_056 + cache) / 1e9) and costs["kv_cache_bytes"] == cache
    assert predicted_costs(shape, teacher, Workload(1, 4096, "measured")).keys() == costs.keys() - {"latency_ms", "prefill_ms", "throughput"}
    moe = discover(family_config("mixtral")).architecture  # 4 experts, 2 a token
    sizes = Grid.of_shapes([moe], moe)
    experts = 3 * 4 * 3 * 96 * 160
    whole = 2.0 * (moe.num_non_embedding_parameters + 96 * 128)
    assert sizes.read_bytes(1)[0] == whole - 2 * experts / 2
    assert sizes.read_bytes(3)[0] == whole - 2 * experts / 8  # a half, cubed, of the experts is used by none of three tokens


def test_limits() -> None:
    """All limits hold at once, as brute force says; bands and bounds; the nearest to the first limit comes first."""
    teacher = small()
    search = SearchConfig(axes=["layer", "hidden", "ffn", "head", "kv_head"], divisor=8)
    space = grid_of(axis_values(search, teacher), teacher)
    everything = Found(space, 0).shapes()
    limits: dict[str, Any] = {
        "memory_gb": 0.00021,
        "flops_per_token": {"around": 180_000, "tolerance": 0.1},
        "throughput": 1.7e7,
        "num_non_embedding_parameters": {"at_least": 60_000},
    }
    found = found_in(search, teacher, ratio=0.5, tolerance=0.2, limits=limits)
    wanted = teacher.num_parameters / 2

    def keeps(shape: Architecture) -> bool:
        memory = (2 * shape.num_parameters + shape.kv_cache_bytes(batch_size=1, sequence_length=128)) / 1e9
        good = abs(shape.num_parameters - wanted) <= 0.2 * wanted and memory <= 0.00021 and shape.num_non_embedding_parameters >= 60_000
        return good and abs(shape.flops_per_token(128) - 180_000) <= 18_000 and 1 / roofline(teacher, shape, 1, 128)[0] >= 1.7e7

    assert {shape.name for shape in found} == {shape.name for shape in everything if keeps(shape)}
    assert 0 < len(found) < len([shape for shape in everything if abs(shape.num_parameters - wanted) <= 0.2 * wanted])
    distances = [abs(shape.num_parameters - wanted) for shape in found]
    assert distances == sorted(distances)
    alone = found_in(search, teacher, limits={"num_parameters": 30_000})
    assert alone[0].num_parameters == max(s.num_parameters for s in everything if s.num_parameters <= 30_000)
    grid = Grid.of_shapes(everything, teacher)
    for quantity, kind in QUANTITIES.items():  # `grows` is true of every quantity: nothing that is cut is above the teacher
        values, most = predict(grid, quantity, WORK), predict(Grid.of_shapes([teacher], teacher), quantity, WORK)[0]
        assert (values <= most).all() if kind.grows else (values >= most).all()


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"limits": {"latency": 5}}, "target.limits has 'latency'; did you mean 'latency_ms'"),
        ({"limits": {"memory_gb": "small"}}, "target.limits.memory_gb: at_most='small' is not a positive number"),
        ({"limits": {"memory_gb": {"below": 3}}}, "target.limits.memory_gb has 'below'"),
        ({"limits": {"memory_gb": {"tolerance": 0.1}}}, "give at_most, at_least or around"),
        ({"limits": {"memory_gb": {"around": 1.0, "at_most": 2.0}}}, "give around, or at_most and at_least"),
        ({"limits": {"memory_gb": {"at_least": 3.0, "at_most": 2.0}}}, "at_least is above at_most"),
        ({"limits": {"num_parameters": {"at_least": 1e9}}}, "at_least: 1000000000.0} is larger than the teacher, which has"),
        ({"ratio": 0.5, "limits": {"num_parameters": 1000}}, "contradict each other"),
        ({"ratio": 0.5, "batch_size": 0}, "target.batch_size=0 must be at least 1"),
        ({"ratio": 0.5, "device": "h101"}, "target.device=h101 is unknown; did you mean 'h100'"),
    ],
)
def test_limits_that_cannot_work(target: dict[str, Any], words: str) -> None:
    config = TargetConfig(**target)
    with pytest.raises(ConfigError, match=re.escape(words)):
        limits_of(config, small(), config.workload(128))


def test_limits_that_nothing_meets_are_named() -> None:
    teacher = small()
    with pytest.raises(ArchitectureError) as caught:
        found_in(SearchConfig(axes=["layer"]), teacher, ratio=0.9, tolerance=0.2, limits={"memory_gb": 0.0002})
    said = str(caught.value)
    assert (
        "though each of these alone is met by some shape" in said and "outside target.limits.memory_gb=0.0002" in said and "the nearest is l" in said
    )


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"num_heads": [4, 6]}, ArchitectureError, "search.num_heads has 6, which does not divide into 4 key-value groups"),
        ({"num_kv_heads": [2, 4]}, ArchitectureError, "search.num_kv_heads has 2, over which 8 heads do not spread"),
        ({"num_candidates": 0}, ConfigError, "search.num_candidates=0"),
        ({"divisor": 0}, ConfigError, "search.divisor=0"),
        ({"divisor": {"width": 8}}, ConfigError, "search.divisor has 'width'"),
        ({"ffn_size": {"from": 8, "until": 16}}, ConfigError, "search.ffn_size"),
        ({"ffn_size": {"from": 8, "to": 16, "step": 0}}, ConfigError, "step, the last at least 1"),
        ({"ffn_size": {"shares": [0.5, 1.5]}}, ConfigError, "not a list of shares"),
        ({"ffn_size": []}, ConfigError, "holds no value"),
    ],
)
def test_spaces_that_cannot_work(given: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=re.escape(words)):
        axis_values(SearchConfig(**given), small())


def test_ranges_shares_and_divisors() -> None:
    values = axis_values(
        SearchConfig(
            axes=["shared_ffn"],
            num_layers={"from": 2, "to": 4},
            hidden_size={"shares": [0.5, 0.7, 1.0]},
            ffn_size={"from": 32, "to": 128, "step": 48},
            divisor={"hidden": 16},
        ),
        small(),
    )
    assert values["num_layers"] == [2, 3, 4] and values["hidden_size"] == [32, 48, 64] and values["ffn_size"] == [32, 80, 128]


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("last", [0, 2])
def test_layer_selection_equals_brute_force(first: int, last: int) -> None:
    """one_shot loses the least of all subsets, contiguous the least of all windows; protected layers stay."""
    total = 9
    draw = random.Random(first * 10 + last)
    scores = [draw.random() for _ in range(total)]
    for keep in range(first + last, total + 1):
        drop, allowed = total - keep, range(first, total - last)
        subsets = list(itertools.combinations(allowed, drop))
        for selection, choices in {"one_shot": subsets, "contiguous": [s for s in subsets if not s or s[-1] - s[0] == drop - 1]}.items():
            best = min(choices, key=lambda s: sum(scores[i] for i in s))
            kept = select_layers(torch.tensor(scores, dtype=torch.float64), keep, selection=selection, protect_first=first, protect_last=last)
            assert kept == [i for i in range(total) if i not in best], (selection, keep)
    if first + last:
        with pytest.raises(ArchitectureError, match=f"depth.protect_first={first} and depth.protect_last={last} leave {total - first - last}"):
            select_layers(torch.tensor(scores), first + last - 1, protect_first=first, protect_last=last)


def test_ties_among_layers_drop_the_first() -> None:
    assert select_layers(torch.ones(4), 2) == [2, 3]
    assert select_layers(torch.tensor([0.0, 1.0, 0.0, 1.0]), 3, selection="contiguous") == [1, 2, 3]


TABLE_19 = """32/32/12800/5120 32/32/13824/4608 32/48/11520/4608 32/48/16384/4096 31/32/12800/5120 31/32/16128/4608 31/48/13824/4608 31/48/16384/4096
30/32/12800/5120 30/32/16128/4608 30/48/13824/4608 30/48/16384/4096 29/32/12800/5120 29/32/16128/4608 29/48/13824/4608"""


def test_the_papers_8b_candidates() -> None:
    """Its table 19 holds exactly the shapes of its 8B space between 7.8e9 and 8.5e9 parameters; 5% around 8.0e9 holds 18, and not all of these."""
    search = SearchConfig(**{**PAPER_4B, "num_heads": [32, 48], "hidden_size": [4096, 4608, 5120, 5632, 6144]})
    table = {tuple(map(int, row.split("/"))) for row in TABLE_19.split()}
    found = found_in(search, nemotron_15b(), limits={"num_parameters": {"at_least": 7.8e9, "at_most": 8.5e9}})
    assert {(s.num_layers, s.num_heads, s.ffn_size, s.hidden_size) for s in found} == table and len(found) == 15
    assert len(found_in(search, nemotron_15b(), num_parameters=8.0e9)) == 18


def test_measured_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models a width, whatever the depth; the rest in a straight line; the limit holds for what was measured."""
    from minitron.search import measurement

    config = hf_config("llama", layers=8, hidden=64, ffn=96)
    family = discover(config)
    teacher = family.architecture
    real = measurement._seconds(measurement._random_model(config, family, teacher), batch_size=2, sequence_length=16)
    assert 0 < real.decode < 10 and 0 < real.prefill < 10
    timed: list[tuple[int, int]] = []

    def seconds(model: Any, *, batch_size: int, sequence_length: int) -> Seconds:
        layers, ffn = model.config.num_hidden_layers, model.config.intermediate_size
        timed.append((layers, ffn))
        return Seconds(1.0 + layers * ffn * sequence_length * batch_size, 0.5 + layers * ffn)

    monkeypatch.setattr(measurement, "_seconds", seconds)
    measure = measurement.measurer(config, family, batch_size=2, sequence_length=16)
    assert measure(teacher) == Seconds(1.0 + 8 * 96 * 32, 0.5 + 8 * 96) and timed == [(1, 96), (3, 96)]
    target = TargetConfig(limits={"latency_ms": 400e3}, device="measured")
    search = SearchConfig(num_layers=[4, 6, 8], ffn_size=[32, 64, 96])
    found = find_shapes(search, target, teacher, workload=target.workload(16, measure=lambda **given: measure)).shapes()
    assert {(s.num_layers, s.ffn_size) for s in found} == {(n, f) for n in (4, 6, 8) for f in (32, 64, 96) if 0.5 + n * f <= 400}
    assert [s.num_layers * s.ffn_size for s in found][0] == 384 and len(timed) == 6


def test_depth_that_scores_cannot_reach_is_left_out() -> None:
    kept = {2: (0, 3), 3: (0, 1, 3)}
    target = TargetConfig(limits={"num_parameters": 1e9})
    found = find_shapes(SearchConfig(num_layers=[2, 3, 4]), target, small(), workload=WORK, kept=kept).shapes()
    assert {(shape.num_layers, shape.kept_layers) for shape in found} == set(kept.items())
    with pytest.raises(ArchitectureError, match="the search tries 4 layers; the depth scores and depth.protect allow 2, 3"):
        find_shapes(SearchConfig(num_layers=[4]), target, small(), workload=WORK, kept=kept)


def test_the_command_from_a_config_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Candidates of the 4B space without weights, scores or text; the preview says the same and writes nothing."""
    from minitron.cli import main

    run = tmp_path / "run"
    assert main(["search", "experiment=minitron_4b", f"run_dir={run}", "--dry-run", "--json"]) == 0
    preview = json.loads(capsys.readouterr().out)
    assert not run.exists()
    assert main(["search", "experiment=minitron_4b", f"run_dir={run}"]) == 0
    rows = [json.loads(line) for line in (run / "candidates" / "candidates.jsonl").read_text().splitlines()]
    assert len(rows) == 18 == preview["within_limits"] and all(row["kept_layers"] is None for row in rows)
    assert [(row["name"], row["num_parameters"]) for row in rows] == [(row["name"], row["num_parameters"]) for row in preview["candidates"]]
    for row, told in zip(rows, preview["candidates"], strict=True):
        assert row["costs"] == {key: told[key] for key in row["costs"]} and {"latency_ms", "memory_gb", "flops_per_token"} <= row["costs"].keys()
    tokens = 1152 * 4096
    body, head = (nemotron_15b().flops_per_token(4096, head=part) for part in (False, True))
    students = sum(nemotron_15b().replace(**Architecture.from_dict(row["architecture"]).to_dict()).flops_per_token(4096) for row in rows)
    held = 256 * 4096
    alone = 400 * tokens * (3 * students + 18 * head) + 9 * held * (students + 18 * head)
    assert preview["ranking_flops"]["independent"] == pytest.approx(alone)
    saved = (17 * 400 * tokens + (9 * 18 - 1) * held) * body + (18 - 5) * (400 * tokens + 9 * held) * (head - body)  # a head for every four
    assert preview["ranking_flops"]["shared"] == pytest.approx(alone - saved)
    assert main(["search", "experiment=minitron_4b", f"run_dir={run}", "--dry-run", "ranking.method=halving"]) == 0
    table = capsys.readouterr().out
    assert "240 shapes in the space, 18 keep the target, 18 chosen" in table and "l32-h3072-f9216-a24-k8" in table and "4,190,509,056" in table
