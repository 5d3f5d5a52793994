"""Products with sparse weights: the kernel for CPUs, those for AVX-512 and CUDA lane by lane, the layer that chooses, and what is refused."""

from __future__ import annotations

import ctypes
import logging
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_sparse import assert_product, inputs, sparse_weight
from torch import nn

from minitron.errors import CheckpointError, ConfigError, MinitronError
from minitron.ops import build, crossover, sparse_matmul, sparse_rows, sparse_tiles
from minitron.ops.bitmap import BitmapWeight, pack_bitmap
from minitron.ops.crossover import NUM_ROWS, Times
from minitron.ops.semi_structured import is_two_of_four, semi_structured
from minitron.ops.sparse_matmul import SWITCH, SparseLinear, use_sparse_linears
from minitron.paths import cache_dir, kernels_dir

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Widths that are no multiple of a byte's, a vector's or a block's columns.
SHAPES = [(1, 1, 1.0), (3, 7, 0.5), (17, 8, 0.3), (16, 130, 0.5), (35, 4104, 0.5), (5, 300, 0.0), (18, 65, 1.0)]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
#: Of made-up times: packed products win up to eight rows of x, against a dense copy up to two.
FEW = Times(packed=(1.0, 2.0, 4.0, 8.0, 16.0, 64.0), dense=(2.0, 2.1, 2.2, 2.4, 2.5, 2.6), unpack=6.0)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)


def product(x: torch.Tensor, packed: BitmapWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The op on a packed weight."""
    return sparse_rows.sparse_rows(x, packed.bitmap, packed.values, packed.row_starts, bias)


def by_instructions(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, instructions: str) -> torch.Tensor:
    """The host kernel with given instructions; the result is poisoned before."""
    library, packed = build.load("sparse_matmul", "op"), pack_bitmap(weight)
    assert isinstance(library, ctypes.CDLL)
    y = torch.full((len(x), len(weight)), float("nan"), dtype=x.dtype)
    code = library.sparse_matmul_host(ctypes.byref(sparse_rows.arguments_of(x, packed, bias, y, instructions)))
    if code == 2:
        pytest.skip(f"this processor has no {instructions}")
    assert code == 0
    return y


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instructions", ["scalar", "avx2", "avx512", "avx512_bf16"])
def test_products_equal_float64(instructions: str, dtype: torch.dtype) -> None:
    for rows, cols, density in SHAPES:
        weight = sparse_weight(rows, cols, density, dtype)
        for num in (*range(1, 10), 16, 17):
            x, bias = inputs(num, cols, rows, dtype)
            assert_product(by_instructions(x, weight, bias, instructions), x, weight, bias)
    wide = torch.randn(3, 2 * 130).to(dtype)[:, :130]  # rows of x that stand apart
    weight = sparse_weight(16, 130, 0.5, dtype)
    assert_product(by_instructions(wide, weight, None, instructions), wide, weight, None)


@needs_compiler
def test_the_number_of_threads_changes_nothing() -> None:
    weight, (x, _) = sparse_weight(700, 600, 0.5, torch.float32), inputs(4, 600, 700, torch.float32)
    packed, before, found = pack_bitmap(weight), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(product(x, packed))
            assert torch.equal(sparse_rows.unpack_rows(packed), weight)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert_product(found[0], x, weight, None)


@needs_compiler
def test_numbers_that_are_not_finite_are_kept() -> None:
    weight = torch.zeros(3, 9)
    weight[0, 8], weight[1, 2] = float("nan"), float("inf")
    for dtype in DTYPES:
        y = product(torch.ones(1, 9, dtype=dtype), pack_bitmap(weight.to(dtype)))
        assert torch.isnan(y[0, 0]) and torch.isinf(y[0, 1]) and y[0, 2] == 0
    big = product(torch.full((1, 2), 300.0, dtype=torch.float16), pack_bitmap(torch.full((1, 2), 300.0, dtype=torch.float16)))
    tiny = product(torch.full((1, 1), 2.0**-12, dtype=torch.float16), pack_bitmap(torch.full((1, 1), 3 * 2.0**-12, dtype=torch.float16)))
    assert torch.isinf(big).all() and tiny.item() == 3 * 2.0**-24  # beyond what fp16 holds, and among its subnormals


def test_shapes_of_x_and_torch_machinery() -> None:
    weight, (x, bias) = sparse_weight(9, 20, 0.5, torch.float32), inputs(6, 20, 9, torch.float32)
    packed = pack_bitmap(weight)
    y = product(x.view(2, 3, 20), packed, bias)
    assert y.shape == (2, 3, 9)
    assert_product(y.view(6, 9), x, weight, bias)
    assert product(x[0], packed).shape == (9,) and product(x[:0], packed).shape == (0, 9)
    torch.library.opcheck(torch.ops.minitron.sparse_rows.default, (x, packed.bitmap, packed.values, packed.row_starts, bias))


@needs_compiler
def test_what_does_not_fit_is_refused() -> None:
    weight, (x, bias) = sparse_weight(9, 20, 0.5, torch.float32), inputs(6, 20, 9, torch.float32)
    packed = pack_bitmap(weight)
    with pytest.raises(MinitronError, match="for inference"):
        SparseLinear(packed)(x.clone().requires_grad_())
    with pytest.raises(MinitronError, match=r"x of shape \[6, 19\] for a sparse weight of 9 x 20"):
        SparseLinear(packed)(x[:, :19])
    cases = [
        (x[:, :16], packed, None, "x of 16 columns does not fit a bitmap of 9 rows of 3 bytes"),
        (x.half(), packed, None, "and the same"),
        (x.double(), packed.to(dtype=torch.float64), None, "must be float32, bfloat16 or float16"),
        (torch.tensor(1.0), packed, None, "x needs columns"),
        (x, packed, bias[:3], "the bias is not one of 9 rows"),
        (x, packed, bias.half(), "the bias is not one of 9 rows"),
        (x, replace(packed, row_starts=packed.row_starts[1:]), None, "does not fit"),
        (x, replace(packed, row_starts=packed.row_starts.int()), None, "does not fit"),
        (x, replace(packed, bitmap=packed.bitmap.T.contiguous().T), None, "does not fit"),
    ]
    for given, weights, its_bias, message in cases:
        with pytest.raises(RuntimeError, match=message):
            product(given, weights, its_bias)
    with pytest.raises(CheckpointError, match="damaged"):
        SparseLinear.from_bitmap(replace(packed, values=packed.values[1:]))


@needs_compiler
def test_the_first_call_brings_the_kernel() -> None:
    """In a process of its own, since a library stays."""
    code = """
import torch
from minitron.ops.bitmap import pack_bitmap
from minitron.ops.sparse_rows import sparse_rows
packed, x = pack_bitmap(torch.tensor([[0.0] * 8 + [2.0]])), torch.ones(1, 9)
has = lambda: torch._C._dispatch_has_kernel_for_dispatch_key("minitron::sparse_rows", "CPU")
assert not has()
assert sparse_rows(x, packed.bitmap, packed.values, packed.row_starts).item() == 2.0
assert has()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- the layer -------------------------------------------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows of x that are multiplied packed."""
    seen: list[int] = []
    run = sparse_rows.sparse_rows
    monkeypatch.setattr(sparse_matmul, "sparse_rows", lambda x, *rest: seen.append(x.numel() // x.shape[-1]) or run(x, *rest))
    return seen


@needs_compiler
def test_a_layer_takes_what_was_measured_as_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_matmul, "times_of", lambda *key: FEW)
    seen = counted(monkeypatch)
    linear = nn.Linear(20, 9)
    linear.weight.data *= sparse_weight(9, 20, 0.5, torch.float32) != 0
    for keep_dense, expected in ((False, [1, 8]), (True, [1])):
        layer = SparseLinear.from_linear(linear, keep_dense=keep_dense)
        assert (layer.dense is not None) == keep_dense and "in_features=20, out_features=9, bias=True, zeros=" in repr(layer)
        with torch.no_grad():
            for num in (1, 8, 16):
                x, _ = inputs(num, 20, 9, torch.float32)
                assert_product(layer(x), x, linear.weight, linear.bias)
        assert seen == expected
        seen.clear()
    for forced, expected in (("packed", [1, 16]), ("dense", [])):
        monkeypatch.setenv(SWITCH, forced)
        layer = SparseLinear.from_linear(linear)
        with torch.no_grad():
            for num in (1, 16):
                layer(inputs(num, 20, 9, torch.float32)[0])
        assert seen == expected
        seen.clear()
    assert layer.to(torch.bfloat16)(torch.zeros(1, 20, dtype=torch.bfloat16)).dtype == torch.bfloat16


@needs_compiler
def test_a_layer_compiles_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "packed")
    layer, (x, _) = SparseLinear(pack_bitmap(sparse_weight(9, 20, 0.5, torch.float32))), inputs(2, 20, 9, torch.float32)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_words_of_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SparseLinear(pack_bitmap(sparse_weight(9, 20, 0.5, torch.float64)))
    monkeypatch.setenv(SWITCH, "pakced")
    with pytest.raises(ConfigError, match="MINITRON_SPARSE_MATMUL=pakced is unknown; did you mean 'packed'"):
        layer(torch.zeros(1, 20, dtype=torch.float64))
    monkeypatch.setenv(SWITCH, "packed")
    with pytest.raises(ConfigError, match="cannot be: there is no kernel for torch.float64 on cpu"):
        layer(torch.zeros(1, 20, dtype=torch.float64))


def test_without_a_compiler_products_are_dense_and_say_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(build, "load", lambda op, target: build.BuildError("no g++ on this machine"))
    sparse_rows.say.cache_clear()
    weight, (x, _) = sparse_weight(9, 20, 0.5, torch.float32), inputs(2, 20, 9, torch.float32)
    layer = SparseLinear(pack_bitmap(weight))
    with caplog.at_level(logging.INFO, logger="minitron"):
        for _ in range(2):
            assert_product(layer(x), x, weight, None)
            assert_product(product(x, layer.packed()), x, weight, None)
            assert torch.equal(sparse_rows.unpack_rows(layer.packed()), weight)
    assert [record.message for record in caplog.records] == ["sparse products run dense, since no g++ on this machine"]


@needs_compiler
def test_a_model_s_sparse_layers_are_replaced(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Not those without zeros, not those whose weight others share, not those where the dense product wins."""
    slow = Times(packed=FEW.dense, dense=FEW.packed, unpack=1.0)
    monkeypatch.setattr(sparse_matmul, "times_of", lambda rows, *rest: slow if rows == 7 else FEW)
    model = nn.Sequential(nn.Embedding(9, 20), nn.Linear(20, 7), nn.Sequential(nn.Linear(7, 20), nn.Linear(20, 20)), nn.Linear(20, 9, bias=False))
    for module in (model[0], model[1], model[2][0]):
        module.weight.data *= sparse_weight(*module.weight.shape, 0.5, torch.float32) != 0
    model[3].weight = model[0].weight
    expected = model(torch.arange(9)).detach()
    with caplog.at_level(logging.INFO, logger="minitron"):
        assert use_sparse_linears(model) == 1
    assert isinstance(model[2][0], SparseLinear) and not any(
        isinstance(model[2][1], SparseLinear) or isinstance(model[i], SparseLinear) for i in (1, 3)
    )
    assert "sparse products: 1 of 4 linear layers packed" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(model(torch.arange(9)), expected)


@needs_compiler
def test_times_are_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.load("sparse_matmul", "op")
    monkeypatch.setattr(crossover, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(crossover, "_ROUND_BYTES", {"cpu": 1 << 16})
    crossover.times_of.cache_clear()
    key = (64, 48, 50, torch.float32, "cpu", 1)
    found = crossover.times_of(*key)
    assert len(found.packed) == len(found.dense) == len(NUM_ROWS) and min(*found.packed, *found.dense, found.unpack) > 0
    crossover.times_of.cache_clear()
    monkeypatch.setattr(crossover, "measure", lambda *key: pytest.fail("measured again"))
    assert crossover.times_of(*key) == found
    crossover.times_of.cache_clear()


def test_times_between_and_beyond_those_that_were_measured() -> None:
    assert [FEW.packed_wins(num, dense_at_hand=True) for num in (1, 2, 3)] == [True, True, False]
    assert [FEW.packed_wins(num, dense_at_hand=False) for num in (4, 8, 12, 128)] == [True, True, False, False]
    tie = Times(packed=(1.0,) * 6, dense=(1.01,) * 6, unpack=0.0)
    assert not tie.packed_wins(1, dense_at_hand=True)


# ---- kernels that this machine may not have --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA kernel on fibers and the AVX-512 one on plain loops."""
    if shutil.which("g++") is None:
        pytest.skip("no g++: the kernels for CUDA and AVX-512 are not emulated")
    library = tmp_path_factory.mktemp("emulated") / "sparse_matmul.so"
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", f"-I{kernels_dir() / 'sparse_matmul'}", "-Wno-unknown-pragmas"]
    subprocess.run(["g++", *flags, "-o", str(library), str(Path(__file__).parent / "sparse_matmul_emulated.cpp")], check=True)
    found = ctypes.CDLL(str(library))
    found.sparse_tiles_partial.restype = ctypes.c_int64
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instructions", ["avx512", "avx512_bf16"])
def test_avx512_lane_by_lane(emulated: ctypes.CDLL, instructions: str, dtype: torch.dtype) -> None:
    for rows, cols, density in SHAPES:
        weight = sparse_weight(rows, cols, density, dtype)
        for num in (1, 2, 4, 9, 17):
            x, bias = inputs(num, cols, rows, dtype)
            y = torch.full((num, rows), float("nan"), dtype=dtype)
            assert emulated.avx512_emulated(ctypes.byref(sparse_rows.arguments_of(x, pack_bitmap(weight), bias, y, instructions))) == 0
            assert_product(y, x, weight, bias)


def test_tiles_hold_the_weight() -> None:
    for rows, cols, density in ((1, 2, 1.0), (64, 64, 0.5), (130, 200, 0.3), (5, 66, 0.0), (64, 128, 1.0)):
        weight = sparse_weight(rows, cols, density, torch.bfloat16)
        tiled = sparse_tiles.tile_bitmap(pack_bitmap(weight))
        assert torch.equal(sparse_tiles.untile(tiled), weight)
        counts = tiled.starts.diff() * 8
        assert int(counts.max()) == tiled.max_values and len(tiled.values) == int(counts.sum())
    with pytest.raises(MinitronError, match="bfloat16 or float16 is needed"):
        sparse_tiles.tile_bitmap(pack_bitmap(weight.float()))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_cuda_kernel_on_emulated_threads(emulated: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Blocks of x of all sizes, rows and columns that fill no tile, strips shared by several blocks, full and empty weights."""
    assert emulated.sparse_tiles_arguments_size() == ctypes.sizeof(sparse_tiles.Arguments)
    cases = [(64, 64, 1, 1, 0.5), (100, 130, 8, 1, 0.5), (64, 640, 9, 2, 0.3), (65, 450, 16, 3, 1.0), (33, 320, 20, 1, 0.1), (64, 66, 40, 1, 0.5)]
    for seed, (rows, cols, num, splits, density) in enumerate([*cases, (64, 64, 3, 1, 0.0)]):
        weight, (x, bias) = sparse_weight(rows, cols, density, dtype), inputs(num, cols, rows, dtype)
        tiled = sparse_tiles.tile_bitmap(pack_bitmap(weight))
        y = torch.full((num, rows), float("nan"), dtype=dtype)
        arguments = sparse_tiles.arguments_of(x, tiled.header, tiled.values, tiled.starts, tiled.max_values, bias, y, splits)
        partial = torch.full((emulated.sparse_tiles_partial(ctypes.byref(arguments)),), float("nan"))
        arrived = torch.zeros(2, dtype=torch.int32)
        arguments.partial, arguments.arrived = partial.data_ptr(), arrived.data_ptr()
        assert emulated.sparse_tiles_emulated(ctypes.byref(arguments), seed) == 0
        assert_product(y, x, weight, bias)
        assert not arrived.any()


def test_strips_are_shared_where_there_are_few(emulated: ctypes.CDLL) -> None:
    splits = lambda rows, cols: emulated.sparse_tiles_splits(ctypes.c_int64(rows), ctypes.c_int64(cols), 132)  # noqa: E731
    assert [splits(4096, 4096), splits(14336, 4096), splits(4096, 14336), splits(64, 64), splits(1 << 20, 4096)] == [9, 3, 9, 1, 1]


def test_the_cuda_kernel_compiles_without_spills() -> None:
    try:
        build.compiler_path("nvcc")
    except build.BuildError:
        pytest.skip("no nvcc: the CUDA kernel is NOT compiled here")
    path, report = build.build("sparse_matmul", "cuda", cache_dir() / "kernels")
    kernels = re.findall(r"Compiling entry function '\S*8tiles_of\S*' for 'sm_(\d+)'", report)
    assert sorted(kernels) == ["80"] * 8 + ["90"] * 8
    assert set(re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)) == {("0", "0", "0")}
    assert max(int(number) for number in re.findall(r"Used (\d+) registers", report)) <= 80
    library = ctypes.CDLL(str(path))
    assert library.sparse_tiles_arguments_size() == ctypes.sizeof(sparse_tiles.Arguments)
    if not torch.cuda.is_available():
        weight, (x, _) = sparse_weight(64, 64, 0.5, torch.bfloat16), inputs(1, 64, 64, torch.bfloat16)
        tiled, y = sparse_tiles.tile_bitmap(pack_bitmap(weight)), torch.empty(1, 64, dtype=torch.bfloat16)
        arguments = sparse_tiles.arguments_of(x, tiled.header, tiled.values, tiled.starts, tiled.max_values, None, y, 1)
        assert library.sparse_tiles_cuda(ctypes.byref(arguments), None) != 0


@needs_compiler
def test_structures_have_the_size_that_c_sees() -> None:
    library = build.load("sparse_matmul", "op")
    assert isinstance(library, ctypes.CDLL)
    assert library.sparse_matmul_arguments_size() == ctypes.sizeof(sparse_rows.Arguments)


def test_two_of_four_stays_dense_where_it_cannot_be(caplog: pytest.LogCaptureFixture) -> None:
    weight = torch.tensor([[1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0]])
    assert is_two_of_four(weight) and not is_two_of_four(weight.roll(1).abs() + weight) and not is_two_of_four(weight[:, :7])
    with caplog.at_level(logging.INFO, logger="minitron"):
        assert semi_structured(weight) is weight
    assert "2:4 weight stays dense: 2:4 products need CUDA, and the weight is on cpu" in caplog.text
