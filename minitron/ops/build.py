"""Finds or compiles the sources in ``kernels/`` with the machine's own compilers; plain C libraries and ops on torch's stable ABI, loaded by ctypes.

A library is named after its sources, its flags, its compiler's version and, where it is built for this very processor, the processor: a
changed one is another file, and an old one is never taken for it. ``python -m minitron.ops.build --out FOLDER`` builds ahead of
time; ``$MINITRON_KERNELS`` names such a folder.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from minitron.errors import MinitronError
from minitron.log import get_logger
from minitron.paths import cache_dir, kernels_dir

logger = get_logger(__name__)

#: Real code for A100 and H100/H200; intermediate code of the latter runs on what comes after them.
ARCHITECTURES = ("arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90")
#: No -ffast-math: the sums of a row must keep NaN, and the rounding trick in exp must stay.
HOST_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
#: An op is built against torch's headers, which ask for C++20; the library depends on no torch but a minimal one.
OP_FLAGS = tuple("-std=c++20" if flag == "-std=c++17" else flag for flag in HOST_FLAGS)
CUDA_FLAGS = (*(f"-gencode={arch}" for arch in ARCHITECTURES), "-O3", "-std=c++17", "-Xptxas", "-v", "-shared", "-Xcompiler", "-fPIC")
#: Longest wait for another process that compiles the same library, and for a compiler.
PATIENCE_SECONDS = 600.0


class BuildError(MinitronError):
    """A kernel cannot be built here."""


@dataclass(frozen=True)
class Target:
    """What is built of a folder in ``kernels/`` that has its main source: by which compiler, with which flags, with torch's headers or not."""

    source: str
    compiler: str
    flags: tuple[str, ...]
    torch: bool = False

    def path(self, op: str) -> Path:
        """The main source for an op, which may not be there."""
        return kernels_dir() / op / self.source.format(op=op)


TARGETS = {
    "host": Target("host.cpp", "g++", HOST_FLAGS),
    "op": Target("op.cpp", "g++", OP_FLAGS, torch=True),
    "cuda": Target("{op}.cu", "nvcc", CUDA_FLAGS),
}


def compiler_path(kind: str) -> str:
    """The machine's ``g++`` (or ``$CXX``) or ``nvcc`` (also ``$CUDA_HOME/bin`` and its usual place).

    Raises:
        BuildError: there is none.
    """
    if kind == "nvcc":
        homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
        found = next((path for home in homes if home and (path := shutil.which(f"{home}/bin/nvcc"))), None) or shutil.which("nvcc")
    else:
        named = [shutil.which(name) for name in (*shlex.split(os.environ.get("CXX", ""))[:1], "g++", "c++")]
        found = next((path for path in named if path), None)
    if found is None:
        raise BuildError(f"no {kind} on this machine")
    return found


@cache
def compiler_version(path: str) -> str:
    """What a compiler says of itself.

    Raises:
        BuildError: it says nothing.
    """
    done = subprocess.run([path, "--version"], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{path} does not run: {_first_line(done.stderr)}")
    return done.stdout


@cache
def _processor() -> str:
    """The instructions that -march=native may use."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return platform.processor()


def library_stem(op: str, target: str) -> str:
    """``kd_loss-host-0123456789abcdef``: how the libraries are called that were built of the sources and flags of now."""
    recipe = TARGETS[target]
    digest = hashlib.sha256()
    for path in sorted((kernels_dir() / op).iterdir()):
        if path.suffix in (".h", ".cu", ".cpp", ".cuh"):
            digest.update(path.name.encode() + path.read_bytes())
    for text in (*recipe.flags, _processor() if "-march=native" in recipe.flags else platform.machine()):
        digest.update(text.encode() + b"\0")
    return f"{op}-{target}-{digest.hexdigest()[:16]}"


def build(op: str, target: str, folder: Path) -> tuple[Path, str]:
    """Compile one library into ``folder`` unless it is there; its path and what the compiler reported (kept beside it).

    Raises:
        BuildError: no compiler, a folder that cannot be written, or sources that do not compile.
    """
    recipe = TARGETS[target]
    compiler = compiler_path(recipe.compiler)
    version = hashlib.sha256(compiler_version(compiler).encode()).hexdigest()[:8]
    path = folder / f"{library_stem(op, target)}-{version}.so"
    report = path.with_suffix(".log")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(path.with_suffix(".lock")):
            if not path.is_file():
                logger.info("compiling %s for %s (once)", op, target)
                partial = path.with_suffix(f".{os.getpid()}.partial")
                source = recipe.path(op)
                command = [compiler, *recipe.flags, "-o", str(partial), str(source), *(_torch() if recipe.torch else ())]
                done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
                if done.returncode:
                    raise BuildError(f"{recipe.compiler} cannot compile {op}/{source.name}: {_first_line(done.stderr)}")
                report.write_text(done.stdout + done.stderr, encoding="utf-8")
                os.replace(partial, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{op} cannot be built into {folder}: {error}") from error
    return path, report.read_text(encoding="utf-8") if report.is_file() else ""


def _torch() -> tuple[str, ...]:
    """Where torch's headers and libraries are, for a compiler; torch itself is not loaded."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise BuildError("torch is not installed")
    folder = Path(found.origin).parent
    return f"-I{folder / 'include'}", f"-L{folder / 'lib'}", "-ltorch_cpu"


@cache
def load(op: str, target: str) -> ctypes.CDLL | BuildError:
    """The library of an op: prebuilt in ``$MINITRON_KERNELS``, else built into the cache. Tried once a process; the error is the answer."""
    try:
        prebuilt = os.environ.get("MINITRON_KERNELS")
        found = sorted(Path(prebuilt).glob(f"{library_stem(op, target)}-*.so")) if prebuilt else []
        return ctypes.CDLL(str(found[0] if found else build(op, target, cache_dir() / "kernels")[0]))
    except BuildError as error:
        return error
    except OSError as error:
        return BuildError(f"the library of {op} cannot be loaded: {error}")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock file: of many ranks on one machine one compiles and the others wait."""
    with path.open("w") as file:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "no message")


def main() -> int:
    """Build every library whose compiler is here, ahead of time."""
    parser = argparse.ArgumentParser(prog="python -m minitron.ops.build", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=cache_dir() / "kernels", help="folder of the libraries; $MINITRON_KERNELS names it later")
    out: Path = parser.parse_args().out
    status = 0
    for folder in sorted(path for path in kernels_dir().iterdir() if path.is_dir()):
        for target in (name for name, recipe in TARGETS.items() if recipe.path(folder.name).is_file()):
            try:
                sys.stdout.write(f"{build(folder.name, target, out)[0]}\n")
            except BuildError as error:
                sys.stderr.write(f"{error}\n")
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
