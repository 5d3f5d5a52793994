"""Weights that are read when their place is known: the model is the plainly loaded one, and a rank holds its own share."""

from __future__ import annotations

import gc
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_engines import blocks_of
from helpers_memory import LiveBytes
from helpers_models import FAMILIES, family_config, saved, tiny_llama
from helpers_ranks import run_ranks
from safetensors.torch import load_file, save_file

from minitron.core.lazy import sources_of
from minitron.distill.best import write_shared_weights
from minitron.distill.losses import LossConfig
from minitron.distill.pair import StudentLosses
from minitron.distill.training import student_weights
from minitron.engine import EngineConfig, OptimizerConfig, build_engine
from minitron.engine.lazy import LazyWeights, read_all
from minitron.errors import CheckpointError, ConfigError
from minitron.models import checkpoint_form, load_causal_lm
from minitron.models.head import head_of
from minitron.models.lazy import load_lazily
from minitron.models.load import attention_for, check_attention

CPU = torch.device("cpu")


TIED = [(model_type, "mqa") for model_type in ("llama", "gemma3_text", "mixtral", "nemotron_h")]


@pytest.mark.parametrize(("model_type", "variant"), [*((model_type, "gqa") for model_type in FAMILIES), *TIED])
def test_a_lazily_loaded_model_is_the_plain_one(tmp_path: Path, model_type: str, variant: str) -> None:
    """Weights, buffers (rotary frequencies are in no file), dtypes, ties and logits, bit for bit; and the head is read off the config alike."""
    folder = saved(tmp_path, family_config(model_type, variant))
    dtype = torch.float32 if model_type in ("llama", "mixtral") else torch.bfloat16  # some families keep parts in float32
    plain, lazy = load_causal_lm(folder, dtype=dtype, device=CPU), load_lazily(folder, dtype=dtype)
    assert all(p.is_meta for p in lazy.parameters()) and not any(b.is_meta for b in lazy.buffers())
    assert head_of(lazy).transform == head_of(plain).transform
    read_all(lazy, device=CPU)
    assert not sources_of(lazy)
    for kind in ("named_parameters", "named_buffers"):
        expected, found = (dict(getattr(model, kind)()) for model in (plain, lazy))
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items())
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        assert torch.equal(lazy(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "mixtral", "gpt_oss", "qwen2_moe"])
def test_rows_are_rows_of_the_whole(tmp_path: Path, model_type: str) -> None:
    """Also where a parameter is put together from one tensor per expert, perhaps transposed."""
    folder = saved(tmp_path, family_config(model_type))
    expected = dict(load_causal_lm(folder, dtype=torch.float32, device=CPU).named_parameters())
    lazy = load_lazily(folder, dtype=torch.float32)
    weights, source = LazyWeights(lazy), sources_of(lazy)[""]
    for name, tensor in expected.items():
        num_rows = len(tensor)
        for start, stop in ((0, num_rows), (num_rows // 3, num_rows), (num_rows // 3, num_rows // 3 + 1), (1, max(1, num_rows - 1))):
            assert torch.equal(source.read(name, start, stop), tensor[start:stop]), (name, start, stop)
        flat = tensor.flatten()
        for start, stop in ((0, 5), (len(flat) // 3, len(flat) // 2), (len(flat) - 3, len(flat) + 9), (len(flat) + 2, len(flat) + 4)):
            assert torch.equal(weights.read_flat(name, tensor.shape, start, stop), flat[start:stop])


def test_what_is_not_understood_is_loaded_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_llama(tmp_path / "tied", tied=True)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.INFO):
        model = load_lazily(folder, dtype=torch.float32)
    assert not any(p.is_meta for p in model.parameters())
    assert [r.message for r in caplog.records if "read whole" in r.message] == [
        f"{folder} is read whole by every process: 'lm_head.weight' is in its files and not in the model"
    ]


@pytest.mark.parametrize("damage", ["missing", "shape", "cut"])
def test_damage_is_found_before_anything_is_read(tmp_path: Path, damage: str) -> None:
    folder = tiny_llama(tmp_path)
    path = folder / "model.safetensors"
    weights = load_file(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        norm = weights.pop("model.norm.weight")
        save_file(weights | ({"model.norm.weight": norm[:-1].clone()} if damage == "shape" else {}), path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=str(folder)):
        load_lazily(folder, dtype=torch.float32)


# ---------------------------------------------------------------------------------------------------------------- bytes per rank


def bytes_of(folder: Path, config: EngineConfig, precision: str, out: Path) -> dict[str, float]:
    """Bytes of this rank: what stays after ``prepare``, what was there beside it for a while, and what saving takes beside it."""
    engine = build_engine(config, optimizer=OptimizerConfig(), precision=precision)
    student = load_lazily(folder, dtype=torch.float32)
    root = StudentLosses(student, LossConfig(), compute_dtype=engine.compute_dtype)
    sizes = {"total": sum(p.nbytes for p in root.parameters()), "largest": max(p.nbytes for p in root.parameters())}
    with LiveBytes() as live:
        engine.prepare(root, blocks=blocks_of(student))
        gc.collect()
        stays, loading = live.now, live.peak - live.now
        live.peak = live.now

        def slowly() -> Any:
            for item in student_weights(engine):
                yield item
                del item
                time.sleep(0.01)  # gloo's thread holds what it gathered a moment longer

        form = checkpoint_form(folder, student.config)
        write_shared_weights(out, form(slowly()))
        saving = live.peak - stays
    return {**sizes, "stays": stays, "loading": loading, "saving": saving}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("wide"), layers=8, hidden=64, ffn=192, heads=4, vocab=1000)


@pytest.mark.parametrize(("ranks", "shards", "options"), [(1, 1, {}), (2, 2, {}), (4, 4, {}), (4, 2, {"sharding": "hybrid", "shard_size": 2})])
def test_a_rank_of_fsdp_holds_its_share(wide: Path, tmp_path: Path, ranks: int, shards: int, options: dict[str, Any]) -> None:
    """Never the model: a share of it, and for a while the rows that are being read (a tensor and the reader's buffer)."""
    for found in run_ranks(bytes_of, ranks, wide, EngineConfig(name="fsdp", **options), "float32", tmp_path):
        assert found["stays"] == pytest.approx(found["total"] / shards, rel=2e-3)
        assert found["loading"] <= 1.05 * found["largest"]
        assert found["saving"] <= 1.05 * found["largest"]
    saved, original = (load_file(folder / "model.safetensors") for folder in (tmp_path, wide))
    assert saved.keys() == original.keys() and all(torch.equal(saved[name], tensor) for name, tensor in original.items())


@pytest.mark.parametrize(("ranks", "precision"), [(2, "float32"), (3, "bf16")])
def test_a_rank_of_zero_3_holds_its_share(wide: Path, tmp_path: Path, ranks: int, precision: str) -> None:
    """DeepSpeed makes room for float32 gradients and masters at once, and for one bucket, which is as large as this small model."""
    sharded, bucket = 4 + 4 + (4 if precision == "float32" else 2), 4
    for found in run_ranks(bytes_of, ranks, wide, EngineConfig(name="deepspeed", zero_stage=3), precision, tmp_path):
        assert found["stays"] == pytest.approx(found["total"] / 4 * (sharded / ranks + bucket), rel=5e-3)
        assert found["loading"] <= 1.6 * found["largest"]
        assert found["saving"] <= 1.4 * found["largest"]
    saved, original = (load_file(folder / "model.safetensors") for folder in (tmp_path, wide))
    assert all(torch.equal(saved[name], tensor) for name, tensor in original.items())


def test_local_reads_tensor_by_tensor(wide: Path, tmp_path: Path) -> None:
    (found,) = run_ranks(bytes_of, 1, wide, EngineConfig(), "float32", tmp_path)
    assert found["stays"] == pytest.approx(found["total"], rel=1e-3) and found["loading"] <= found["largest"] and found["saving"] <= 1000


# ---------------------------------------------------------------------------------------------------------------- attention


def test_flash_attention_is_asked_for_only_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers raises where it is missing. This machine's answer is replaced, because tests run without a GPU."""
    assert attention_for(torch.bfloat16) is None or torch.cuda.is_available()
    for here, dtype, name, expected in [
        (False, torch.bfloat16, "auto", None),
        (True, torch.bfloat16, "auto", "flash_attention_2"),
        (True, torch.float32, "auto", None),
        (True, torch.float32, "flash_attention_2", "sdpa"),
        (False, torch.bfloat16, "eager", "eager"),
    ]:
        monkeypatch.setattr("minitron.models.load._flash_attention_is_here", lambda here=here: here)
        assert attention_for(dtype, name) == expected


@pytest.mark.parametrize(("name", "message"), [("flash", "is unknown; known: auto"), ("flash_attention_2", "needs .*: use auto or sdpa")])
def test_attention_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setattr("minitron.models.load._flash_attention_is_here", lambda: False)
    with pytest.raises(ConfigError, match=f"teacher.attention={name} {message}"):
        check_attention(name)


def test_the_chosen_attention_is_the_models(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    models = [load(folder, dtype=torch.float32, attention="eager") for load in (load_causal_lm, load_lazily)]
    assert [model.config._attn_implementation for model in models] == ["eager", "eager"]
