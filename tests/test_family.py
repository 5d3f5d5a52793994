"""Families are discovered from shapes, counted exactly, and proved on numbers; what is not understood is refused."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron.core.architecture import Architecture
from minitron.core.plan import make_plan
from minitron.errors import ArchitectureError, CheckpointError, MinitronError
from minitron.models import NormKind, config_of, discover, family, layouts
from minitron.models.family import Family, meta_model
from minitron.models.layouts import LayoutNote
from minitron.models.load import model_from_weights
from minitron.prune import proof, prove, prune_weights, target_config

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "nemotron")

#: Model, HF type, layers, hidden, ffn, heads, kv heads, vocabulary, total, non-embedding: Minitron papers, all with head_dim 128 and an untied head.
PUBLISHED = [
    ("Nemotron-4 15B", "nemotron", 32, 6144, 24576, 48, 8, 256_000, 15_628_775_424, 12_483_047_424),
    ("Nemotron-3 8B", "nemotron", 32, 4096, 16384, 32, 32, 256_000, 8_540_135_424, 6_442_983_424),
    ("Minitron 8B", "nemotron", 32, 4096, 16384, 48, 8, 256_000, 8_271_699_968, 6_174_547_968),
    ("Minitron 4B", "nemotron", 32, 3072, 9216, 24, 8, 256_000, 4_190_509_056, 2_617_645_056),
    ("Llama-3.1 8B", "llama", 32, 4096, 14336, 32, 8, 128_256, 8_030_261_248, 6_979_588_096),
    ("Llama-3.1-Minitron-4B-Width", "llama", 32, 3072, 9216, 32, 8, 128_256, 4_512_746_496, 3_724_741_632),
    ("Llama-3.1-Minitron-4B-Depth", "llama", 16, 4096, 14336, 32, 8, 128_256, 4_540_469_248, 3_489_796_096),
    ("Mistral-NeMo 12B", "mistral", 40, 5120, 14336, 32, 8, 131_072, 12_247_782_400, 10_905_605_120),
    ("MN-Minitron 8B", "mistral", 40, 4096, 11520, 32, 8, 131_072, 8_414_105_600, 7_340_363_776),
]
#: More published counts, of families with biases, q/k norms and tied heads:
#: type, layers, hidden, ffn, heads, kv heads, head dim, vocabulary, tied, total.
MORE = [
    ("llama", 32, 4096, 11008, 32, 32, 128, 32_000, False, 6_738_415_616),
    ("qwen2", 28, 3584, 18944, 28, 4, 128, 152_064, False, 7_615_616_512),
    ("qwen3", 36, 4096, 12288, 32, 8, 128, 151_936, False, 8_190_735_360),
    ("qwen3", 28, 1024, 3072, 16, 8, 128, 151_936, True, 596_049_920),
    ("llama", 22, 2048, 5632, 32, 4, 64, 32_000, False, 1_100_048_384),
]


def hf_config(
    model_type: str,
    *,
    layers: int = 3,
    hidden: int = 96,
    ffn: int = 160,
    heads: int = 8,
    kv_heads: int = 4,
    head_dim: int = 16,
    vocab: int = 128,
    tied: bool = False,
    **more: Any,
) -> Any:
    """A Hugging Face config with these sizes."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        model_type,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **more,
    )


def formula(model_type: str, shape: Architecture) -> int:
    """Parameters of a Llama-like model: embedding(s), final norm, and per layer attention, MLP, norms, biases and q/k norms."""
    d, f, q, k, h = shape.hidden_size, shape.ffn_size, shape.num_heads, shape.num_kv_heads, shape.head_dim
    norm = 2 * d if model_type == "nemotron" else d  # a layer norm has a bias too
    layer = 2 * d * q * h + 2 * d * k * h + (2 if model_type == "nemotron" else 3) * d * f + 2 * norm
    layer += (q + 2 * k) * h if model_type == "qwen2" else 0
    layer += 2 * h if model_type == "qwen3" else 0
    return shape.vocab_size * d * (1 if shape.tied_embeddings else 2) + norm + shape.num_layers * layer


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_counts_of_a_family_and_its_sub_shapes(model_type: str, tied: bool) -> None:
    config = hf_config(model_type, layers=5, tied=tied)
    shape = discover(config).architecture
    assert (shape.num_layers, shape.hidden_size, shape.ffn_size, shape.num_heads, shape.num_kv_heads, shape.head_dim) == (5, 96, 160, 8, 4, 16)
    assert shape.tied_embeddings is tied
    assert shape.num_parameters == formula(model_type, shape) == sum(p.numel() for p in meta_model(config).parameters())
    draw = random.Random(0)
    for _ in range(20):
        groups = draw.choice([1, 2, 4])
        small = shape.replace(
            num_layers=draw.randint(1, 5),
            hidden_size=draw.randint(1, 96),
            ffn_size=draw.randint(1, 160),
            num_heads=groups * draw.randint(1, 2),
            num_kv_heads=groups,
        )
        assert small.num_parameters == formula(model_type, small)
        assert small.num_embedding_parameters == small.vocab_size * small.hidden_size * (1 if tied else 2)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row[0])
def test_published_counts(row: tuple[Any, ...]) -> None:
    """Both ways: a model of that config, and a cut of the family's teacher."""
    _, model_type, layers, hidden, ffn, heads, kv_heads, vocab, total, non_embedding = row
    config = hf_config(model_type, layers=layers, hidden=hidden, ffn=ffn, heads=heads, kv_heads=kv_heads, head_dim=128, vocab=vocab)
    shape = discover(config).architecture
    assert (shape.num_parameters, shape.num_non_embedding_parameters) == (total, non_embedding)
    teacher_row = next(r for r in PUBLISHED if r[1] == model_type)
    if kv_heads <= teacher_row[6]:
        sizes = {"hidden": teacher_row[3], "ffn": teacher_row[4], "heads": teacher_row[5], "kv_heads": teacher_row[6]}
        teacher = discover(hf_config(model_type, layers=teacher_row[2], head_dim=128, vocab=vocab, **sizes)).architecture
        cut = teacher.replace(num_layers=layers, hidden_size=hidden, ffn_size=ffn, num_heads=heads, num_kv_heads=kv_heads)
        cut.check_within(teacher)
        assert (cut.num_parameters, cut.num_non_embedding_parameters) == (total, non_embedding)


@pytest.mark.parametrize("row", MORE, ids=lambda row: f"{row[0]}-{row[-1]}")
def test_more_published_counts(row: tuple[Any, ...]) -> None:
    model_type, layers, hidden, ffn, heads, kv_heads, head_dim, vocab, tied, total = row
    sizes = {"layers": layers, "hidden": hidden, "ffn": ffn, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "vocab": vocab}
    assert discover(hf_config(model_type, tied=tied, **sizes)).architecture.num_parameters == total


def test_flops_of_a_decoder() -> None:
    """LLaMA-7B at 64 tokens: 423.93 G multiply-adds with full attention, of which causality spares half the attention's."""
    shape = discover(hf_config("llama", layers=32, hidden=4096, ffn=11008, heads=32, kv_heads=32, head_dim=128, vocab=32_000)).architecture
    attention = 32 * 2 * 64 * 64 * 4096  # MACs of scores and values, every position against every other
    assert 64 * shape.flops_per_token(64) / 2 + attention / 2 == pytest.approx(423.93e9, rel=1e-4)
    assert shape.kv_cache_bytes(batch_size=2, sequence_length=10) == 2 * 2 * 10 * 32 * 4096 * 2


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_proof_passes(model_type: str, tied: bool) -> None:
    """Masked equals pruned to float32 rounding on every axis, with an eps so large that forgetting to rescale it would show.

    Not for qwen3: its config has one eps, also for the q/k norms, which are not cut; there it keeps the usual small one.
    """
    eps = {"nemotron": {"norm_eps": 0.05}, "qwen3": {"rms_norm_eps": 1e-6}}.get(model_type, {"rms_norm_eps": 0.05})
    differences = prove(hf_config(model_type, tied=tied, **eps))
    assert set(differences) == {"layer", "hidden", "ffn", "head", "kv_head", "all"}
    assert max(differences.values()) < 1e-4


def planted(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Let the proof work with a family that was misunderstood."""

    def wrong(config: Any) -> Family:
        return dataclasses.replace(discover(config), **changes)

    monkeypatch.setattr(proof, "discover", wrong)


def test_proof_refuses_a_wrong_norm_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, norm=NormKind(rms=True, weight_offset=1.0))
    with pytest.raises(ArchitectureError, match="'llama' is refused: cutting 'hidden'"):
        prove(hf_config("llama"))


def test_proof_refuses_a_layer_norm_taken_for_an_rms_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, norm=NormKind(rms=True, weight_offset=1.0))
    with pytest.raises(ArchitectureError, match="'nemotron' is refused: cutting 'hidden'"):
        prove(hf_config("nemotron"))


def test_proof_refuses_a_forgotten_rescaling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rescaled weights without the rescaled eps, and the other way round."""
    config = hf_config("llama", rms_norm_eps=0.05)
    with monkeypatch.context() as patch:
        patch.setattr(proof, "target_config", lambda c, plan, f: target_config(c, dataclasses.replace(plan, norm_rescale=False), f))
        with pytest.raises(ArchitectureError, match="cutting 'hidden'"):
            prove(config)
    monkeypatch.setattr(proof, "prune_weights", lambda read, plan, f: prune_weights(read, dataclasses.replace(plan, norm_rescale=False), f))
    with pytest.raises(ArchitectureError, match="cutting 'hidden'"):
        prove(config)


def test_proof_refuses_a_wrong_order_in_a_fused_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    """phi3's q|k|v noted as k|q|v has the right shapes and the wrong weights."""
    width = "head_dim"
    wrong = LayoutNote("phi3", r"self_attn\.qkv_proj\.weight", 0, (("kv_head", width), ("head", width), ("kv_head", width)))
    monkeypatch.setattr(layouts, "LAYOUTS", (wrong, *layouts.LAYOUTS[1:]))
    monkeypatch.setattr(family, "_FOUND", {})
    with pytest.raises(ArchitectureError, match="'phi3' is refused: cutting 'head'"):
        prove(hf_config("phi3"))


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
        ("modernbert", "cannot build a causal LM of type 'modernbert'"),
        ("bert", "modules take the 'head' axis"),
        ("vit", "no field for vocab"),
        ("gpt_neox", r"'gpt_neox\.layers\.0\.attention\.query_key_value\.weight'.*fused"),
        ("mixtral", r"'model\.layers\.0\..*experts.*'.*fused"),
    ],
)
def test_what_is_not_understood_is_refused(model_type: str, words: str) -> None:
    from transformers import AutoConfig

    with pytest.raises(ArchitectureError, match=words) as caught:
        discover(AutoConfig.for_model(model_type))
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_causal_lm_is_refused(tmp_path: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model("bert", architectures=["BertForMaskedLM"]).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no causal language model.*BertForMaskedLM"):
        config_of(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(MinitronError, match="config.json cannot be used"):
        config_of(tmp_path)


def test_taps_lie_where_the_axes_are_observed() -> None:
    found = discover(hf_config("qwen3", layers=2))
    assert found.taps.blocks == ["model.layers.0", "model.layers.1"]
    assert found.taps.ffn == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert found.taps.head == [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
    norms = [f"model.layers.{i}.{name}_layernorm" for i in range(2) for name in ("input", "post_attention")]
    assert sorted(found.taps.norms) == sorted([*norms, "model.norm"])  # and not the q/k norms, which run over a head
    assert found.norm == NormKind(rms=True, weight_offset=0.0)
    assert discover(hf_config("nemotron")).norm == NormKind(rms=False, weight_offset=1.0)


def test_plain_slicing_copies_norms_and_eps() -> None:
    """With norm_rescale=False the pruned norm weights are the teacher's kept entries, bit for bit, and eps stays."""
    config = hf_config("llama")
    found = discover(config)
    torch.manual_seed(0)
    weights = {spec.name: torch.randn(spec.shape(found.architecture.size)) for spec in found.layout.parameters}
    target = found.architecture.replace(hidden_size=64)
    plan = make_plan(proof.random_scores(found.architecture), found.architecture, target, kept_layers=[0, 1, 2], norm_rescale=False)
    cut = dict(prune_weights(weights.__getitem__, plan, found))
    exact = dict(prune_weights(weights.__getitem__, dataclasses.replace(plan, norm_rescale=True), found))
    assert target_config(config, plan, found).rms_norm_eps == config.rms_norm_eps
    assert target_config(config, dataclasses.replace(plan, norm_rescale=True), found).rms_norm_eps == pytest.approx(config.rms_norm_eps * 96 / 64)
    for name in ("model.norm.weight", "model.layers.1.input_layernorm.weight"):
        assert torch.equal(cut[name], weights[name][plan.hidden])
        torch.testing.assert_close(exact[name].double(), weights[name][plan.hidden].double() * (96 / 64) ** 0.5, rtol=1e-6, atol=0)
    assert torch.equal(cut["lm_head.weight"], exact["lm_head.weight"])


def test_lists_that_run_per_layer_follow_the_kept_layers() -> None:
    """qwen2's layer_types, and generation after a depth cut, which stale layer indices would break."""
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = hf_config("qwen2", layers=4, layer_types=kinds, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    found = discover(config)
    target = found.architecture.replace(num_layers=2)
    plan = make_plan(proof.random_scores(found.architecture), found.architecture, target, kept_layers=[0, 3])
    small = target_config(config, plan, found)
    assert small.layer_types == ["full_attention", "sliding_attention"]
    torch.manual_seed(0)
    weights = {spec.name: torch.randn(spec.shape(found.architecture.size)) * 0.1 for spec in found.layout.parameters}
    model = model_from_weights(small, dict(prune_weights(weights.__getitem__, plan, found)), dtype=torch.float32, device=torch.device("cpu"))
    model.config.use_cache = True
    tokens = torch.arange(1, 6).unsqueeze(0)
    greedy = model.generate(tokens, max_new_tokens=6, do_sample=False)  # type: ignore[operator]
    model.config.use_cache = False
    assert torch.equal(greedy, model.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=False))  # type: ignore[operator]
