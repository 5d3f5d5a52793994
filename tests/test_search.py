"""Search: budgets, enumeration, a diverse choice, and which layers go."""

from __future__ import annotations

import itertools
import math
import random
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
from minitron.search import SearchConfig, TargetConfig, axis_values, budget, enumerate_shapes, explicit_shape, pick_diverse
from minitron.search.enumerate import shapes_of

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


def nemotron_count(layers: int, heads: int, ffn: int, hidden: int) -> int:
    """Parameters of a Nemotron-4 of 8 groups of head width 128: untied embeddings, layer norms with bias, ungated MLP."""
    return 2 * 256_000 * hidden + 2 * hidden + layers * (2 * hidden * heads * 128 + 2 * hidden * 8 * 128 + 2 * hidden * ffn + 4 * hidden)


def test_the_papers_space_holds_18_candidates() -> None:
    """The number that the paper prints; the same set by a loop and the parameter formula."""
    teacher = nemotron_15b()
    space = axis_values(SearchConfig(**PAPER_4B), teacher)
    found = enumerate_shapes(space, teacher, num_parameters=4.0e9, tolerance=0.05)
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
    found = enumerate_shapes(axis_values(SearchConfig(**document), teacher), teacher, num_parameters=wanted, tolerance=0.05)
    assert chosen in {(s.num_layers, s.num_heads, s.ffn_size, s.hidden_size) for s in found}


def test_a_budget_that_nothing_meets_names_the_nearest() -> None:
    """The nearest by brute force, with its size and its distance."""
    teacher = small()
    space = axis_values(SearchConfig(num_layers=[2, 4], hidden_size=[32, 64], ffn_size=[64, 128]), teacher)
    wanted = 40_000.0
    shapes = [teacher.replace(num_layers=n, hidden_size=h, ffn_size=f) for n, h, f in itertools.product([2, 4], [32, 64], [64, 128])]
    best = min(shapes, key=lambda shape: abs(shape.num_parameters - wanted))
    with pytest.raises(ArchitectureError) as caught:
        enumerate_shapes(space, teacher, num_parameters=wanted, tolerance=0.001)
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
    found = enumerate_shapes(space, teacher, num_parameters=teacher.num_parameters * 0.6, tolerance=0.99)
    for shape in found:
        shape.check_within(teacher)
    pairs = {(shape.num_heads, shape.num_kv_heads) for shape in found}
    assert pairs == {(1, 1), (2, 1), (2, 2), (4, 2), (3, 3), (6, 3), (4, 4), (8, 4)}
    with pytest.raises(ArchitectureError, match="holds no shape"):
        enumerate_shapes({**space, "num_heads": [7], "num_kv_heads": [2]}, teacher, num_parameters=1e4, tolerance=0.5)


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
    found = enumerate_shapes(axis_values(SearchConfig(**PAPER_4B), teacher), teacher, num_parameters=4.0e9, tolerance=0.05)
    chosen = pick_diverse(found, 6)
    assert len(chosen) == len(set(shape.name for shape in chosen)) == 6
    assert chosen[0] == found[0] and chosen == [shape for shape in found if shape in chosen]
    assert pick_diverse(found, 6) == chosen
    assert pick_diverse(found, 100) == found and pick_diverse(found, 18) == found

    def smallest_gap(shapes: list[Architecture]) -> float:
        points = [[math.log(shape.size(axis)) for axis in ("layer", "hidden", "ffn", "head", "kv_head")] for shape in shapes]
        return min(math.dist(a, b) for a, b in itertools.combinations(points, 2))

    assert smallest_gap(chosen) > smallest_gap(found[:6])
    best = max(smallest_gap([found[0], *rest]) for rest in itertools.combinations(found[1:], 5))
    assert smallest_gap(chosen) >= best / 2  # what the greedy choice guarantees (Gonzalez 1985)


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
