"""Surgery: what is cut, written and read back, and what damaged files are answered with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_models import family_config, hf_config, random_plan, random_weights, tiny_llama

from minitron.core.architecture import Architecture
from minitron.core.plan import PrunePlan, make_plan, top
from minitron.core.scores import ImportanceScores
from minitron.errors import ArchitectureError, CheckpointError
from minitron.models import Family, config_of, discover, load_causal_lm
from minitron.models.load import model_from_weights
from minitron.models.stored import to_stored
from minitron.models.weights import WeightReader, copy_companions, write_weights
from minitron.prune import layout_of, prune_weights, target_config
from minitron.prune.proof import random_scores

CPU = torch.device("cpu")


def teacher_in(folder: Path, **sizes: Any) -> tuple[Path, Family]:
    """A tiny Llama with its family: 4 layers, hidden 48, ffn 64, 8 heads in 4 groups."""
    path = tiny_llama(folder, **{"layers": 4, "heads": 8, "kv_heads": 4, **sizes})
    return path, discover(config_of(path))


def plan_of(family: Family, *, layers: tuple[int, ...] = (0, 1, 3), seed: int = 0, **sizes: int) -> PrunePlan:
    """A plan by random scores; by default every axis is cut."""
    return random_plan(family, layers=layers, seed=seed, **(sizes or {"hidden_size": 32, "ffn_size": 40, "num_heads": 4, "num_kv_heads": 2}))


def write_pruned(source: Path, family: Family, plan: PrunePlan, out: Path, **options: int) -> int:
    """The pruned model as a folder, as the stage writes it."""
    out.mkdir()
    count = write_weights(out, prune_weights(WeightReader(source), plan, family), **options)
    target_config(config_of(source), plan, family).save_pretrained(out)
    copy_companions(source, out)
    return count


def digest(folder: Path) -> dict[str, str]:
    """Content hashes of a folder's files."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize("tied", [False, True])
def test_pruned_folder_reloads_strictly(tmp_path: Path, tied: bool) -> None:
    """Same logits from disk as from memory, the predicted count, ties kept, the teacher's files untouched."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, family = teacher_in(tmp_path / "teacher", tied=tied)
    before = digest(source)
    plan = plan_of(family)
    count = write_pruned(source, family, plan, tmp_path / "pruned")
    assert digest(source) == before
    weights = dict(prune_weights(WeightReader(source), plan, family))
    assert ("lm_head.weight" in weights) is not tied
    memory = model_from_weights(target_config(config_of(source), plan, family), weights, dtype=torch.float32, device=CPU).eval()
    disk, info = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert count == plan.architecture.num_parameters == sum(p.numel() for p in disk.parameters())
    assert (disk.get_input_embeddings().weight is disk.get_output_embeddings().weight) is tied
    assert disk.config.head_dim == 6 and disk.config.num_hidden_layers == 3
    tokens = AutoTokenizer.from_pretrained(tmp_path / "pruned")("the quick brown fox", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(disk.eval()(tokens).logits, memory(tokens).logits)
    assert load_causal_lm(tmp_path / "pruned", dtype=torch.float32, device=CPU).config.num_hidden_layers == 3


def test_every_tensor_is_the_teachers_at_the_kept_indices(tmp_path: Path) -> None:
    """By hand, for one kept layer: q and o by heads, k and v by groups, gate, up and down by neurons, all by hidden channels."""
    source, family = teacher_in(tmp_path / "teacher")
    plan = plan_of(family)
    old, new = WeightReader(source).get, dict(prune_weights(WeightReader(source), plan, family))
    hidden = torch.tensor(plan.hidden)
    by = {axis: torch.tensor(plan.by_layer[axis][3]) for axis in ("ffn", "head", "kv_head")}
    head, group = ((by[axis][:, None] * 6 + torch.arange(6)).flatten() for axis in ("head", "kv_head"))
    was, now = "model.layers.3.", "model.layers.2."
    rows = {"self_attn.q_proj": head, "self_attn.k_proj": group, "self_attn.v_proj": group, "mlp.gate_proj": by["ffn"], "mlp.up_proj": by["ffn"]}
    for name, kept in rows.items():
        assert torch.equal(new[f"{now}{name}.weight"], old(f"{was}{name}.weight")[kept][:, hidden])
    for name, kept in {"self_attn.o_proj": head, "mlp.down_proj": by["ffn"]}.items():
        assert torch.equal(new[f"{now}{name}.weight"], old(f"{was}{name}.weight")[:, kept][hidden])
    assert torch.equal(new["model.embed_tokens.weight"], old("model.embed_tokens.weight")[:, hidden])
    torch.testing.assert_close(new["model.norm.weight"], old("model.norm.weight")[hidden] * (48 / 32) ** 0.5)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (2, 1), (6, 3), (8, 4), (2, 2)])
def test_kept_heads_lie_in_kept_groups_equally_many_in_each(tmp_path: Path, heads: int, groups: int) -> None:
    _, family = teacher_in(tmp_path / "teacher")
    scores = random_scores(family.architecture, seed=3)
    plan = plan_of(family, seed=3, num_heads=heads, num_kv_heads=groups)
    for layer in plan.layer:
        kept, kept_groups = plan.by_layer["head"][layer], plan.by_layer["kv_head"][layer]
        assert len(kept) == heads and len(kept_groups) == groups
        assert [head // 2 for head in kept] == [group for group in kept_groups for _ in range(heads // groups)]
        best = sorted(range(4), key=lambda g, at=layer: -float(scores.of("kv_head", at)[g]))[:groups]
        assert kept_groups == sorted(best)
        if heads == groups:  # one head of each kept group: its better one
            values = scores.of("head", layer).view(4, 2)
            assert kept == [2 * group + int(values[group].argmax()) for group in kept_groups]


def test_the_highest_scores_are_kept_and_ties_go_to_the_lower_index() -> None:
    assert top(torch.tensor([0.1, 0.9, 0.5, 0.7]), 2) == [1, 3]
    assert top(torch.tensor([1.0, 1.0, 0.0, 1.0]), 2) == [0, 1]
    assert top(torch.tensor([3.0, 2.0, 1.0]), 3) == [0, 1, 2]


def test_streaming_write_makes_shards_with_an_index(tmp_path: Path) -> None:
    """Small shards load as the one big file does; no shard is larger than asked for unless it holds a single tensor."""
    source, family = teacher_in(tmp_path / "teacher")
    plan = plan_of(family)
    whole = write_pruned(source, family, plan, tmp_path / "whole")
    limit = 20_000
    assert write_pruned(source, family, plan, tmp_path / "shards", shard_bytes=limit) == whole
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3 and sorted(set(index["weight_map"].values())) == files
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert index["metadata"]["total_size"] == 4 * whole
    reader = WeightReader(tmp_path / "shards")
    for name in files:
        tensors = [reader.get(key) for key, file in index["weight_map"].items() if file == name]
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors) <= limit
    a, b = (load_causal_lm(tmp_path / name, dtype=torch.float32, device=CPU).state_dict() for name in ("whole", "shards"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_damaged_weights_are_refused_by_name(tmp_path: Path) -> None:
    source, family = teacher_in(tmp_path / "teacher")
    plan = plan_of(family)
    file = source / "model.safetensors"
    data = file.read_bytes()
    for length in (len(data) // 2, 6, 0):
        file.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=str(source)):
            list(prune_weights(WeightReader(source), plan, family))
        with pytest.raises(CheckpointError, match=str(source)):
            load_causal_lm(source, dtype=torch.float32, device=CPU)
    file.unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        WeightReader(source)
    write_pruned(tiny_llama(tmp_path / "again", layers=4, heads=8, kv_heads=4), family, plan, tmp_path / "shards", shard_bytes=20_000)
    victim = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match="lacks the weight file model-0000"):
        WeightReader(tmp_path / "shards")


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    source, family = teacher_in(tmp_path / "teacher")
    write_pruned(source, family, plan_of(family), tmp_path / "shards", shard_bytes=20_000)
    victim = sorted((tmp_path / "shards").glob("*.safetensors"))[2]
    victim.write_bytes(victim.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=f"{victim.name} is damaged"):
        WeightReader(tmp_path / "shards")
    with pytest.raises(CheckpointError, match="has no weight 'nonsense'"):
        WeightReader(source).get("nonsense")


def test_weights_that_do_not_match_the_config_are_refused(tmp_path: Path) -> None:
    """A missing tensor, a left-over one, and one of another shape."""
    source, family = teacher_in(tmp_path / "teacher")
    weights = dict(WeightReader(source).items(WeightReader(source).files))
    document = json.loads((source / "config.json").read_text())
    for name, change in {"missing": 5, "unexpected": 3}.items():
        (source / "config.json").write_text(json.dumps({**document, "num_hidden_layers": change}))
        with pytest.raises(CheckpointError, match=f"do not match its config.*{name} keys: model.layers.[34]"):
            load_causal_lm(source, dtype=torch.float32, device=CPU)
    (source / "config.json").write_text(json.dumps({**document, "intermediate_size": 65}))
    with pytest.raises(CheckpointError):
        load_causal_lm(source, dtype=torch.float32, device=CPU)
    weights["model.norm.weight"] = torch.ones(7)
    with pytest.raises(ArchitectureError, match=r"'model\.norm\.weight' has shape \(7,\), the config says \(48,\)"):
        list(prune_weights(weights.__getitem__, plan_of(family), family))


def sparse_plan(**sizes: Any) -> tuple[Family, PrunePlan]:
    """A plan for layers with and without experts, and with a shared one."""
    family = discover(family_config("qwen2_moe"))
    sizes = sizes or {"hidden_size": 64, "ffn_size": 100, "num_experts": 3, "expert_ffn_size": 20, "shared_ffn_size": 24, "num_heads": 4}
    return family, random_plan(family, layers=(1, 2), **sizes)


def test_plan_survives_a_round_trip(tmp_path: Path) -> None:
    _, family = teacher_in(tmp_path / "teacher")
    plan = dataclasses.replace(plan_of(family), norm_rescale=False, provenance={"metric": "random", "seed": 0}, teacher="abc")
    plan.save(tmp_path / "plan.json")
    again = PrunePlan.load(tmp_path / "plan.json", family.architecture)
    assert again == plan
    assert again.architecture.num_parameters == plan.architecture.num_parameters


def test_a_plan_with_experts_survives_a_round_trip(tmp_path: Path) -> None:
    """Kept layers, experts and their neurons, head pairs; and the count, which depends on which layers stay."""
    family, plan = sparse_plan(hidden_size=64, num_experts=3, expert_ffn_size=20, num_heads=4, num_kv_heads=4, head_merge="laco")
    plan.save(tmp_path / "plan.json")
    again = PrunePlan.load(tmp_path / "plan.json", family.architecture)
    assert again == plan and again.head_merge == "laco" and again.head_pairs[2] and again.by_expert.keys() == {2}
    assert again.architecture.kept_layers == (1, 2)
    assert again.architecture.num_parameters == plan.architecture.num_parameters != plan.architecture.replace(kept_layers=(0, 2)).num_parameters
    assert [len(experts) for experts in again.by_expert.values()] == [3] and {len(neurons) for neurons in again.by_expert[2]} == {20}
    assert again.kept("expert_ffn", 2, again.by_layer["expert"][2][1]) == plan.by_expert[2][1]
    assert again.kept("ffn", 2) is None and again.kept("hidden", None) == plan.hidden


def test_bad_plans_are_refused(tmp_path: Path) -> None:
    """Indices beyond the teacher, twice, unsorted or negative; heads of dropped groups; a plan for a larger teacher; no plan at all."""
    _, family = teacher_in(tmp_path / "teacher")
    path = tmp_path / "plan.json"
    plan_of(family).save(path)
    good = json.loads(path.read_text())
    wrong: list[tuple[str, Any]] = [
        ("hidden", [*good["hidden"][:-1], 48]),
        ("hidden", [-1, *good["hidden"][1:]]),
        ("hidden", [good["hidden"][0], *good["hidden"][:-1]]),
        ("layer", [0, 3, 1]),
        ("layer", [0, 1, 4]),
    ]
    for key, value in wrong:
        path.write_text(json.dumps({**good, key: value}))
        with pytest.raises(CheckpointError, match=f"axis '{key}'"):
            PrunePlan.load(path, family.architecture)
    for axis, layer, indices in (
        ("ffn", "1", [*range(39), 64]),
        ("ffn", "3", [*range(39), 38]),
        ("head", "0", [0, 1, 2, 8]),
        ("kv_head", "0", [-1, 2]),
    ):
        path.write_text(json.dumps({**good, "by_layer": {**good["by_layer"], axis: {**good["by_layer"][axis], layer: indices}}}))
        with pytest.raises(CheckpointError, match=f"axis '{axis}'"):
            PrunePlan.load(path, family.architecture)
    groups = good["by_layer"]["kv_head"]["1"]
    heads = [2 * group + i for group in range(4) if group not in groups for i in range(2)]
    path.write_text(json.dumps({**good, "by_layer": {**good["by_layer"], "head": {**good["by_layer"]["head"], "1": heads}}}))
    with pytest.raises(CheckpointError, match="heads of layer 1 that do not lie equally many in each kept group"):
        PrunePlan.load(path, family.architecture)
    for text in ("", "{}", '{"layer": [0]}', "not json"):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="plan.json is not a prune plan"):
            PrunePlan.load(path, family.architecture)
    with pytest.raises(CheckpointError, match="missing.json"):
        PrunePlan.load(tmp_path / "missing.json", family.architecture)


def test_widths_that_differ_by_layer_are_refused(tmp_path: Path) -> None:
    """What no Hugging Face config can express, in one sentence; for plain layers, experts, and neurons of one expert."""
    _, family = teacher_in(tmp_path / "teacher")
    plan = plan_of(family)
    uneven = {**plan.by_layer, "ffn": {**plan.by_layer["ffn"], 1: plan.by_layer["ffn"][1][:-1]}}
    with pytest.raises(ArchitectureError, match="39 units of layer 1 on axis 'ffn', its architecture says 40: widths that differ") as caught:
        dataclasses.replace(plan, by_layer=uneven).check(family.architecture)
    assert "\n" not in str(caught.value)
    family, plan = sparse_plan()
    fewer = dataclasses.replace(plan, by_expert={2: [plan.by_expert[2][0][:-1], *plan.by_expert[2][1:]]})
    with pytest.raises(ArchitectureError, match="19 units of layer 2 on axis 'expert_ffn', its architecture says 20"):
        fewer.check(family.architecture)
    dropped = {**plan.by_layer, "expert": {2: plan.by_layer["expert"][2][:-1]}}
    with pytest.raises(ArchitectureError, match="2 units of layer 2 on axis 'expert', its architecture says 3"):
        dataclasses.replace(plan, by_layer=dropped).check(family.architecture)
    with pytest.raises(CheckpointError, match="axis 'expert_ffn' that a teacher with 48"):
        dataclasses.replace(plan, by_expert={2: [[*range(19), 48], *plan.by_expert[2][1:]]}).check(family.architecture)


def test_impossible_targets_are_refused(tmp_path: Path) -> None:
    _, family = teacher_in(tmp_path / "teacher")
    shape = family.architecture
    cases: list[tuple[dict[str, int], str]] = [
        ({"hidden_size": 49}, "target.hidden_size=49 is not between 1 and the teacher's 48"),
        ({"ffn_size": 0}, "target.ffn_size=0"),
        ({"num_heads": 6, "num_kv_heads": 4}, "num_heads=6 does not divide"),
        ({"num_heads": 8, "num_kv_heads": 2}, "more heads in a group"),
    ]
    for sizes, words in cases:
        with pytest.raises(ArchitectureError, match=words):
            make_plan(random_scores(shape), shape, shape.replace(**sizes), kept_layers=[0, 1, 2, 3])
    with pytest.raises(ArchitectureError, match="3 layers are kept, but the target has num_layers=2"):
        make_plan(random_scores(shape), shape, shape.replace(num_layers=2), kept_layers=[0, 1, 2])


def test_a_shape_without_a_layout_cannot_be_counted() -> None:
    with pytest.raises(ArchitectureError, match="no parameter layout"):
        Architecture(2, 8, 8, 2, 1, 4, 16, False).num_parameters  # noqa: B018


def test_scores_file_round_trip_and_damage(tmp_path: Path) -> None:
    scores = ImportanceScores({"hidden": torch.rand(5), "ffn.0": torch.rand(3)}, {"metric": "activation", "num_tokens": 7, "list": [1, 2]})
    scores.save(tmp_path / "scores.safetensors")
    again = ImportanceScores.load(tmp_path / "scores.safetensors")
    assert again.metadata == scores.metadata and torch.equal(again.of("ffn", 0), scores.tensors["ffn.0"])
    assert "hidden" in again.tensors and "head.0" not in again.tensors
    data = (tmp_path / "scores.safetensors").read_bytes()
    (tmp_path / "scores.safetensors").write_bytes(data[:-3])
    with pytest.raises(CheckpointError, match="is not a scores file"):
        ImportanceScores.load(tmp_path / "scores.safetensors")
    with pytest.raises(CheckpointError, match="run 'minitron importance' first"):
        ImportanceScores.load(tmp_path / "none.safetensors")


def test_plain_slicing_copies_norms_and_eps() -> None:
    """With norm_rescale=False the pruned norm weights are the teacher's kept entries, bit for bit, and eps stays."""
    config = hf_config("llama")
    found = discover(config)
    weights = random_weights(found)
    plan = random_plan(found, hidden_size=64, norm_rescale=False)
    cut = dict(prune_weights(weights.__getitem__, plan, found))
    exact = dict(prune_weights(weights.__getitem__, dataclasses.replace(plan, norm_rescale=True), found))
    assert target_config(config, plan, found).rms_norm_eps == config.rms_norm_eps
    assert target_config(config, dataclasses.replace(plan, norm_rescale=True), found).rms_norm_eps == pytest.approx(config.rms_norm_eps * 96 / 64)
    for name in ("model.norm.weight", "model.layers.1.input_layernorm.weight"):
        assert torch.equal(cut[name], weights[name][plan.hidden])
        torch.testing.assert_close(exact[name].double(), weights[name][plan.hidden].double() * (96 / 64) ** 0.5, rtol=1e-6, atol=0)
    assert torch.equal(cut["lm_head.weight"], exact["lm_head.weight"])


def built(config: Any, plan: PrunePlan, family: Family, *, seed: int = 0) -> Any:
    """The pruned model of random weights, from their names in memory."""
    weights = random_weights(family, seed=seed)
    cut = dict(
        to_stored(
            discover(target_config(config, plan, family)).stored,
            prune_weights(weights.__getitem__, plan, family, layout=family.layout),
            plan.architecture.size,
        )
    )
    return model_from_weights(target_config(config, plan, family), cut, dtype=torch.float32, device=CPU).eval()


SLIDING = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0}
KINDS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("model_type", "options", "kept", "expected"),
    [
        ("qwen2", {**SLIDING, "layer_types": KINDS}, (0, 2), {"layer_types": ["full_attention", "sliding_attention"]}),
        ("qwen2", {**SLIDING, "layer_types": KINDS, "max_window_layers": 3}, (1, 3), {"layer_types": KINDS[2:], "max_window_layers": 1}),
        ("gemma2", {"sliding_window": 4, "layer_types": KINDS, "layers": 4}, (1, 2), {"layer_types": ["sliding_attention"] * 2}),
        ("smollm3", {**SLIDING, "layer_types": KINDS, "no_rope_layers": [1, 0, 0, 1], "layers": 4}, (2, 3), {"no_rope_layers": [0, 1]}),
        ("gpt_oss", {"layer_types": KINDS, "layers": 4}, (0, 3), {"layer_types": ["full_attention"] * 2}),
        ("qwen3_moe", {}, (1, 3), {"decoder_sparse_step": 1, "mlp_only_layers": [1], "num_hidden_layers": 2}),
        ("qwen3_moe", {}, (0, 2, 3), {"decoder_sparse_step": 1, "mlp_only_layers": [0, 1, 2]}),
        ("qwen2_moe", {}, (1, 2), {"mlp_only_layers": [0]}),
        ("nemotron_h", {}, (0, 2, 3), {"layers_block_type": ["linear_attention", "full_attention", "mlp"]}),
    ],
)
def test_what_runs_over_the_layers_follows_those_kept(
    model_type: str, options: dict[str, Any], kept: tuple[int, ...], expected: dict[str, Any]
) -> None:
    """Lists, indices and counts, and generation afterwards, which stale layer indices would break: with a cache as without one."""
    config = family_config(model_type, **{"layers": 4, **options}) if model_type == "qwen2" else family_config(model_type, **options)
    family = discover(config)
    plan = random_plan(family, layers=kept)
    small = target_config(config, plan, family)
    assert {key: getattr(small, key) for key in expected} == expected and small.num_hidden_layers == len(kept)
    model = built(config, plan, family)
    tokens = torch.arange(1, 7).unsqueeze(0)
    greedy = model.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=True)
    assert greedy.shape == (1, 12)
    assert torch.equal(greedy, model.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=False))


def test_counts_of_leading_dense_layers_follow_the_kept_ones() -> None:
    """``first_k_dense_replace``: two of the first three layers are dense after the second is dropped."""
    sparse = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_shared_experts": 1, "first_k_dense_replace": 2}
    config = hf_config("glm4_moe", layers=4, **sparse)
    family = discover(config)
    assert family.layout.layers_with("ffn") == [0, 1] and family.layout.layers_with("expert") == [2, 3]
    for kept, dense in (((0, 2, 3), 1), ((2, 3), 0), ((0, 1, 3), 2)):
        plan = random_plan(family, layers=kept, hidden_size=64, num_experts=3)
        assert target_config(config, plan, family).first_k_dense_replace == dense
        model = built(config, plan, family)
        assert sum(p.numel() for p in model.parameters()) == plan.architecture.num_parameters


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "nemotron_h", "qwen2_moe", "llama"])
def test_the_form_of_a_checkpoint_is_transformers_own(model_type: str) -> None:
    """Names and bits of a whole model as transformers would save them; and a cut by those names is the cut in memory, converted."""
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    config = family_config(model_type)
    family = discover(config)
    model = AutoModelForCausalLM.from_config(config).float()
    memory = dict(model.state_dict())
    reference = revert_weight_conversion(model, dict(memory))
    stored = dict(to_stored(family.stored, ((s.name, memory[s.name]) for s in family.layout.parameters), family.architecture.size))
    assert stored.keys() == reference.keys() == {spec.name for spec in family.stored_layout.parameters}
    assert all(torch.equal(stored[name], tensor) for name, tensor in reference.items())
    assert layout_of(stored, family) is family.stored_layout
    sizes = {"num_experts": 3, "expert_ffn_size": 20} if family.architecture.num_experts else {"ffn_size": 40}
    plan = random_plan(family, layers=(0, 2), hidden_size=64, num_heads=4, num_kv_heads=2, **sizes)
    small = discover(target_config(config, plan, family))
    by_names = dict(prune_weights(stored.__getitem__, plan, family))
    converted = dict(to_stored(small.stored, prune_weights(memory.__getitem__, plan, family, layout=family.layout), plan.architecture.size))
    assert by_names.keys() == converted.keys()
    assert all(torch.equal(by_names[name], tensor) for name, tensor in converted.items())


def test_experts_are_cut_each_by_its_own_neurons() -> None:
    """By hand, for one kept expert: the rows of its gate and up matrices and the columns of its down matrix; the router's row goes along."""
    family, plan = sparse_plan()
    weights = random_weights(family)
    cut = dict(prune_weights(weights.__getitem__, plan, family, layout=family.layout))
    hidden = torch.tensor(plan.hidden)
    kept = plan.by_layer["expert"][2]
    for new, old in enumerate(kept):
        neurons = torch.tensor(plan.by_expert[2][new])
        gate_up, down = (weights[f"model.layers.2.mlp.experts.{name}_proj"][old] for name in ("gate_up", "down"))
        rows = torch.cat([neurons, 48 + neurons])
        assert torch.equal(cut["model.layers.1.mlp.experts.gate_up_proj"][new], gate_up[rows][:, hidden])
        assert torch.equal(cut["model.layers.1.mlp.experts.down_proj"][new], down[hidden][:, neurons])
    assert torch.equal(cut["model.layers.1.mlp.gate.weight"], weights["model.layers.2.mlp.gate.weight"][kept][:, hidden])
    assert plan.by_expert[2][0] != plan.by_expert[2][1]


def test_the_teachers_tensors_are_not_touched() -> None:
    family = discover(family_config("phi3", "mha"))
    weights = random_weights(family)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    plan = random_plan(family, layers=(0, 2), hidden_size=64, num_heads=5, num_kv_heads=5, head_merge="paper")
    for _, tensor in prune_weights(weights.__getitem__, plan, family):
        tensor.zero_()
    changed = {name for name, tensor in weights.items() if not torch.equal(tensor, before[name])}
    assert not changed


@pytest.mark.parametrize(
    ("model_type", "sizes", "words"),
    [
        ("llama", {"hidden_size": 90, "num_heads": 4, "num_kv_heads": 2}, "a llama config cannot have .*'hidden_size': 90.*multiple of the number"),
        ("gemma2", {"num_heads": 5, "num_kv_heads": 5}, "a gemma2 config cannot have .*'num_attention_heads': 5"),
    ],
)
def test_a_shape_that_the_config_class_refuses_is_refused_before_any_weight_is_read(model_type: str, sizes: dict[str, int], words: str) -> None:
    """The same sizes are fine in a family without the rule."""
    for kind in (model_type, "mistral"):
        config = family_config(kind, "mha" if "num_kv_heads" in sizes and sizes["num_kv_heads"] > 4 else "gqa")
        family = discover(config)
        plan = random_plan(family, **sizes)
        if kind == "mistral":
            assert target_config(config, plan, family).hidden_size == plan.architecture.hidden_size
            continue
        with pytest.raises(ArchitectureError, match=words) as caught:
            target_config(config, plan, family)
        assert "\n" not in str(caught.value)


def test_layers_that_a_config_cannot_express_are_refused() -> None:
    """Leading dense layers are a count: sparse layers before a dense one cannot be said with it."""
    sparse = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_shared_experts": 1, "first_k_dense_replace": 2}
    config = hf_config("glm4_moe", layers=4, **sparse)
    family = discover(config)
    plan = random_plan(family, layers=(0, 2, 3))
    swapped = dataclasses.replace(plan, layer=[2, 0, 3])
    with pytest.raises(ArchitectureError, match=r"'glm4_moe' config cannot express layers \[2, 0, 3\] of the teacher: parameter 'model\.layers\.0"):
        target_config(config, swapped, family)
