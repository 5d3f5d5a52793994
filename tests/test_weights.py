"""Weights on disk: the same bytes as safetensors' own, little memory, and one sentence for whatever is damaged or full."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minitron.errors import CheckpointError
from minitron.models import tensor_file, weights
from minitron.models.tensor_file import DTYPES
from minitron.models.weights import WeightReader, write_weights

INDEX = "model.safetensors.index.json"


def random_tensor(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Random bits of a dtype."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).view(shape)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have one dtype, shape and bit pattern."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def model_folder(folder: Path, tensors: dict[str, torch.Tensor], **options: int) -> Path:
    """A folder that counts as a model's."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    write_weights(folder, tensors.items(), **options)
    return folder


def every_dtype() -> dict[str, torch.Tensor]:
    """Vectors, matrices, a scalar, an empty and a three-dimensional tensor of every dtype; odd sizes put wide types at odd places."""
    shapes: dict[str, tuple[int, ...]] = {"scalar": (), "vector": (7,), "matrix": (5, 3), "experts": (3, 4, 5), "empty": (0, 4)}
    return {f"{kind}.{name}": random_tensor(dtype, *shape) for name, dtype in DTYPES.items() for kind, shape in shapes.items()}


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: what a full disk looks like to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("shard_bytes", [10**9, 200])
def test_what_is_written_is_what_safetensors_reads(tmp_path: Path, shard_bytes: int) -> None:
    tensors = every_dtype()
    folder = model_folder(tmp_path / "ours", tensors, shard_bytes=shard_bytes)
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) == 1) is (shard_bytes > 10**6) and (folder / INDEX).is_file() is (len(files) > 1)
    theirs: dict[str, torch.Tensor] = {}
    for file in files:
        theirs |= load_file(str(file))
        with safe_open(str(file), framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
        assert struct.unpack("<Q", file.read_bytes()[:8])[0] % 8 == 0, "the data begin at a multiple of eight bytes"
        assert file.stat().st_mode == (folder / "config.json").stat().st_mode
    assert theirs.keys() == tensors.keys() and all(same(theirs[name], tensors[name]) for name in tensors)


def test_what_safetensors_writes_is_what_is_read(tmp_path: Path) -> None:
    tensors = every_dtype()
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, str(tmp_path / "model.safetensors"), metadata={"format": "pt", "note": "{}"})
    with WeightReader(tmp_path) as reader:
        assert reader.files.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert reader.shape_of(name) == tuple(tensor.shape) and reader.dtype_of(name) == tensor.dtype
            assert same(reader.get(name), tensor)


def test_a_strided_tensor_is_written_in_its_order(tmp_path: Path) -> None:
    matrix = random_tensor(torch.bfloat16, 6, 8)
    reader = WeightReader(model_folder(tmp_path / "m", {"turned": matrix.T, "part": matrix[:, 2:5]}))
    assert same(reader.get("turned"), matrix.T.contiguous()) and same(reader.get("part"), matrix[:, 2:5].contiguous())


@pytest.mark.parametrize("block", [1, 64, 1000, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.float8_e4m3fn])
def test_a_part_is_what_indexing_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, dtype: torch.dtype) -> None:
    """Every combination of cut and whole dimensions, for blocks of one element up to the whole tensor."""
    monkeypatch.setattr(weights, "_BLOCK", block)
    tensors = {"one": random_tensor(dtype, 37), "two": random_tensor(dtype, 20, 12), "three": random_tensor(dtype, 6, 9, 10)}
    reader = WeightReader(model_folder(tmp_path / "m", tensors))
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        for cut in range(1 << tensor.dim()):
            kept: list[torch.Tensor | None] = []
            expected = tensor.reshape(-1).view(torch.uint8).view(*tensor.shape, -1)  # not every dtype can be indexed by itself
            for dim, size in enumerate(tensor.shape):
                chosen = torch.randperm(size, generator=generator)[: size * 2 // 3].sort().values
                kept.append(chosen if cut >> dim & 1 else None)
                expected = expected.index_select(dim, chosen) if cut >> dim & 1 else expected
            got = reader.get(name, kept)
            assert got.shape == expected.shape[:-1] and torch.equal(got.reshape(-1).view(torch.uint8), expected.reshape(-1))
    assert reader.get("three", [torch.tensor([], dtype=torch.long)]).shape == (0, 9, 10)
    assert same(reader.get("three", [torch.tensor([4])]), tensors["three"][4:5])


def test_shards_end_where_they_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the size limit, which a single tensor may exceed, and where a header is full."""
    tensors = {f"t{i}": random_tensor(torch.float32, size) for i, size in enumerate((10, 10, 5, 40, 1, 24, 1))}
    folder = model_folder(tmp_path / "by-size", tensors, shard_bytes=100)
    index = json.loads((folder / INDEX).read_text())
    names = [f"model-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert index["weight_map"] == dict(zip(tensors, [names[0]] * 3 + [names[1]] + [names[2]] * 2 + [names[3]], strict=True))
    assert index["metadata"]["total_size"] == 4 * 91
    monkeypatch.setattr(tensor_file, "_ROOM", 400)
    folder = model_folder(tmp_path / "by-header", tensors)
    by_file = list(json.loads((folder / INDEX).read_text())["weight_map"].values())
    assert len(set(by_file)) == 2 and by_file == sorted(by_file)
    with WeightReader(folder) as reader:
        assert list(reader.files) == list(tensors) and all(same(reader.get(name), tensors[name]) for name in tensors)


def broken(header: bytes | dict[str, Any], data: bytes = b"\0" * 24) -> bytes:
    """A safetensors file with a header of one's own."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, stop: int, *, dtype: str = "F32", shape: tuple[Any, ...] = (3,)) -> dict[str, Any]:
    """A tensor's line of a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


GOOD = {"a": entry(0, 12), "b": entry(12, 24)}
DAMAGED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it ends in its first 8 bytes"),
    "half a length": (b"\1\2\3", "it ends in its first 8 bytes"),
    "cut in the header": (broken(GOOD)[:60], "a file of 60 bytes cannot hold a header of"),
    "cut in the data": (broken(GOOD)[:-1], "bytes, its header asks for"),
    "something behind": (broken(GOOD) + b"x", "bytes, its header asks for"),
    "a foreign file": (b"PK\3\4" * 30, "cannot hold a header of"),
    "no JSON": (broken(b"{" + b"x" * 40 + b"}"), "its header is no JSON object"),
    "no text": (broken(b"\xff" * 40), "its header is no JSON object"),
    "a list": (broken(b"[]"), "its header is no JSON object"),
    "a gap": (broken({"a": entry(0, 12), "b": entry(16, 28)}, b"\0" * 28), "'b' begins at byte .*, where .* is due"),
    "an overlap": (broken({"a": entry(0, 12), "b": entry(8, 20)}, b"\0" * 20), "'b' begins at byte .*, where .* is due"),
    "a wrong size": (broken({"a": entry(0, 24)}), r"'a' takes 24 bytes, but F32 \[3\] needs 12"),
    "a wrong shape": (broken({"a": entry(0, 12), "b": entry(12, 24, shape=(2, 2))}), r"'b' takes 12 bytes, but F32 \[2, 2\] needs 16"),
    "a negative shape": (broken({"a": entry(0, 24, shape=(-2, -3))}), "not whole numbers"),
    "a fraction": (broken({"a": entry(0, 24, shape=(6.0,))}), "not whole numbers"),
    "no offsets": (broken({"a": {"dtype": "F32", "shape": [6]}}), "does not say where 'a' is"),
    "no entry": (broken({"a": 3}), "does not say where 'a' is"),
    "an unknown dtype": (broken({"a": entry(0, 24, dtype="F4")}), "holds 'a' as 'F4', which cannot be read here"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_named_on_opening(tmp_path: Path, kind: str) -> None:
    content, words = DAMAGED[kind]
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    file.write_bytes(broken(GOOD))
    assert WeightReader(tmp_path).files.keys() == {"a", "b"}
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{file} .*{words}"):
        WeightReader(tmp_path)


def test_no_flipped_bit_of_a_header_goes_through_with_wrong_places(tmp_path: Path) -> None:
    """Every bit of a header in turn: refused, or the tensors are still where they were (a name, or metadata, may have changed)."""
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    save_file({"a": random_tensor(torch.bfloat16, 3, 2), "b": random_tensor(torch.bfloat16, 4)}, str(file), metadata={"format": "pt"})
    whole = file.read_bytes()
    data = 8 + struct.unpack("<Q", whole[:8])[0]
    refused = 0
    for bit in range(8 * data):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            reader = WeightReader(tmp_path)
        except CheckpointError as error:
            refused += 1
            assert str(file) in str(error)
            continue
        places = sorted((stored.start, stored.num_bytes) for stored in reader._stored.values())
        assert places == [(data, 12), (data + 12, 8)], bit
    assert refused > 4 * data


def test_an_index_is_held_to_its_files(tmp_path: Path) -> None:
    tensors = {f"t{i}": random_tensor(torch.float32, 30) for i in range(3)}
    folder = model_folder(tmp_path / "m", tensors, shard_bytes=150)
    text = (folder / INDEX).read_text()
    first, second = sorted(file.name for file in folder.glob("*.safetensors"))[:2]
    for wrong, words in {
        text.replace(second, "model-9.safetensors"): "lacks the weight file model-9.safetensors that its index names",
        text.replace(f'"t1": "{second}"', f'"t1": "{first}"'): f"{first} has no weight 't1', although {INDEX} says so",
        text[:-30]: f"{INDEX} is damaged",
        "[]": f"{INDEX} is damaged",
        '{"weight_map": ["a"]}': f"{INDEX} is damaged",
    }.items():
        (folder / INDEX).write_text(wrong)
        with pytest.raises(CheckpointError, match=words):
            WeightReader(folder)
    (folder / INDEX).write_text(text)
    shutil.copyfile(folder / first, folder / second)
    with pytest.raises(CheckpointError, match=f"{second} has no weight 't1'"):
        WeightReader(folder)


def test_the_index_decides_between_duplicates_and_leaves_out_what_it_does_not_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    one, other = random_tensor(torch.float32, 4, seed=1), random_tensor(torch.float32, 4, seed=2)
    save_file({"a": one, "spare": one.clone()}, str(tmp_path / "x.safetensors"))
    save_file({"a": other, "b": one}, str(tmp_path / "y.safetensors"))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "y.safetensors", "b": "y.safetensors"}}))
    reader = WeightReader(tmp_path)
    assert list(reader.files) == ["a", "b"] and same(reader.get("a"), other)
    with pytest.raises(CheckpointError, match="has no weight 'spare'"):
        reader.shape_of("spare")


def test_a_file_that_shrinks_while_it_is_read_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "m", {"a": random_tensor(torch.float32, 8), "b": random_tensor(torch.float32, 8)})
    (tmp_path / "out").mkdir()
    with WeightReader(source) as reader:
        os.truncate(source / "model.safetensors", (source / "model.safetensors").stat().st_size - 4)
        with pytest.raises(CheckpointError, match="model.safetensors is damaged: it became shorter"):
            write_weights(tmp_path / "out", reader.items(["a", "b"]), shard_bytes=32)
    assert not list((tmp_path / "out").iterdir())


def test_files_are_open_only_between_first_use_and_the_end(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", {f"t{i}": random_tensor(torch.float32, 30) for i in range(3)}, shard_bytes=100)

    def num_open() -> int:
        links = [Path("/proc/self/fd") / number for number in os.listdir("/proc/self/fd")]
        return sum(str(link.readlink()).startswith(str(folder)) for link in links if link.is_symlink())

    with WeightReader(folder) as reader:
        assert num_open() == 0
        reader.get("t0")
        assert num_open() == 1
        list(reader.items(reader.files))
        assert num_open() == 3
    assert num_open() == 0
    assert len(reader.get("t0")) == 30
    reader.close()


@pytest.mark.parametrize("limit", [100_000, 300_000, 340_000])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, limit: int) -> None:
    """The disk is full at the header, within a tensor, and at a later shard; an older file of the final name stays."""
    (tmp_path / "model.safetensors").write_bytes(b"old")
    tensors = {f"t{i}": random_tensor(torch.float32, size) for i, size in enumerate((1000, 10_000, 30_000))}
    with file_size_limit(limit), pytest.raises(CheckpointError, match=f"^weights cannot be written to {tmp_path}: File too large$"):
        write_weights(tmp_path, tensors.items(), shard_bytes=50_000)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"] and (tmp_path / "model.safetensors").read_bytes() == b"old"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"weights cannot be written to {tmp_path / 'none'}: No such file"):
        write_weights(tmp_path / "none", [("a", torch.ones(2))])
    with pytest.raises(CheckpointError, match="there are no weights to write"):
        write_weights(tmp_path, [])


CHILD = """
import resource, sys, torch
from pathlib import Path
from minitron.models.weights import WeightReader, write_weights
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
source, out, cut = Path(sys.argv[1]), Path(sys.argv[2]), torch.arange(0, 4096, 2)
before = peak()
with WeightReader(source) as reader:
    count = write_weights(out, ((name, reader.get(name, (None, None, cut))) for name in reader.files), shard_bytes=10**8)
print(count, peak() - before)
"""


def test_memory_is_that_of_a_tensor_not_of_a_shard_or_the_model(tmp_path: Path) -> None:
    """240 MB in tensors of two experts of 10 MB through a process of its own, half of the columns kept: one half and a block are held.

    Large allocations are given back at once here, so that what the code holds is measured and not what the allocator keeps.
    """
    one = random_tensor(torch.uint8, 1 << 20).repeat(20).view(torch.bfloat16).view(2, -1, 4096)
    source = tmp_path / "m"
    source.mkdir()
    (source / "config.json").write_text("{}")
    write_weights(source, ((f"t{i}", one) for i in range(12)), shard_bytes=10**8)
    (tmp_path / "out").mkdir()
    command, environment = [sys.executable, "-c", CHILD, str(source), str(tmp_path / "out")], {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    count, extra = map(int, done.stdout.split())
    assert count == 12 * one.numel() // 2
    assert extra < 19 << 20, f"{extra / 2**20:.0f} MB"
    with WeightReader(source) as reader:
        assert same(reader.get("t0", (None, torch.arange(50))), one[:, :50])
