"""Compiling kernels with the machine's own compilers: names, cache, failures, and what nvcc says of the CUDA kernels."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minitron.ops import build
from minitron.ops.kd_rows import TERMS, Arguments, arguments_of, error_text
from minitron.paths import cache_dir

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small op of one C function."""
    folder = tmp_path / "kernels" / "answer"
    folder.mkdir(parents=True)
    (folder / "host.cpp").write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(build, "kernels_dir", lambda: tmp_path / "kernels")
    build.load.cache_clear()
    yield folder
    build.load.cache_clear()


@needs_compiler
def test_a_library_is_built_once_and_again_when_its_sources_change(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = build.build("answer", "host", tmp_path / "out")
    assert ctypes.CDLL(str(path)).answer() == 42
    written = path.stat().st_mtime_ns
    assert build.build("answer", "host", tmp_path / "out")[0] == path and path.stat().st_mtime_ns == written
    (sources / "host.cpp").write_text('extern "C" int answer() { return 43; }\n')
    other, _ = build.build("answer", "host", tmp_path / "out")
    assert other != path and ctypes.CDLL(str(other)).answer() == 43
    assert not list((tmp_path / "out").glob("*.partial"))
    # a folder built ahead of time serves where there is no compiler
    monkeypatch.setenv("MINITRON_KERNELS", str(tmp_path / "out"))
    monkeypatch.setattr(build, "compiler_path", lambda kind: pytest.fail("no compiler is to be asked"))
    library = build.load("answer", "host")
    assert isinstance(library, ctypes.CDLL) and library.answer() == 43


@needs_compiler
def test_what_cannot_be_built_is_said_in_one_sentence(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sources / "host.cpp").write_text("int answer() { return nothing; }\n")
    with pytest.raises(build.BuildError, match=r"g\+\+ cannot compile answer/host.cpp: .*nothing"):
        build.build("answer", "host", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.so"))
    (tmp_path / "file").write_text("")
    with pytest.raises(build.BuildError, match="cannot be built into"):
        build.build("answer", "host", tmp_path / "file" / "out")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))
    assert str(build.load("answer", "host")) == "no g++ on this machine"


@needs_compiler
def test_many_processes_compile_once(sources: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from minitron.ops import build; build.kernels_dir = lambda: Path(sys.argv[1]);"
        "import logging; logging.basicConfig(level=logging.INFO, stream=sys.stdout); build.build('answer', 'host', Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(sources.parent), str(tmp_path / "out")]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/") for _ in range(2)]
    said = "".join(rank.communicate()[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0] and said.count("compiling answer for host (once)") == 1


@needs_compiler
def test_structures_have_the_size_that_c_sees() -> None:
    library = build.load("kd_loss", "host")
    assert isinstance(library, ctypes.CDLL)
    assert library.kd_loss_arguments_size() == ctypes.sizeof(Arguments)


@pytest.fixture(scope="module")
def cuda() -> tuple[ctypes.CDLL, str]:
    """The CUDA library and what ptxas reported; compiled for sm_80 and sm_90."""
    try:
        build.compiler_path("nvcc")
    except build.BuildError:
        pytest.skip("no nvcc: the CUDA kernels are NOT compiled here")
    path, report = build.build("kd_loss", "cuda", cache_dir() / "kernels")
    return ctypes.CDLL(str(path)), report


def some_arguments(vocab: int, dtype: torch.dtype, names: tuple[str, ...], rows: int = 2) -> Arguments:
    student, labels = torch.zeros(rows, 1, dtype=dtype).expand(-1, vocab), torch.zeros(rows, dtype=torch.long)
    mask = sum(1 << TERMS.index(name) for name in names)
    return arguments_of(student, student, labels, None, None, None, [1.0, 0.0] * 2, mask, 1.0, 0.5, dtype, torch.zeros(len(TERMS), rows))


def test_cuda_kernels_compile_without_spills(cuda: tuple[ctypes.CDLL, str]) -> None:
    _, report = cuda
    kernels = re.findall(r"Compiling entry function '\S*4rows\S*' for 'sm_(\d+)'", report)
    assert sorted(kernels) == ["80"] * 6 + ["90"] * 6
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", report)]
    assert len(spills) >= 12 and set(spills) == {("0", "0", "0")}
    assert len(registers) == 12 and max(registers) <= 128


def test_a_library_without_a_driver_fails_cleanly(cuda: tuple[ctypes.CDLL, str]) -> None:
    library, _ = cuda
    assert library.kd_loss_arguments_size() == ctypes.sizeof(Arguments)
    assert library.kd_loss_cuda(ctypes.byref(some_arguments(8, torch.float32, ("forward_kl",), rows=0)), 0, None) == 0
    if not torch.cuda.is_available():
        code = library.kd_loss_cuda(ctypes.byref(some_arguments(8, torch.float32, ("forward_kl",))), 0, None)
        assert code != 0 and "driver" in error_text(library, code)


def test_rows_stay_on_the_chip_where_they_fit(cuda: tuple[ctypes.CDLL, str]) -> None:
    """Blocks of a cluster by vocabulary, type, terms and architecture; 0 is streaming. Half of the shared memory is left to a second block."""
    library, _ = cuda
    library.kd_loss_blocks.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    kl = ("forward_kl",)
    cases = [
        (128256, torch.float32, kl, 90, 232448, 8),  # 128 KB a block: one block a multiprocessor
        (128256, torch.bfloat16, kl, 90, 232448, 8),
        (49152, torch.float32, kl, 90, 232448, 4),
        (49152, torch.float32, ("cross_entropy",), 90, 232448, 2),
        (8192, torch.float32, kl, 90, 232448, 1),
        (262144, torch.float32, kl, 90, 232448, 0),
        (8192, torch.float32, kl, 80, 166912, 1),
        (128256, torch.bfloat16, kl, 80, 166912, 0),
    ]
    for vocab, dtype, names, architecture, limit, blocks in cases:
        arguments = some_arguments(vocab, dtype, names)
        assert library.kd_loss_blocks(ctypes.byref(arguments), 0, architecture, limit) == blocks, (vocab, dtype, architecture)
        assert library.kd_loss_blocks(ctypes.byref(arguments), 1, architecture, limit) == 0


@needs_compiler
def test_everything_can_be_built_ahead_of_time(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["build", "--out", str(tmp_path / "out")])
    assert build.main() == 0
    assert capsys.readouterr().out.strip() == os.fspath(next((tmp_path / "out").glob("answer-host-*.so")))
