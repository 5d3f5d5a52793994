"""Surgery: what is cut, written and read back, and what damaged files are answered with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_models import tiny_llama

from minitron.core.architecture import Architecture
from minitron.core.plan import PrunePlan, make_plan, top
from minitron.core.scores import ImportanceScores
from minitron.errors import ArchitectureError, CheckpointError
from minitron.models import Family, config_of, discover, load_causal_lm
from minitron.models.load import model_from_weights
from minitron.models.weights import WeightReader, copy_companions, write_weights
from minitron.prune import prune_weights, target_config
from minitron.prune.proof import random_scores

CPU = torch.device("cpu")


def teacher_in(folder: Path, **sizes: Any) -> tuple[Path, Family]:
    """A tiny Llama with its family: 4 layers, hidden 48, ffn 64, 8 heads in 4 groups."""
    path = tiny_llama(folder, **{"layers": 4, "heads": 8, "kv_heads": 4, **sizes})
    return path, discover(config_of(path))


def plan_of(family: Family, *, layers: tuple[int, ...] = (0, 1, 3), seed: int = 0, **sizes: int) -> PrunePlan:
    """A plan by random scores; by default every axis is cut."""
    shape = family.architecture
    wanted = {"hidden_size": 32, "ffn_size": 40, "num_heads": 4, "num_kv_heads": 2} if not sizes else sizes
    target = shape.replace(num_layers=len(layers), **wanted)
    return make_plan(random_scores(shape, seed=seed), shape, target, kept_layers=list(layers))


def write_pruned(source: Path, family: Family, plan: PrunePlan, out: Path, **options: int) -> int:
    """The pruned model as a folder, as the stage writes it."""
    out.mkdir()
    count = write_weights(out, prune_weights(WeightReader(source).get, plan, family), **options)
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
    weights = dict(prune_weights(WeightReader(source).get, plan, family))
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
    old, new = WeightReader(source).get, dict(prune_weights(WeightReader(source).get, plan, family))
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
            list(prune_weights(WeightReader(source).get, plan, family))
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


def test_plan_survives_a_round_trip(tmp_path: Path) -> None:
    _, family = teacher_in(tmp_path / "teacher")
    plan = dataclasses.replace(plan_of(family), norm_rescale=False, provenance={"metric": "random", "seed": 0})
    plan.save(tmp_path / "plan.json")
    again = PrunePlan.load(tmp_path / "plan.json", family.architecture)
    assert again == plan
    assert again.architecture.num_parameters == plan.architecture.num_parameters


def test_bad_plans_are_refused(tmp_path: Path) -> None:
    """Indices beyond the teacher, twice, unsorted or negative; a plan for a larger teacher; no plan at all."""
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
        ("ffn", {**good["ffn"], "1": [0, 64]}),
        ("head", {**good["head"], "0": [8]}),
    ]
    for key, value in wrong:
        path.write_text(json.dumps({**good, key: value}))
        with pytest.raises(CheckpointError, match=f"axis '{key}'"):
            PrunePlan.load(path, family.architecture)
    for text in ("", "{}", '{"layer": [0]}', "not json"):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="plan.json is not a prune plan"):
            PrunePlan.load(path, family.architecture)
    with pytest.raises(CheckpointError, match="missing.json"):
        PrunePlan.load(tmp_path / "missing.json", family.architecture)


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
