"""Packed model folders: every bit comes back, plain transformers loads what is unpacked, and damage is told in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers_experts import sparse_mixtral
from helpers_masks import sparse_student, zero_smallest
from helpers_models import tiny_llama, tiny_model
from safetensors.torch import load_file, save_file

from minitron import cli
from minitron.core.sparsity import Pattern, SparsityRecord
from minitron.errors import CheckpointError
from minitron.models import config_of, discover
from minitron.models.lazy import load_lazily
from minitron.models.load import load_causal_lm
from minitron.models.packed import PackedReader, load_packed, pack_folder, unpack_folder
from minitron.models.sparse_folder import check_sparse
from minitron.ops.sparse_matmul import SWITCH, SparseLinear


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse bf16 model with companions, a record, and numbers that are easily lost: negative zeros, a NaN, a subnormal."""
    folder = sparse_student(tmp_path_factory.mktemp("packed") / "sparse")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(str(folder / "model.safetensors")).items()}
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][0, :3] = torch.tensor([-0.0, 0.0, 1e-40])
    weights["model.layers.0.mlp.gate_proj.weight"] = zero_smallest(weights["model.layers.0.mlp.gate_proj.weight"].float(), Pattern(0.8)).bfloat16()
    weights["model.layers.0.mlp.gate_proj.weight"][3] = 0.0
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "LICENSE").write_text("as is")
    return folder


@pytest.fixture(scope="module")
def packed(sparse: Path) -> Path:
    out = sparse.with_name("packed")
    pack_folder(sparse, out, shard_bytes=30_000)
    return out


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32)


def same_files(first: Path, second: Path) -> bool:
    """The same tensors bit for bit, and everything else byte for byte."""
    one, other = ({n: t for path in sorted(f.glob("*.safetensors")) for n, t in load_file(str(path)).items()} for f in (first, second))
    beside = [{p.name: p.read_bytes() for p in f.iterdir() if p.is_file() and not p.name.startswith("model")} for f in (first, second)]
    same = one.keys() == other.keys() and all(t.dtype == other[n].dtype and torch.equal(bits(t), bits(other[n])) for n, t in one.items())
    return same and beside[0] == beside[1]


def test_every_bit_comes_back_and_transformers_loads_it(sparse: Path, packed: Path, tmp_path: Path) -> None:
    assert len(list(packed.glob("packed-*.safetensors"))) > 1 and (packed / "packed.safetensors.index.json").is_file()
    assert not list(packed.glob("model*")), "transformers must not take it for an ordinary folder"
    unpacked = unpack_folder(packed, tmp_path / "unpacked")
    assert same_files(sparse, tmp_path / "unpacked")
    with PackedReader(packed) as reader:
        assert len(reader.matrices) == 14 == unpacked.num_matrices
        name = "model.layers.1.self_attn.q_proj.weight"
        dense = load_file(str(sparse / "model.safetensors"))[name]
        assert torch.equal(reader.get(name), dense)
        rows, columns = torch.tensor([1, 4]), torch.tensor([0, 2, 9])
        assert torch.equal(reader.get(name, (rows, columns)), dense[rows][:, columns])
    model = load_causal_lm(tmp_path / "unpacked", dtype=torch.float32)
    expected, ids = load_causal_lm(sparse, dtype=torch.float32), torch.arange(20)[None] + 2
    assert torch.equal(model(ids).logits, expected(ids).logits)


def test_sizes_are_those_of_the_format(sparse: Path, packed: Path, tmp_path: Path) -> None:
    """One bit a weight, two bytes a value that is kept, eight bytes a row and eight more; dense tensors as they are."""
    weights = load_file(str(sparse / "model.safetensors"))
    wanted = 0
    for name, tensor in weights.items():
        if "proj" in name:
            kept = int((bits(tensor) != 0).sum())
            wanted += len(tensor) * -(-tensor.shape[1] // 8) + 8 * (len(tensor) + 1) + 2 * kept
        else:
            wanted += tensor.nbytes
    done = pack_folder(sparse, tmp_path / "again")
    assert (done.packed_bytes, done.dense_bytes) == (wanted, sum(t.nbytes for t in weights.values()))
    with PackedReader(packed) as reader:
        assert reader.num_bytes == wanted


def test_loaded_packed_is_the_same_model(sparse: Path, packed: Path) -> None:
    ids = torch.arange(24)[None] + 2
    expected = load_causal_lm(sparse, dtype=torch.float32)(ids).logits
    model = load_packed(packed, dtype=torch.float32)
    assert torch.equal(model(ids).logits, expected) and not model.training
    half = load_packed(packed, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_loaded_sparse_keeps_what_is_packed_packed(sparse: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "dense")  # what the kernel computes is tested with it
    ids = torch.arange(24)[None] + 2
    model = load_packed(packed, dtype=torch.float32, sparse=True)
    assert sum(isinstance(module, SparseLinear) for module in model.modules()) == 14
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, load_causal_lm(sparse, dtype=torch.float32)(ids).logits, rtol=1e-4, atol=1e-4)


def test_tied_models_and_float32_are_packed_too(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "tied", tied=True, layers=1, hidden=32, ffn=40, heads=4)
    weights = load_file(str(folder / "model.safetensors"))
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = zero_smallest(weights[name], Pattern.parse("1:4"))
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    assert pack_folder(folder, tmp_path / "packed").num_matrices == 1
    unpack_folder(tmp_path / "packed", tmp_path / "back")
    assert same_files(folder, tmp_path / "back")
    model, ids = load_packed(tmp_path / "packed", dtype=torch.float32), torch.arange(9)[None] + 2
    assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]
    assert torch.equal(model(ids).logits, tiny_model(folder).eval()(ids).logits)


def test_every_expert_is_packed_by_itself(tmp_path: Path) -> None:
    """As it lies in the checkpoint; the record goes by the names in memory, and is true of what is unpacked."""
    before = sparse_mixtral(tmp_path / "sparse")
    assert pack_folder(tmp_path / "sparse", tmp_path / "packed").num_matrices == 2 * 4 + 2 * 4 * 3
    unpack_folder(tmp_path / "packed", tmp_path / "back")
    assert same_files(tmp_path / "sparse", tmp_path / "back")
    record = SparsityRecord.load(tmp_path / "back")
    assert record is not None and sum(name.endswith("experts.down_proj") for name in record.matrices) == 2
    family = discover(config_of(tmp_path / "back"))
    check_sparse(tmp_path / "back", record, family)
    ids = torch.arange(9)[None] + 2
    expected = load_causal_lm(tmp_path / "sparse", dtype=torch.float32)
    for model in (load_packed(tmp_path / "packed", dtype=torch.float32), load_causal_lm(tmp_path / "back", dtype=torch.float32)):
        assert torch.equal(model(ids).logits, expected(ids).logits)
        found = dict(model.named_parameters())
        assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
    path = tmp_path / "back" / "model.safetensors"
    weights = load_file(str(path))
    name = next(name for name in weights if ".experts.3." in name)
    row = weights[name][5]
    row[:4], row[4:8] = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0, 0.0])  # as many zeros, and no groups
    save_file(weights, str(path), metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="mlp.experts.* is not 2:4"):
        check_sparse(tmp_path / "back", record, family)


def test_the_command_line_packs_and_unpacks(sparse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pack", str(sparse), str(tmp_path / "p")]) == 0 and cli.main(["unpack", str(tmp_path / "p"), str(tmp_path / "u")]) == 0
    said = capsys.readouterr().out
    assert "14 matrices packed, 0.1 MB → " in said and "14 matrices unpacked" in said
    assert same_files(sparse, tmp_path / "u")
    bad = [
        (["pack", str(sparse)], "takes two folders"),
        (["pack", str(sparse), str(tmp_path / "p")], "exists and is not empty"),
        (["unpack", str(sparse), str(tmp_path / "x")], "is no packed model"),
        (["pack", str(tmp_path / "p"), str(tmp_path / "x")], "minitron unpack"),
        (["pack", str(tmp_path / "nowhere"), str(tmp_path / "x")], "no config.json"),
    ]
    for words, sentence in bad:
        assert cli.main(words) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1, error
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob("*.partial"))


def test_readers_of_ordinary_folders_name_the_way_out(packed: Path) -> None:
    for load in (load_causal_lm, load_lazily):
        with pytest.raises(CheckpointError, match=f"holds packed weights: run 'minitron unpack {packed} OUT'"):
            load(packed, dtype=torch.float32)


def test_dense_models_and_damaged_or_foreign_packs_are_refused(sparse: Path, tmp_path: Path) -> None:
    dense = tiny_llama(tmp_path / "dense", layers=1, hidden=32, ffn=40, heads=4)
    with pytest.raises(CheckpointError, match="no matrix in .* would be smaller packed"):
        pack_folder(dense, tmp_path / "x")
    pack_folder(sparse, tmp_path / "whole")

    def refused(change: str, sentence: str) -> None:
        folder = tmp_path / change
        shutil.copytree(tmp_path / "whole", folder)
        file, table = folder / "packed.safetensors", folder / "packed.json"
        tensors, document = load_file(str(file)), json.loads(table.read_text())
        name = "model.layers.0.mlp.up_proj.weight"
        if change == "truncated":
            file.write_bytes(file.read_bytes()[:-100])
        elif change == "flipped":
            tensors[f"{name}.bitmap"][2, 1] ^= 4
        elif change == "lacking":
            del tensors[f"{name}.values"]
        elif change == "shape":
            document["matrices"][name] = [48, 32]
        elif change == "version":
            document["version"] = 2
        elif change == "config":
            text = (folder / "config.json").read_text()
            (folder / "config.json").write_text(text.replace('"intermediate_size": 40', '"intermediate_size": 48'))
        if change in ("flipped", "lacking"):
            save_file(tensors, str(file))
        table.write_text("{" if change == "json" else json.dumps(document))
        with pytest.raises(CheckpointError, match=sentence) as caught:
            load_packed(folder, dtype=torch.float32)
        assert "\n" not in str(caught.value)
        if change != "config":
            with pytest.raises(CheckpointError, match=sentence):
                unpack_folder(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused("truncated", "is damaged")
    refused("flipped", "up_proj.weight' in .* bits set")
    refused("lacking", "lacks 'model.layers.0.mlp.up_proj.weight.values'")
    refused("shape", "up_proj.weight")
    refused("version", "is of another kind")
    refused("json", "is damaged: it does not say what is packed")
    refused("config", "do not match its config")
