"""Families are discovered from shapes and counted exactly; what is not understood is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from helpers_models import FAMILIES, VARIANTS, family_config, hf_config

from minitron.core.architecture import Architecture
from minitron.core.axes import Coupling, describe_dim
from minitron.errors import ArchitectureError, CheckpointError, MinitronError
from minitron.models import Family, NormKind, config_of, discover
from minitron.models.fields import meta_model

PLAIN = ("llama", "mistral", "qwen2", "qwen3", "phi3", "nemotron")

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
    ("llama", 40, 5120, 13824, 40, 40, 128, 32_000, False, 13_015_864_320),
]
#: Shapes that were cut out of a published one: layers, hidden, ffn, heads of a row of ``MORE`` (or Llama 3), and what is left of them.
CUTS = [
    ((32, 4096, 11008, 32, 32, 32_000), {31: 6_536_032_256, 25: 5_321_732_096, 23: 4_916_965_376, 21: 4_512_198_656}),
    ((40, 5120, 13824, 40, 40, 32_000), {32: 10_478_228_480, 30: 9_843_819_520, 29: 9_526_615_040, 25: 8_257_797_120}),
    ((32, 4096, 14336, 32, 8, 128_256), {31: 7_812_149_248, 26: 6_721_589_248, 16: 4_540_469_248}),
]
#: Sheared-LLaMA, out of LLaMA-7B: layers, hidden, ffn, heads, total.
SHEARED = [(32, 2560, 6912, 20, 2_701_560_320), (24, 2048, 5504, 16, 1_345_423_360), (24, 1024, 2816, 8, 373_867_520)]


def formula(model_type: str, shape: Architecture) -> int:
    """Parameters of a Llama-like model: embedding(s), final norm, and per layer attention, MLP, norms, biases and q/k norms."""
    d, f, q, k, h = shape.hidden_size, shape.ffn_size, shape.num_heads, shape.num_kv_heads, shape.head_dim
    norm = 2 * d if model_type == "nemotron" else d  # a layer norm has a bias too
    layer = 2 * d * q * h + 2 * d * k * h + (2 if model_type == "nemotron" else 3) * d * f + 2 * norm
    layer += (q + 2 * k) * h if model_type == "qwen2" else 0
    layer += 2 * h if model_type == "qwen3" else 0
    return shape.vocab_size * d * (1 if shape.tied_embeddings else 2) + norm + shape.num_layers * layer


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", PLAIN)
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


def big_llama(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int) -> Architecture:
    """A Llama of head width 128."""
    sizes = {"layers": layers, "hidden": hidden, "ffn": ffn, "heads": heads, "kv_heads": kv_heads, "vocab": vocab}
    return discover(hf_config("llama", head_dim=128, **sizes)).architecture


@pytest.mark.parametrize(("sizes", "left"), CUTS, ids=lambda value: "" if isinstance(value, dict) else f"l{value[0]}-h{value[1]}-f{value[2]}")
def test_published_depth_cuts(sizes: tuple[int, ...], left: dict[int, int]) -> None:
    teacher = big_llama(*sizes)
    assert {layers: teacher.replace(num_layers=layers).num_parameters for layers in left} == left


@pytest.mark.parametrize(("layers", "hidden", "ffn", "heads", "total"), SHEARED)
def test_sheared_llama(layers: int, hidden: int, ffn: int, heads: int, total: int) -> None:
    """As a cut of LLaMA-7B, and as a model of its own."""
    teacher = big_llama(*CUTS[0][0])
    cut = teacher.replace(num_layers=layers, hidden_size=hidden, ffn_size=ffn, num_heads=heads, num_kv_heads=heads)
    cut.check_within(teacher)
    assert cut.num_parameters == big_llama(layers, hidden, ffn, heads, heads, 32_000).num_parameters == total


def sparse_formula(shape: Architecture, *, dense: int, experts: int, qk_norm: int = 0, bias: bool = False, shared_gate: bool = False) -> int:
    """Parameters of a model with ``dense`` layers of one MLP, and others with a router and so many experts of three matrices (and a shared one)."""
    d, q, k, h = shape.hidden_size, shape.num_heads, shape.num_kv_heads, shape.head_dim
    layer = 2 * d * q * h + 2 * d * k * h + 2 * d + qk_norm + ((q + 2 * k) * h if bias else 0)
    sparse = d * shape.num_experts + experts * 3 * d * shape.expert_ffn_size + 3 * d * shape.shared_ffn_size + (d if shared_gate else 0)
    embeddings = shape.vocab_size * d * (1 if shape.tied_embeddings else 2)
    return embeddings + d + shape.num_layers * layer + dense * 3 * d * shape.ffn_size + (shape.num_layers - dense) * sparse


def test_mixtral_8x7b() -> None:
    """46.7 billion, of which a token meets two experts a layer: 12.9; and cut to five experts."""
    sizes = {"layers": 32, "hidden": 4096, "ffn": 14336, "heads": 32, "kv_heads": 8, "head_dim": 128, "vocab": 32_000}
    shape = discover(hf_config("mixtral", num_local_experts=8, num_experts_per_tok=2, **sizes)).architecture
    assert shape.num_parameters == sparse_formula(shape, dense=0, experts=8) == 46_702_792_704
    assert shape.num_active_parameters == sparse_formula(shape, dense=0, experts=2) == 12_879_925_248
    small = shape.replace(num_experts=5, expert_ffn_size=7168, num_layers=20)
    assert small.num_parameters == sparse_formula(small, dense=0, experts=5)
    assert small.num_active_parameters == sparse_formula(small, dense=0, experts=2)


@pytest.mark.parametrize(
    ("model_type", "dense", "more"),
    [
        ("mixtral", [], {}),
        ("qwen3_moe", [0, 2, 3], {"qk_norm": 32}),  # every second layer is sparse, but for the last
        ("qwen2_moe", [1], {"bias": True, "shared_gate": True}),
    ],
)
def test_counts_of_sparse_families(model_type: str, dense: list[int], more: dict[str, Any]) -> None:
    """Totals and active counts, of the teacher and of any layers, experts and widths left of it."""
    config = family_config(model_type)
    shape = discover(config).architecture
    assert shape.num_parameters == sum(p.numel() for p in meta_model(config).parameters())
    draw = random.Random(0)
    for _ in range(20):
        kept = tuple(sorted(draw.sample(range(shape.num_layers), draw.randint(1, shape.num_layers))))
        widths = [key for key in ("hidden_size", "ffn_size", "expert_ffn_size", "shared_ffn_size") if getattr(shape, key)]
        sizes = {key: draw.randint(1, getattr(shape, key)) for key in widths}
        small = shape.replace(num_layers=len(kept), kept_layers=kept, num_experts=draw.randint(2, 4), num_heads=4, num_kv_heads=2, **sizes)
        left = len(set(kept) & set(dense))
        assert small.num_parameters == sparse_formula(small, dense=left, experts=small.num_experts, **more)
        assert small.num_active_parameters == sparse_formula(small, dense=left, experts=2, **more)


def test_flops_of_a_decoder() -> None:
    """LLaMA-7B at 64 tokens: 423.93 G multiply-adds with full attention, of which causality spares half the attention's."""
    shape = discover(hf_config("llama", layers=32, hidden=4096, ffn=11008, heads=32, kv_heads=32, head_dim=128, vocab=32_000)).architecture
    attention = 32 * 2 * 64 * 64 * 4096  # MACs of scores and values, every position against every other
    assert 64 * shape.flops_per_token(64) / 2 + attention / 2 == pytest.approx(423.93e9, rel=1e-4)
    assert shape.kv_cache_bytes(batch_size=2, sequence_length=10) == 2 * 2 * 10 * 32 * 4096 * 2


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
        ("modernbert", "cannot build a causal LM of type 'modernbert'"),
        ("bert", "'bert' is no decoder-only language model: it is an encoder"),
        ("vit", "'vit' is no decoder-only language model"),
        ("mamba", "no field for head: it describes no decoder"),
        ("gpt2", "no field for ffn"),
        ("deepseek_v3", r"'model\.layers\.0\.self_attn\.kv_b_proj\.weight'"),
        ("opt", r"'model\.decoder\.project_out\.weight' of 'opt' appears or vanishes with hidden_size"),
        ("jamba", r"'model\.layers\.1\.feed_forward\.experts\.gate_up_proj'"),
    ],
)
def test_what_is_not_understood_is_refused(model_type: str, words: str) -> None:
    from transformers import AutoConfig

    layers = {"deepseek_v3": 4, "jamba": 8}.get(model_type)
    with pytest.raises(ArchitectureError, match=words) as caught:
        discover(AutoConfig.for_model(model_type, **({"num_hidden_layers": layers} if layers else {})))
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_causal_lm_is_refused(tmp_path: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model("bert", architectures=["BertForMaskedLM"]).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no decoder-only language model: its config names BertForMaskedLM"):
        config_of(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(MinitronError, match="config.json cannot be used"):
        config_of(tmp_path)


def test_a_norm_for_every_head_of_its_own_is_refused() -> None:
    """stablelm's option; without it the family passes."""
    with pytest.raises(ArchitectureError, match=r"'model\.layers\.0\.self_attn\.k_layernorm\.norms\.\d+\.weight'"):
        discover(family_config("stablelm", qk_layernorm=True))


def test_widths_that_differ_by_layer_are_refused() -> None:
    from transformers import AutoConfig

    with pytest.raises(ArchitectureError, match=r"intermediate_size of the gemma3n_text config is \[.*widths that differ per layer are refused"):
        discover(AutoConfig.for_model("gemma3n_text"))


def test_taps_lie_where_the_axes_are_observed() -> None:
    found = discover(hf_config("qwen3", layers=2))
    assert found.taps.blocks == ["model.layers.0", "model.layers.1"]
    assert found.taps.ffn == {i: f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert found.taps.head == {i: f"model.layers.{i}.self_attn.o_proj" for i in range(2)}
    norms = [f"model.layers.{i}.{name}_layernorm" for i in range(2) for name in ("input", "post_attention")]
    assert sorted(found.taps.norms) == sorted([*norms, "model.norm"])  # and not the q/k norms, which run over a head
    assert found.norms == dict.fromkeys(found.taps.norms, NormKind("hidden", rms=True, weight_offset=0.0))
    assert found.final_norm == "model.norm" and found.embedding == "model.embed_tokens.weight"
    assert found.taps.shared_ffn == found.taps.experts == found.taps.router == {}


def test_taps_of_layers_that_differ() -> None:
    """Layers without a part are missing: dense and sparse ones, attention and states."""
    found = discover(family_config("qwen2_moe"))
    assert found.taps.ffn == {1: "model.layers.1.mlp.down_proj"}
    assert found.taps.experts == {i: f"model.layers.{i}.mlp.experts" for i in (0, 2)}
    assert found.taps.router == {i: f"model.layers.{i}.mlp.gate" for i in (0, 2)}
    assert found.taps.shared_ffn == {i: f"model.layers.{i}.mlp.shared_expert.down_proj" for i in (0, 2)}
    hybrid = discover(family_config("nemotron_h"))
    assert set(hybrid.taps.head) == {2, 4} and set(hybrid.taps.ffn) == {3} and set(hybrid.taps.experts) == {1}
    assert hybrid.architecture.num_attention_layers == 2


@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [
        ("nemotron", {NormKind("hidden", False, 1.0)}),
        ("starcoder2", {NormKind("hidden", False, 0.0)}),
        ("gemma2", {NormKind("hidden", True, 1.0)}),
        ("olmo2", {NormKind("hidden", True, 0.0), NormKind("head", True, 0.0), NormKind("kv_head", True, 0.0)}),
    ],
)
def test_kinds_of_norms(model_type: str, kinds: set[NormKind]) -> None:
    assert set(discover(family_config(model_type)).norms.values()) == kinds


def test_embeddings_that_grow_with_the_hidden_size() -> None:
    """Gemma multiplies them by its square root; granite by a number of its own."""
    scaled = {model_type for model_type in FAMILIES if discover(family_config(model_type)).scaled_embedding}
    assert scaled == {"gemma", "gemma2", "gemma3_text"}


def coupled(found: Family) -> set[tuple[str, str, int]]:
    """Couplings as plain tuples."""
    return {(coupling.axis, coupling.other, coupling.ratio) for coupling in found.layout.couplings}


def test_couplings_of_every_family() -> None:
    """Sizes that one field holds, and families that compute their head width."""
    found = {model_type: coupled(discover(family_config(model_type))) for model_type in FAMILIES}
    assert {model_type: pairs for model_type, pairs in found.items() if pairs} == {
        "gpt_neox": {("hidden", "head", 16), ("kv_head", "head", 1)},
        "stablelm": {("hidden", "head", 16)},
        "olmoe": {("hidden", "head", 16)},
    }
    sparse = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "first_k_dense_replace": 1}
    assert coupled(discover(hf_config("glm4_moe", n_shared_experts=1, **sparse))) == {("shared_ffn", "expert_ffn", 1)}


def test_coupled_sizes_follow_or_are_refused() -> None:
    """gpt-neox: hidden channels are heads times their width, whichever of them is given."""
    shape = discover(family_config("gpt_neox")).architecture
    assert shape.couplings == (Coupling("hidden", "head", 16), Coupling("kv_head", "head", 1))
    for given in ({"hidden_size": 96}, {"num_heads": 6}, {"num_kv_heads": 6}, {"num_heads": 6, "hidden_size": 96}):
        cut = shape.with_coupled(**given)
        assert (cut.hidden_size, cut.num_heads, cut.num_kv_heads) == (96, 6, 6)
        cut.check_within(shape)
    wrong = [({"hidden_size": 96, "num_heads": 4}, "hidden_size=96 and num_heads=4"), ({"hidden_size": 100}, "hidden_size=100 and num_heads=8")]
    for given, words in wrong:
        with pytest.raises(ArchitectureError, match=rf"ties hidden_size to 16 \* num_heads: {words} do not go together"):
            shape.with_coupled(**given).check_within(shape)
    with pytest.raises(ArchitectureError, match="ties num_kv_heads to num_heads: num_kv_heads=4 and num_heads=8"):
        shape.replace(num_kv_heads=4).check_within(shape)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "nemotron_h"])
def test_fewer_experts_than_a_token_is_sent_to_are_refused(model_type: str) -> None:
    shape = discover(family_config(model_type)).architecture
    assert (shape.num_experts, shape.num_experts_per_token) == (4, 2)
    shape.replace(num_experts=2).check_within(shape)
    with pytest.raises(ArchitectureError, match="num_experts=1 is fewer than the 2 experts that every token is sent to"):
        shape.replace(num_experts=1).check_within(shape)


@pytest.mark.parametrize(
    ("model_type", "name", "dims"),
    [
        ("llama", "model.layers.1.self_attn.q_proj.weight", "head*16, hidden"),
        ("llama", "model.layers.1.mlp.gate_proj.bias", "ffn"),
        ("phi3", "model.layers.1.self_attn.qkv_proj.weight", "head*16|kv_head*16|kv_head*16, hidden"),
        ("phi3", "model.layers.1.mlp.gate_up_proj.weight", "ffn|ffn, hidden"),
        ("gpt_neox", "gpt_neox.layers.1.attention.query_key_value.weight", "head*48, hidden"),
        ("olmo2", "model.layers.1.self_attn.k_norm.weight", "kv_head*16"),
        ("qwen3", "model.layers.1.self_attn.k_norm.weight", "16"),
        ("mixtral", "model.layers.1.mlp.experts.gate_up_proj", "expert, expert_ffn|expert_ffn, hidden"),
        ("mixtral", "model.layers.1.mlp.gate.weight", "expert, hidden"),
        ("gpt_oss", "model.layers.1.mlp.experts.gate_up_proj", "expert, hidden, expert_ffn*2"),
        ("gpt_oss", "model.layers.1.self_attn.sinks", "head"),
        ("qwen2_moe", "model.layers.2.mlp.shared_expert.up_proj.weight", "shared_ffn, hidden"),
        ("nemotron_h", "model.layers.1.mixer.gate.e_score_correction_bias", "expert"),
    ],
)
def test_axes_of_parameters(model_type: str, name: str, dims: str) -> None:
    spec = next(s for s in discover(family_config(model_type)).layout.parameters if s.name == name)
    assert ", ".join(describe_dim(dim) for dim in spec.dims) == dims
    assert spec.layer == int(name.split(".layers.")[1].split(".")[0]) and spec.buffer is name.endswith("correction_bias")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_map_has_every_parameter_with_its_shape(model_type: str, variant: str) -> None:
    """Against the model itself, at the sizes of the table."""
    config = family_config(model_type, variant)
    found = discover(config)
    real = {name: tuple(p.shape) for name, p in meta_model(config).named_parameters()}
    assert {s.name: s.shape(found.architecture.size) for s in found.layout.parameters if not s.buffer} == real
    assert found.architecture.num_parameters == sum(p.numel() for p in meta_model(config).parameters())
