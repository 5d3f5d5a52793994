"""Merging instead of dropping: residuals of query heads folded into kept ones, and layers into one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers_models import family_config, random_plan, random_weights

from minitron.core.plan import PrunePlan, make_plan
from minitron.core.scores import ImportanceScores
from minitron.errors import ArchitectureError
from minitron.models import Family, discover
from minitron.prune import prune_weights
from minitron.prune.merge import LAYER_MERGES, merge_layers
from minitron.prune.proof import random_scores

#: Width of a head in the table's configs.
WIDTH = 16


def plan_by(family: Family, *, heads: list[float], groups: list[float] | None = None, keep: tuple[int, int], merge: str = "paper") -> PrunePlan:
    """A plan in which every layer has the same scores of heads and groups, and ``keep`` heads and groups stay."""
    shape = family.architecture
    scores = random_scores(shape)
    for layer in range(shape.num_layers):
        scores.tensors[f"head.{layer}"] = torch.tensor(heads)
        scores.tensors[f"kv_head.{layer}"] = torch.tensor(groups if groups is not None else heads)
    target = shape.with_coupled(num_heads=keep[0], num_kv_heads=keep[1])
    return make_plan(ImportanceScores(scores.tensors), shape, target, kept_layers=list(range(shape.num_layers)), head_merge=merge)


def heads_of(tensor: torch.Tensor, *, width: int = WIDTH) -> torch.Tensor:
    """Rows by head. [heads, width, ...]"""
    return tensor.view(-1, width, *tensor.shape[1:])


@pytest.mark.parametrize(
    ("keep", "pairs"),
    [
        (7, {7: 8}),  # i from 2K - L + 1 = 7: the weakest kept head and the strongest dropped one
        (6, {5: 8, 6: 7}),
        (5, {3: 8, 4: 7, 5: 6}),
        (4, {1: 8, 2: 7, 3: 6, 4: 5}),  # the range starts at 1
        (3, {1: 6, 2: 5, 3: 4}),  # more heads are dropped than kept: the two weakest of all have no partner
        (2, {1: 4, 2: 3}),
        (1, {1: 2}),
        (8, {}),
    ],
)
def test_ranks_that_are_paired(keep: int, pairs: dict[int, int]) -> None:
    """Rank i takes over from rank 2K - i + 1, for i from max(1, 2K - L + 1) to K. Of 8 heads with their own keys, head 3 is the best, then 7, 0…"""
    order = [3, 7, 0, 5, 1, 6, 2, 4]
    family = discover(family_config("llama", "mha"))
    scores = [0.0] * 8
    for rank, head in enumerate(order):
        scores[head] = 8.0 - rank
    plan = plan_by(family, heads=scores, keep=(keep, keep))
    assert {layer: set(found) for layer, found in plan.head_pairs.items()} == {
        layer: {(order[i - 1], order[j - 1]) for i, j in pairs.items()} for layer in (range(3) if pairs else ())
    }


def test_ranks_run_within_a_group() -> None:
    """8 heads in 2 groups of 4, of which 3 stay: each group's weakest kept head takes over from the one that goes; a dropped group gives nothing."""
    family = discover(family_config("llama", "gqa", kv_heads=2))
    heads = [0.4, 0.1, 0.3, 0.2, 5.0, 8.0, 7.0, 6.0]
    plan = plan_by(family, heads=heads, groups=[1.0, 2.0], keep=(6, 2))
    assert plan.by_layer["head"][0] == [0, 2, 3, 5, 6, 7]
    assert plan.head_pairs == dict.fromkeys(range(3), [(3, 1), (7, 4)])
    fewer = plan_by(family, heads=heads, groups=[1.0, 2.0], keep=(2, 1))
    assert fewer.by_layer["head"][1] == [5, 6] and fewer.by_layer["kv_head"][1] == [1]
    assert set(fewer.head_pairs[1]) == {(5, 4), (6, 7)}


@pytest.mark.parametrize(("merge", "sign"), [("paper", 1.0), ("laco", -1.0)])
def test_arithmetic_by_hand(merge: str, sign: float) -> None:
    """Query head h of a tensor whose every element is h squared: 9 and the dropped 1 become 9 + 8 = 17, or 9 - 8 = 1; keys and values stay."""
    family = discover(family_config("llama", "gqa", kv_heads=2))
    plan = plan_by(family, heads=[0.4, 0.1, 0.3, 0.2, 5.0, 8.0, 7.0, 6.0], keep=(6, 2), merge=merge)
    weights = random_weights(family)
    squares = torch.arange(8.0).square().repeat_interleave(WIDTH)
    weights["model.layers.1.self_attn.q_proj.weight"] = squares[:, None].expand(-1, 96).clone()
    weights["model.layers.1.self_attn.q_proj.bias"] = squares.clone()
    cut = dict(prune_weights(weights.__getitem__, plan, family))
    # kept 0 2 3 5 6 7; 3 takes over from 1, 7 from 4
    expected = torch.tensor([0.0, 4.0, 9.0 + sign * 8.0, 25.0, 36.0, 49.0 + sign * 33.0])
    for name in ("weight", "bias"):
        found = heads_of(cut[f"model.layers.1.self_attn.q_proj.{name}"])
        assert torch.equal(found, expected.view(-1, *[1] * (found.ndim - 1)).expand_as(found))
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight"):
        assert torch.equal(cut[f"model.layers.1.self_attn.{name}"], weights[f"model.layers.1.self_attn.{name}"])
    output = weights["model.layers.1.self_attn.o_proj.weight"].view(96, 8, WIDTH)[:, [0, 2, 3, 5, 6, 7]].flatten(1)
    assert torch.equal(cut["model.layers.1.self_attn.o_proj.weight"], output)


def merged_by_hand(rows: torch.Tensor, plan: PrunePlan, layer: int, *, width: int = WIDTH) -> torch.Tensor:
    """Kept heads of a projection after the merge, in float64."""
    heads = heads_of(rows.double(), width=width)
    result = heads.clone()
    for kept, dropped in plan.head_pairs[layer]:
        change = heads[kept] - heads[dropped]
        result[kept] = heads[kept] + (change if plan.head_merge == "paper" else -change)
    return result[plan.by_layer["head"][layer]].flatten(0, 1)


@pytest.mark.parametrize("merge", ["paper", "laco"])
@pytest.mark.parametrize("keep", [6, 3])
def test_heads_with_keys_of_their_own_merge_those_too(merge: str, keep: int) -> None:
    """MHA: pairs are found among all heads by the scores of their groups, and queries, keys and values are merged."""
    family = discover(family_config("llama", "mha"))
    plan = random_plan(family, num_heads=keep, num_kv_heads=keep, head_merge=merge, seed=4)
    assert plan.head_pairs and all(len(pairs) == min(keep, 8 - keep) for pairs in plan.head_pairs.values())
    weights = random_weights(family)
    cut = dict(prune_weights(weights.__getitem__, plan, family))
    for layer in range(3):
        assert {kept for kept, _ in plan.head_pairs[layer]} <= set(plan.by_layer["head"][layer])
        assert not {dropped for _, dropped in plan.head_pairs[layer]} & set(plan.by_layer["head"][layer])
        for name in ("q_proj", "k_proj", "v_proj"):
            for kind in ("weight", "bias"):
                full = f"model.layers.{layer}.self_attn.{name}.{kind}"
                torch.testing.assert_close(cut[full].double(), merged_by_hand(weights[full], plan, layer), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", ["gqa", "mha"])
def test_fused_queries_keys_and_values_of_phi3(variant: str) -> None:
    """q|k|v in one tensor: the queries' part alone is merged where groups share keys, all three parts where they do not."""
    family = discover(family_config("phi3", variant, kv_heads=2 if variant == "gqa" else 8))
    keep, groups = (6, 2) if variant == "gqa" else (6, 6)
    plan = random_plan(family, num_heads=keep, num_kv_heads=groups, head_merge="paper", seed=2)
    weights = random_weights(family)
    cut = dict(prune_weights(weights.__getitem__, plan, family))
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.qkv_proj.weight"
        size = 8 * WIDTH if variant == "mha" else 2 * WIDTH
        q, k, v = weights[name].split([8 * WIDTH, size, size])
        expected = [merged_by_hand(q, plan, layer)]
        expected += [merged_by_hand(part, plan, layer) if variant == "mha" else part.double() for part in (k, v)]
        torch.testing.assert_close(cut[name].double(), torch.cat(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("merge", ["paper", "laco"])
def test_fused_heads_of_gpt_neox(merge: str) -> None:
    """Queries, keys and values of a head lie together, biases too; the family's hidden channels go with the heads."""
    family = discover(family_config("gpt_neox"))
    plan = random_plan(family, num_heads=5, head_merge=merge, seed=3)
    assert len(plan.head_pairs[0]) == 3
    weights = random_weights(family)
    cut = dict(prune_weights(weights.__getitem__, plan, family, layout=family.layout))
    for layer in range(3):
        name = f"gpt_neox.layers.{layer}.attention.query_key_value"
        expected = merged_by_hand(weights[f"{name}.weight"][:, plan.hidden], plan, layer, width=3 * WIDTH)
        torch.testing.assert_close(cut[f"{name}.weight"].double(), expected, rtol=1e-6, atol=1e-6)
        expected = merged_by_hand(weights[f"{name}.bias"], plan, layer, width=3 * WIDTH)
        torch.testing.assert_close(cut[f"{name}.bias"].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("model_type", "variant"), [("olmo2", "mha"), ("gpt_oss", "gqa"), ("qwen3", "gqa"), ("phi3", "gqa"), ("nemotron_h", "gqa")])
def test_merging_touches_the_projections_alone(model_type: str, variant: str) -> None:
    """Norms over heads, sinks, outputs and everything else are those of the plain cut; keys and values, too, where heads share them."""
    family = discover(family_config(model_type, variant))
    groups = 6 if variant == "mha" else 4
    plan = random_plan(family, hidden_size=64, num_heads=6 if variant == "mha" else 4, num_kv_heads=groups, head_merge="paper", seed=5)
    plain = dataclasses.replace(plan, head_merge="off", head_pairs={})
    weights = random_weights(family)
    merged, dropped = (dict(prune_weights(weights.__getitem__, p, family, layout=family.layout)) for p in (plan, plain))
    changed = {name.rsplit(".", 2)[-2] for name, tensor in merged.items() if not torch.equal(tensor, dropped[name])}
    assert changed == ({"qkv_proj"} if model_type == "phi3" else {"q_proj", "k_proj", "v_proj"} if variant == "mha" else {"q_proj"})
    if model_type == "phi3":
        queries = 4 * WIDTH
        for layer in range(3):
            name = f"model.layers.{layer}.self_attn.qkv_proj.weight"
            assert torch.equal(merged[name][queries:], dropped[name][queries:])


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt_neox", "qwen3_moe"])
def test_off_is_the_plain_cut_bit_for_bit(model_type: str) -> None:
    """And so is a merge where no head goes."""
    family = discover(family_config(model_type))
    weights = random_weights(family)
    sizes = {"num_heads": 4} if model_type == "gpt_neox" else {"num_heads": 4, "num_kv_heads": 2, "hidden_size": 64}
    plan = random_plan(family, seed=1, **sizes)
    assert plan.head_merge == "off" and plan.head_pairs == {}
    merged = random_plan(family, seed=1, head_merge="paper", **sizes)
    assert merged.by_layer == plan.by_layer and merged.hidden == plan.hidden and merged.head_pairs
    plain = dict(prune_weights(weights.__getitem__, plan, family, layout=family.layout))
    for name, tensor in prune_weights(
        weights.__getitem__, dataclasses.replace(merged, head_merge="off", head_pairs={}), family, layout=family.layout
    ):
        assert torch.equal(tensor, plain[name])
    for merge in ("paper", "laco"):
        assert random_plan(family, ffn_size=40, head_merge=merge).head_pairs == {}


def test_an_unknown_merge_is_refused() -> None:
    family = discover(family_config("llama"))
    with pytest.raises(ArchitectureError, match="head_merge=sum is not one of off, paper, laco"):
        random_plan(family, num_heads=4, head_merge="sum")


def test_bf16_heads_merge_in_float32() -> None:
    """1.0 and 0.5 + 2^-8 in bf16: 1 + (1 - 0.50390625) is rounded once."""
    family = discover(family_config("llama", "gqa", kv_heads=2))
    plan = plan_by(family, heads=[0.4, 0.1, 0.3, 0.2, 5.0, 8.0, 7.0, 6.0], keep=(6, 2))
    weights = {name: tensor.bfloat16() for name, tensor in random_weights(family).items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    cut = dict(prune_weights(weights.__getitem__, plan, family))[name]
    assert cut.dtype == torch.bfloat16
    assert torch.equal(cut, merged_by_hand(weights[name], plan, 0).bfloat16())


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_layers_merge_as_printed_as_coded_and_as_their_mean(first: int, m: int) -> None:
    """With θ_j = j: l + m(m+1)/2 for the formula, l + m for LaCo's code, where the last layer remains, and l + m/2 for the mean."""
    tensors = [torch.full((2, 3), float(first + k)) for k in range(m + 1)]
    before = [tensor.clone() for tensor in tensors]
    found = {variant: merge_layers(tensors, variant=variant) for variant in LAYER_MERGES}
    expected = {"rdsc": first + m * (m + 1) / 2, "replace": float(first + m), "mean": first + m / 2}
    assert found.keys() == expected.keys()
    for variant, value in expected.items():
        assert torch.equal(found[variant], torch.full((2, 3), value))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_formula_and_code_agree_on_two_layers_and_differ_on_three() -> None:
    """One layer taken in: θ_{l+1} both ways. The norm of the literal formula on random layers grows as sqrt((m - 1)² + m)."""
    layers = list(torch.randn(4, 300, 300, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(merge_layers(layers[:2], variant="rdsc"), layers[1])
    torch.testing.assert_close(merge_layers(layers[:2], variant="replace"), layers[1])
    for m in (2, 3):
        torch.testing.assert_close(merge_layers(layers[: m + 1], variant="replace"), layers[m], rtol=1e-5, atol=1e-5)
        growth = merge_layers(layers[: m + 1], variant="rdsc").norm() / layers[0].norm()
        assert float(growth) == pytest.approx(((m - 1) ** 2 + m) ** 0.5, rel=0.02)
    assert merge_layers([layer.bfloat16() for layer in layers]).dtype == torch.bfloat16
