"""What stands beside the weights of a finished model: a config that says everything, the teacher's licence, a check by a fresh process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from minitron.core.manifest import write_text
from minitron.errors import CheckpointError
from minitron.models.family import Family
from minitron.models.fields import meta_model

#: Files with terms of use; they follow the weights.
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
#: Variables of a launcher that a process of its own must not see.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT")
#: Named in a model's front matter.
_LICENCE_KEYS = ("license", "license_name", "license_link")


def publish_config(config: Any, folder: Path, *, dtype: str, head_dim: int) -> None:
    """Write ``config.json`` with nothing left implicit: the class, the head dimension, the dtype.

    transformers 5 writes the rotary base as ``rope_parameters`` and reads both that and the older flat fields. Older versions and other
    tools read only the flat ones, and fall back to a base of 10000 without them. Both are written, and ``torch_dtype`` beside ``dtype``.
    No ``auto_map`` is: the folder needs no code of its own.
    """
    config.architectures = [type(meta_model(config)).__name__]
    config.dtype, config.head_dim, config.use_cache = dtype, head_dim, True
    config.save_pretrained(folder)
    path = folder / "config.json"
    document = json.loads(path.read_text())
    document.pop("auto_map", None)
    document["torch_dtype"] = dtype
    rope = document.get("rope_parameters") or {}
    if "rope_theta" in rope:
        document["rope_theta"] = rope["rope_theta"]
        if "partial_rotary_factor" in rope:
            document["partial_rotary_factor"] = rope["partial_rotary_factor"]
        if rope.get("rope_type", "default") != "default":
            document["rope_scaling"] = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    write_text(path, json.dumps(document, indent=2, sort_keys=True) + "\n")


def licence_of(folder: Path) -> dict[str, str]:
    """What a model folder says about its licence: ``license``, ``license_name`` and ``license_link`` of its card, ``file`` of its own text.

    Empty when it says nothing.
    """
    from huggingface_hub.repocard import metadata_load

    found: dict[str, str] = {}
    if (folder / "README.md").is_file():
        try:
            front = metadata_load(folder / "README.md") or {}
        except Exception:  # a card is free text: one that cannot be read says nothing
            front = {}
        found = {key: str(front[key]) for key in _LICENCE_KEYS if front.get(key)}
    files = sorted(path.name for pattern in LICENCE_FILES[:2] for path in folder.glob(pattern) if path.is_file())
    return found | ({"file": files[0]} if files else {})


def copy_licence(source: Path, target: Path) -> None:
    """Carry the files with terms of use over, where the target has none of that name."""
    for pattern in LICENCE_FILES:
        for path in source.glob(pattern):
            if path.is_file() and not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)


def check_reload(folder: Path, *, source: Path, family: Family, dtype: str, kept: set[str]) -> dict[str, Any]:
    """Let a fresh process load a folder with plain transformers, and compare it with the model it was made from.

    Args:
        source: the same model as it was before; its logits in ``dtype`` must be the same bit for bit.
        family: what it must be: number of parameters, head dimension, ties.
        dtype: name of the torch dtype of every floating-point tensor but those in ``kept``.

    Returns:
        Versions that it was checked with.

    Raises:
        CheckpointError: the folder is not what was promised; the sentence says why.
    """
    shape = family.architecture
    told: dict[str, Any] = {"folder": str(folder.resolve()), "source": str(source.resolve()), "dtype": dtype, "kept": sorted(kept)}
    told |= {"num_parameters": shape.num_parameters, "head_dim": shape.head_dim, "tied": shape.tied_embeddings}
    told["buffers"] = [item.spec.name for item in family.stored if item.spec.buffer]
    environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHER}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    script = Path(__file__).with_name("reload_script.py").read_text(encoding="utf-8")
    # In the folder itself, where nothing can be imported by accident: -c puts the working directory first.
    done = subprocess.run([sys.executable, "-c", script], input=json.dumps(told), capture_output=True, text=True, cwd=folder, env=environment)
    lines = done.stdout.strip().splitlines()
    answer: dict[str, Any] = json.loads(lines[-1]) if done.returncode == 0 and lines else {}
    if "refused" in answer or not answer:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = answer.get("refused") or (said[-1] if said else f"it ended with code {done.returncode}")
        raise CheckpointError(f"what was written does not load as a fresh process with transformers alone needs it, and is not published: {reason}")
    return answer
