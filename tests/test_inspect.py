"""``minitron inspect``: what a config alone tells, for people and as JSON; the page of families in step with the list that makes it."""

from __future__ import annotations

import ast
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_models import tiny_llama

from minitron.cli import main
from minitron.errors import ArchitectureError
from minitron.inspection_table import collapse

ROOT = Path(__file__).resolve().parents[1]
LLAMA_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
TINY = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}

Told = Callable[..., str]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """What ``minitron inspect`` writes to standard output when all is proved."""

    def run(*words: str) -> str:
        capsys.readouterr()
        assert main(["inspect", *words]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Told:
    """The one sentence of a refused ``minitron inspect``, which prints nothing else."""

    def run(*words: str) -> str:
        capsys.readouterr()
        assert main(["inspect", *words]) == 2
        out, err = capsys.readouterr()
        assert out == "" and "Traceback" not in err
        said = [line for line in err.splitlines() if line.startswith("minitron: ")]
        assert len(said) == 1, err
        return said[0]

    return run


def write_config(path: Path, values: dict[str, Any]) -> str:
    """A ``config.json`` and nothing else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
    return str(path)


def test_the_document_of_a_small_llama(told: Told, tmp_path: Path) -> None:
    """Every figure against a formula; the same from a folder with weights, a folder with a config only, and the bare file."""
    folder = tiny_llama(tmp_path / "model", layers=3, hidden=48, ffn=64, heads=6, kv_heads=2, vocab=300)
    document = json.loads(told(str(folder), "--json"))
    attention, mlp = 48 * 8 * (6 + 2 + 2 + 6), 3 * 48 * 64
    blocks = 3 * (attention + mlp)
    assert document["model_type"] == "llama"
    assert document["num_parameters"] == document["num_active_parameters"] == 2 * 300 * 48 + 48 + blocks + 3 * 2 * 48
    assert document["num_non_embedding_parameters"] == document["num_parameters"] - 2 * 300 * 48
    assert document["architecture"]["head_dim"] == 8 and document["architecture"]["tied_embeddings"] is False
    assert document["axes"] == {
        "layer": {"size": 3, "units": 3, "field": "num_hidden_layers"},
        "hidden": {"size": 48, "units": 48, "field": "hidden_size"},
        "ffn": {"size": 64, "units": 64, "field": "intermediate_size"},
        "head": {"size": 48, "units": 6, "field": "num_attention_heads"},
        "kv_head": {"size": 16, "units": 2, "field": "num_key_value_heads"},
    }
    assert len(document["parameters"]) == 3 * 9 + 3
    assert document["parameters"]["model.layers.2.self_attn.k_proj.weight"] == ["kv_head*8", "hidden"]
    assert document["parameters"]["model.layers.0.mlp.down_proj.weight"] == ["hidden", "ffn"]
    assert document["observed"]["ffn"] == [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]
    assert document["coupled"] == [] and "stored" not in document
    assert document["kv_cache_bytes_per_token"] == 2 * 3 * 2 * 8 * 2
    assert document["sequence_length"] == 1024
    assert document["flops_per_token"] == 2 * (blocks + 300 * 48) + 2 * 1024 * 48 * 3
    proof = document["proof"]
    assert proof["passed"] is True and proof["refused"] == {}
    assert set(proof["max_abs_diff"]) == {*document["axes"], "all"}
    assert all(0 <= difference < 1e-3 for difference in proof["max_abs_diff"].values())
    bare = write_config(tmp_path / "elsewhere" / "any_name.json", json.loads((folder / "config.json").read_text()))
    assert json.loads(told(bare, "--json")) == document
    (folder / "model.safetensors").unlink()
    assert json.loads(told(str(folder), "--json")) == document
    longer = json.loads(told(str(folder), "--json", "data.sequence_length=2048"))
    assert longer["flops_per_token"] - document["flops_per_token"] == 2 * 1024 * 48 * 3


def test_the_table_for_people(told: Told, tmp_path: Path) -> None:
    lines = told(str(tiny_llama(tmp_path, layers=3))).splitlines()
    assert lines[0] == "llama"
    row = next(line for line in lines if "q_proj" in line)
    assert re.fullmatch(r"  model\.layers\.\{0\.\.2\}\.self_attn\.q_proj\.weight +\[head\*8, hidden\] +48 x 48 +×3", row)
    assert any(re.fullmatch(r"head +6 +48  num_attention_heads +\d\.\de-\d\d  proved", line) for line in lines)
    assert any(re.fullmatch(r"all +\d\.\de-\d\d  proved", line) for line in lines)
    assert "  ffn         input of model.layers.{0..2}.mlp.down_proj" in lines
    assert "  kv_head is a group: keys, values and the 3 query heads that read them go together" in lines
    assert sum("layernorm.weight" in line for line in lines) == 2
    assert any("192 bytes per token" in line for line in lines)


def test_a_70b_config_from_a_process_of_its_own(tmp_path: Path) -> None:
    """The limit is 15 s. Processor time is counted, because a test machine is shared: 7 s measured, of which 5 s are imports."""
    write_config(tmp_path / "70b.json", LLAMA_70B)
    code = (
        "import sys, time; from minitron.cli import main; code = main(sys.argv[1:]); "
        "sys.stderr.write(f'seconds {time.process_time()}'); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, "inspect", "70b.json", "--json"], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["num_parameters"] == 70_553_706_496 and document["proof"]["passed"] is True
    found = re.search(r"seconds ([\d.]+)", done.stderr)
    assert found is not None and float(found.group(1)) < 15


def test_a_configured_teacher_of_8b(told: Told) -> None:
    start = time.process_time()
    document = json.loads(told("teacher=llama_3_1_8b", "--json"))
    assert time.process_time() - start < 15
    assert (document["num_parameters"], document["num_non_embedding_parameters"]) == (8_030_261_248, 6_979_588_096)
    assert document["kv_cache_bytes_per_token"] == 2 * 32 * 8 * 128 * 2
    assert document["proof"]["passed"] is True


def test_a_coupled_family(told: Told, tmp_path: Path) -> None:
    path = write_config(tmp_path / "config.json", {"model_type": "gpt_neox", **TINY})
    document = json.loads(told(path, "--json"))
    assert {"axis": "hidden", "other": "head", "ratio": 16} in document["coupled"]
    assert document["stored"] == {"embed_out.weight": {"axes": ["vocab", "hidden"], "parameter": "lm_head.weight"}}
    assert document["proof"]["passed"] is True
    assert "  hidden = 16 x head: cut together" in told(path).splitlines()


def test_experts(told: Told, tmp_path: Path) -> None:
    """Active parameters are those of the experts that a token is sent to; experts of a checkpoint stand in one line."""
    values = {"model_type": "mixtral", **TINY, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    path = write_config(tmp_path / "config.json", values)
    document = json.loads(told(path, "--json"))
    assert document["num_parameters"] - document["num_active_parameters"] == 2 * 2 * 3 * 64 * 80
    assert document["axes"]["expert"] == {"size": 4, "units": 4, "field": "num_local_experts"}
    assert document["parameters"]["model.layers.0.mlp.experts.gate_up_proj"] == ["expert", "expert_ffn|expert_ffn", "hidden"]
    assert {"expert", "expert_ffn"} <= document["proof"]["max_abs_diff"].keys()
    experts = [name for name in document["stored"] if ".experts." in name]
    assert len(experts) == 2 * 4 * 3 and all(document["stored"][name]["parameter"] in document["parameters"] for name in experts)
    table = told(path)
    assert re.search(r"model\.layers\.\{0\.\.1\}\.block_sparse_moe\.experts\.\{0\.\.3\}\.w2\.weight +\[hidden, expert_ffn\] +64 x 80 +×8\n", table)
    assert "2 of 4 experts per token" in table


def test_a_refused_axis_is_shown_and_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With an impossible tolerance the document still comes whole; the exit code and the sentence tell the refusal."""
    monkeypatch.setattr("minitron.prune.proof.TOLERANCE", -1.0)
    path = write_config(tmp_path / "config.json", {"model_type": "llama", **TINY, "num_key_value_heads": 2})
    assert main(["inspect", path, "--json"]) == 2
    out, err = capsys.readouterr()
    proof = json.loads(out)["proof"]
    assert proof["passed"] is False and set(proof["refused"]) == set(proof["max_abs_diff"])
    assert "minitron: 'llama' is refused: cutting 'layer' differs from masking it by" in err
    assert main(["inspect", path]) == 2
    assert re.search(r"hidden +64 +64 .* refused: 'llama' is refused: cutting 'hidden'", capsys.readouterr().out)


def test_families_that_are_not_understood(refused: Told, tmp_path: Path) -> None:
    from minitron.models.load import quiet_transformers

    quiet_transformers()
    path = write_config(tmp_path / "deepseek.json", {"model_type": "deepseek_v3", "num_hidden_layers": 2, "n_routed_experts": 8, "n_group": 1})
    assert "parameter 'model.layers.0.self_attn.kv_b_proj.weight' has shape" in refused(path, "--json")
    for model_type in ("bert", "roberta", "modernbert", "vit", "electra"):
        path = write_config(tmp_path / f"{model_type}.json", {"model_type": model_type})
        assert f"'{model_type}' is no decoder-only language model" in refused(path)
    for model_type in ("t5", "bart"):
        path = write_config(tmp_path / f"{model_type}.json", {"model_type": model_type})
        assert f"'{model_type}' is an encoder-decoder" in refused(path)


def test_what_cannot_be_inspected(refused: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing named, nothing there, weights that cannot be cut, and code that nobody allowed."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "inspect needs a model" in refused()
    assert "does not exist" in refused(str(tmp_path / "none"))
    assert "does not exist" in refused("none/config.json")
    assert "neither a folder here nor to be had" in refused("nobody/nothing-at-all")
    assert "'second' is not an override" in refused(str(tmp_path), "second")
    (tmp_path / "empty").mkdir()
    assert "it has no config.json" in refused(str(tmp_path / "empty"))
    (tmp_path / "weights.bin").write_bytes(b"")
    assert "weights.bin is a file: give" in refused(str(tmp_path / "weights.bin"))
    assert "cannot be used" in refused(write_config(tmp_path / "no_type.json", {"hidden_size": 8}))
    assert "teacher.config cannot be used" in refused("teacher.config={model_type: llamma}")
    quantized = {"model_type": "llama", **TINY, "quantization_config": {"quant_method": "fp8"}}
    assert "is quantized (fp8), and quantized weights cannot be cut" in refused(write_config(tmp_path / "fp8.json", quantized))
    names = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    assert "is no decoder-only language model: its config names T5For" in refused(write_config(tmp_path / "named.json", names))


def test_code_that_comes_with_a_checkpoint(refused: Told, tmp_path: Path) -> None:
    """It is not run without a word, and not cut with it."""
    marker = tmp_path / "ran"
    (tmp_path / "configuration_odd.py").write_text(
        f"from pathlib import Path\nfrom transformers import PreTrainedConfig\nPath({str(marker)!r}).touch()\n"
        "class OddConfig(PreTrainedConfig):\n    model_type = 'odd_one'\n"
    )
    write_config(tmp_path / "config.json", {"model_type": "odd_one", "auto_map": {"AutoConfig": "configuration_odd.OddConfig"}})
    assert "needs code that comes with it" in refused(str(tmp_path)) and not marker.exists()
    assert "'odd_one' needs modelling code that came with the checkpoint" in refused(str(tmp_path), "teacher.trust_remote_code=true")
    assert marker.exists()


def test_real_decoders_are_no_encoders() -> None:
    from transformers import AutoConfig

    from minitron.models.fields import require_decoder

    for model_type in ("llama", "gpt2", "gpt_neox", "gemma3_text", "gpt_oss", "nemotron_h", "modernbert-decoder", "mamba"):
        require_decoder(AutoConfig.for_model(model_type))
    require_decoder(AutoConfig.for_model("bert", is_decoder=True))
    with pytest.raises(ArchitectureError, match="fills in masked words"):
        require_decoder(AutoConfig.for_model("bert"))


def test_names_that_differ_in_their_numbers_alone() -> None:
    """Braces multiply out to exactly the names that were given."""
    names = [f"a.{layer}.b.{expert}.w" for layer in (0, 1, 2, 5) for expert in range(3)] + ["a.3.b.0.w", "norm.w"]
    found = collapse((name, "") for name in names)
    assert found == [("a.{0..2,5}.b.{0..2}.w", "", 12), ("a.3.b.0.w", "", 1), ("norm.w", "", 1)]
    assert [name for name, _, _ in collapse((f"l.{i}", "") for i in range(0, 32, 2))] == ["l.{0,2,..,30}"]
    assert [(name, what) for name, what, _ in collapse((f"l.{i}", i % 2) for i in range(4))] == [("l.{0,2}", 0), ("l.{1,3}", 1)]
    assert sum(count for _, _, count in found) == len(names)


def test_the_page_of_families_is_of_the_list_that_makes_it() -> None:
    """Titles and order, and no difference in the page that is over the tolerance."""
    tree = ast.parse((ROOT / "benchmarks" / "families.py").read_text())
    given = next(node.value for node in tree.body if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "FAMILIES")
    listed = [node.value for node in ast.walk(given) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    page = (ROOT / "docs" / "families.md").read_text()
    proved, _, told = page.partition("## Refused")
    rows = re.findall(r"^\| `([a-z0-9_]+)([^`]*)` \|(.*)$", proved.partition("## Proved")[2], flags=re.MULTILINE)
    assert [name for name, _, _ in rows] == [word for word in _in_order(given) if word in listed]
    for name, _, cells in rows:
        differences = [float(word) for word in re.findall(r"\d\.\de[+-]\d\d", cells)]
        assert len(differences) >= 6 and max(differences) <= 5e-3 and not math.isnan(max(differences)), name
    refusals = next(node.value for node in tree.body if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "REFUSED")
    assert re.findall(r"^\| `([a-z0-9_]+)` \|", told, flags=re.MULTILINE) == list(ast.literal_eval(refusals))


def _in_order(node: ast.AST) -> list[str]:
    """Model types of the list in the order of the source: the first argument of every row."""
    found = []
    for child in ast.walk(node):
        if isinstance(child, ast.Call) and getattr(child.func, "id", "") == "Row" and isinstance(child.args[0], ast.Constant):
            found.append((child.lineno, child.col_offset, str(child.args[0].value)))
        elif isinstance(child, ast.Call) and getattr(child.func, "id", "") == "map":
            found += [(item.lineno, item.col_offset, str(ast.literal_eval(item))) for item in getattr(child.args[1], "elts", [])]
    return [name for _, _, name in sorted(found)]
