"""The proof: removing units from the computation and cutting them out agree for every family, and for any plan."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_models import FAMILIES, VARIANTS, family_config, hf_config, random_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minitron.core.axes import Segment
from minitron.core.plan import PrunePlan, make_plan
from minitron.errors import ArchitectureError
from minitron.models import Family, NormKind, discover, family, layouts
from minitron.models.layouts import LayoutNote
from minitron.models.load import model_from_weights
from minitron.models.stored import to_stored
from minitron.models.weights import WeightReader, write_weights
from minitron.prune import masking, proof, prove, prune_weights, target_config
from minitron.prune.proof import difference_of, examine, random_scores, tiny_teacher

ATTENTION = {"layer", "hidden", "head", "kv_head", "all"}
#: Axes of families that have more, or others, than one MLP a layer.
MLP = {
    "mixtral": {"expert", "expert_ffn"},
    "olmoe": {"expert", "expert_ffn"},
    "gpt_oss": {"expert", "expert_ffn"},
    "qwen3_moe": {"ffn", "expert", "expert_ffn"},
    "qwen2_moe": {"ffn", "expert", "expert_ffn", "shared_ffn"},
    "nemotron_h": {"ffn", "expert", "expert_ffn", "shared_ffn"},
}
ROWS = [(model_type, variant) for model_type in FAMILIES for variant in VARIANTS if (model_type, variant) != ("gpt_neox", "mha")]  # it is always


@pytest.mark.parametrize(("model_type", "variant"), ROWS)
def test_every_axis_alone_and_all_together(model_type: str, variant: str) -> None:
    """Float32 rounding of logits of order one to ten, with one tolerance for all."""
    found = examine(family_config(model_type, variant))
    axes = ATTENTION | MLP.get(model_type, {"ffn"})
    if variant == "mqa" and model_type != "gpt_neox":
        axes = axes - {"kv_head"}
    assert found.refused == {} and found.passed
    assert set(found.differences) == axes
    assert max(found.differences.values()) < 1e-4


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_proof_would_see_other_units_on_any_axis(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masking by another plan of the same sizes is refused on every axis: none of the differences above is small for want of effect."""

    def masked_otherwise(model: nn.Module, pruned: nn.Module, found: Family, plan: PrunePlan, tokens: torch.Tensor) -> torch.Tensor:
        kept = list(range(len(plan.layer)))  # the proof keeps the last layer and drops the second
        scores = random_scores(found.architecture, seed=9)
        other = make_plan(scores, found.architecture, plan.architecture.replace(num_layers=len(kept)), kept_layers=kept)
        return masking.masked_logits(model, pruned, found, other, tokens)

    monkeypatch.setattr(proof, "masked_logits", masked_otherwise)
    found = examine(family_config(model_type))
    assert set(found.refused) == ATTENTION | MLP.get(model_type, {"ffn"})
    assert all(f"cutting '{axis}' differs from masking" in reason for axis, reason in found.refused.items())


def planted(monkeypatch: pytest.MonkeyPatch, **norm: Any) -> None:
    """Let the proof work with a family whose norms were misunderstood."""

    def wrong(config: Any) -> Family:
        found = discover(config)
        return dataclasses.replace(found, norms={name: dataclasses.replace(kind, **norm) for name, kind in found.norms.items()})

    monkeypatch.setattr(proof, "discover", wrong)


def test_a_wrong_norm_offset_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, weight_offset=1.0)
    with pytest.raises(ArchitectureError, match="'llama' is refused: cutting 'hidden'"):
        prove(hf_config("llama"))


def test_a_layer_norm_taken_for_an_rms_norm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, rms=True)
    with pytest.raises(ArchitectureError, match="'nemotron' is refused: cutting 'hidden'"):
        prove(hf_config("nemotron"))


def test_a_norm_over_all_heads_that_was_overlooked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """olmo2's query and key norms: the heads' failure, and nobody else's."""

    def wrong(config: Any) -> Family:
        found = discover(config)
        return dataclasses.replace(found, norms={name: kind for name, kind in found.norms.items() if kind.axis == "hidden"})

    monkeypatch.setattr(proof, "discover", wrong)
    refused = examine(family_config("olmo2")).refused
    assert set(refused) == {"head", "kv_head", "all"}


def test_a_forgotten_rescaling_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rescaled weights without the rescaled eps, and the other way round."""
    config = hf_config("llama", rms_norm_eps=0.05)
    with monkeypatch.context() as patch:
        patch.setattr(proof, "target_config", lambda c, plan, f: target_config(c, dataclasses.replace(plan, norm_rescale=False), f))
        with pytest.raises(ArchitectureError, match="cutting 'hidden'"):
            prove(config)
    monkeypatch.setattr(proof, "prune_weights", lambda read, plan, f: prune_weights(read, dataclasses.replace(plan, norm_rescale=False), f))
    with pytest.raises(ArchitectureError, match="cutting 'hidden'"):
        prove(config)


@pytest.mark.parametrize(
    ("model_type", "pattern", "dim", "segments", "words"),
    [
        # q|k|v noted as k|q|v: the right shapes and the wrong weights
        ("phi3", r"self_attn\.qkv_proj\.weight", 0, (("kv_head", 1, True), ("head", 1, True), ("kv_head", 1, True)), "cutting 'head'.*qkv_proj"),
        # queries, keys and values of every head in turn, noted as all queries, all keys, all values
        ("gpt_neox", r"attention\.query_key_value\.(weight|bias)", 0, (("head", 1, True),) * 3, "cutting 'hidden'"),
        # gate and up in turn, noted as two halves; and the other way round
        ("gpt_oss", r"mlp\.experts\.gate_up_proj", 2, (("expert_ffn", 1, False),) * 2, "cutting 'expert_ffn'.*gate_up_proj"),
        ("phi3", r"mlp\.gate_up_proj\.weight", 0, (("ffn", 2, False),), "cutting 'ffn'.*gate_up_proj"),
    ],
)
def test_a_wrong_order_in_a_fused_dimension_is_refused(
    model_type: str, pattern: str, dim: int, segments: tuple[tuple[str, int, bool], ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "LAYOUTS", (LayoutNote(model_type, pattern, dim, segments), *layouts.LAYOUTS))
    monkeypatch.setattr(family, "_FOUND", {})
    with pytest.raises(ArchitectureError, match=f"'{model_type}' is refused: {words}"):
        prove(family_config(model_type))


def test_only_what_a_plan_cuts_must_be_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that fails on hidden channels can still lose neurons."""
    planted(monkeypatch, weight_offset=1.0)
    monkeypatch.setattr(proof, "_EXAMINED", {})
    proof.require_proof(hf_config("llama"), cut={"ffn", "head"})
    with pytest.raises(ArchitectureError, match="cutting 'hidden'"):
        proof.require_proof(hf_config("llama"), cut={"ffn", "hidden"})
    with pytest.raises(ArchitectureError, match="cutting 'hidden'"):
        proof.require_proof(hf_config("llama"))


def test_a_wrong_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter that the prediction does not know."""
    config = hf_config("llama")
    found = discover(config)
    extra = dataclasses.replace(found.layout.parameters[-1], name="extra", dims=((Segment(None, 3),),))
    layout = dataclasses.replace(found.layout, parameters=(*found.layout.parameters, extra))
    plan = random_plan(found, ffn_size=80)
    plan = dataclasses.replace(plan, architecture=plan.architecture.replace(layout=layout))
    with pytest.raises(ArchitectureError, match=rf"has {plan.architecture.num_parameters - 3} parameters after a cut, its axes predict"):
        difference_of(config, found, tiny_teacher(config, seed=0), plan)


#: Families of the random plans: plain, fused, scaled and soft-capped, layer norm, dense and sparse layers, sinks and biases, coupled, hybrid.
RANDOM = ("llama", "phi3", "gemma2", "nemotron", "qwen3_moe", "gpt_oss", "gpt_neox", "nemotron_h")


@functools.cache
def teacher_of(model_type: str) -> tuple[Any, Family, nn.Module]:
    """Config, family and random weights of a row of the table."""
    config = family_config(model_type)
    return config, discover(config), tiny_teacher(config, seed=1)


@st.composite
def plans(draw: st.DrawFn, model_type: str) -> PrunePlan:
    """Any sizes that the family's config takes, any layers, any units."""
    found = teacher_of(model_type)[1]
    shape = found.architecture
    layers = sorted(draw(st.sets(st.integers(0, shape.num_layers - 1), min_size=1)))
    sizes: dict[str, int] = {}
    if model_type == "gpt_neox":
        sizes["num_heads"] = draw(st.integers(1, 8))
    else:
        groups = draw(st.integers(1, shape.num_kv_heads))
        sizes |= {"num_kv_heads": groups, "num_heads": groups * draw(st.integers(1, 2))}
        step = 4 * sizes["num_heads"] if model_type in ("llama", "gemma2") else 4  # their config classes want it to divide by the heads
        sizes["hidden_size"] = step * draw(st.integers(1, shape.hidden_size // step))
    for axis, unit in {"ffn": 1, "expert_ffn": 4, "shared_ffn": 1}.items():  # rows of grouped products must be multiples of 16 bytes
        if shape.size(axis):
            sizes[shape.option(axis)] = unit * draw(st.integers(1, shape.size(axis) // unit))
    if shape.num_experts:
        sizes["num_experts"] = draw(st.integers(shape.num_experts_per_token, shape.num_experts))
    return random_plan(found, layers=tuple(layers), seed=draw(st.integers(0, 99)), **sizes)


@pytest.mark.parametrize("model_type", RANDOM)
def test_random_plans(model_type: str, tmp_path: Path) -> None:
    """Masked equals pruned, the count is the predicted one, and the folder reloads to the same bits, in a checkpoint's names and by transformers."""
    from transformers import AutoModelForCausalLM

    config, found, teacher = teacher_of(model_type)
    memory = dict(teacher.state_dict())
    number = iter(range(1000))

    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(plans(model_type))
    def check(plan: PrunePlan) -> None:
        shape = plan.architecture
        target = target_config(config, plan, found)
        difference, largest = difference_of(config, found, teacher, plan)
        assert difference <= 1e-5 * max(1.0, largest)
        folder = tmp_path / str(next(number))
        folder.mkdir()
        stored = dict(to_stored(found.stored, ((s.name, memory[s.name]) for s in found.layout.parameters), found.architecture.size))
        assert write_weights(folder, prune_weights(stored.__getitem__, plan, found)) == shape.num_parameters + buffers(plan)
        target.save_pretrained(folder)
        cut = dict(prune_weights(memory.__getitem__, plan, found, layout=found.layout))
        again, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert sum(p.numel() for p in again.parameters()) == shape.num_parameters
        loaded = again.state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in cut.items())
        assert set(WeightReader(folder).files) == {name for name, _ in prune_weights(stored.__getitem__, plan, found)}

    check()


def buffers(plan: PrunePlan) -> int:
    """Values that are written with the weights without being parameters (a router's correction bias)."""
    layout, size_of = plan.architecture.layout, plan.architecture.size
    assert layout is not None
    return sum(torch.Size(spec.shape(size_of)).numel() for spec in layout.select(len(plan.layer), plan.layer) if spec.buffer)


def test_norms_are_found_whatever_their_eps() -> None:
    """A large eps must not hide that a norm ignores the scale of its input."""
    for eps in (0.0, 1e-6, 0.5):
        found = discover(hf_config("llama", rms_norm_eps=eps))
        assert set(found.norms.values()) == {NormKind("hidden", True, 0.0)} and len(found.norms) == 7


def test_plans_lead_to_one_model_in_either_naming() -> None:
    """A state dict in memory and a checkpoint's names: the same tensors after the cut."""
    _, found, teacher = teacher_of("qwen3_moe")
    plan = random_plan(found, layers=(1, 3), hidden_size=64, num_experts=3, expert_ffn_size=20, num_heads=4, num_kv_heads=2)
    small = discover(target_config(teacher_of("qwen3_moe")[0], plan, found))
    memory = dict(teacher.state_dict())
    stored = dict(to_stored(found.stored, ((s.name, memory[s.name]) for s in found.layout.parameters), found.architecture.size))
    by_names = dict(prune_weights(stored.__getitem__, plan, found))
    in_memory = dict(prune_weights(memory.__getitem__, plan, found, layout=found.layout))
    converted = dict(to_stored(small.stored, in_memory.items(), plan.architecture.size))
    assert by_names.keys() == converted.keys()
    assert all(torch.equal(by_names[name], tensor) for name, tensor in converted.items())
    loaded = model_from_weights(target_config(teacher_of("qwen3_moe")[0], plan, found), by_names, dtype=torch.float32, device=torch.device("cpu"))
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in in_memory.items())
