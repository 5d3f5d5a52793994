"""Load a model folder with transformers alone. The text of this file runs in an interpreter of its own, which never sees minitron.

Reads one JSON object from standard input and writes one: the versions it ran with, or ``refused`` with a reason.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_SAFETENSORS_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_FLOATS = ("F64", "F32", "F16", "BF16")
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


class Refused(Exception):
    """The folder is not as promised."""


def stored_tensors(folder: Path) -> dict[str, tuple[str, int]]:
    """Dtype and number of values of every tensor; the index must name exactly what the files hold.

    Raises:
        Refused: it does not.
    """
    from safetensors import safe_open

    found: dict[str, tuple[str, int]] = {}
    files: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                if name in found:
                    raise Refused(f"tensor '{name}' is in {files[name]} and in {path.name}")
                part, count = handle.get_slice(name), 1
                for size in part.get_shape():
                    count *= size
                found[name], files[name] = (part.get_dtype(), count), path.name
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        document = json.loads(index.read_text())
        if document["weight_map"] != files:
            raise Refused("model.safetensors.index.json does not name the tensors that the files hold")
        size = sum(count * _BYTES.get(dtype, 1) for dtype, count in found.values())
        if document["metadata"]["total_size"] != size:
            raise Refused(f"model.safetensors.index.json says {document['metadata']['total_size']} bytes, the tensors have {size}")
    elif set(files.values()) != {"model.safetensors"}:
        raise Refused(f"the weights lie in {', '.join(sorted(set(files.values()))) or 'no file'} without an index")
    return found


def check_files(folder: Path, told: dict[str, Any]) -> None:
    """Dtypes, the number of stored values, and what the config must say.

    Raises:
        Refused: something else is there.
    """
    found = stored_tensors(folder)
    wanted = _SAFETENSORS_DTYPES[told["dtype"]]
    for name, (dtype, _) in sorted(found.items()):
        if dtype in _FLOATS and dtype != wanted and name not in told["kept"]:
            raise Refused(f"tensor '{name}' is stored as {dtype}, not as {wanted}")
    stored = sum(count for name, (_, count) in found.items() if name not in told["buffers"])
    if stored != told["num_parameters"]:
        raise Refused(f"the files hold {stored} parameters, the plan has {told['num_parameters']}")
    config = json.loads((folder / "config.json").read_text())
    if config.get("head_dim") != told["head_dim"]:
        raise Refused(f"config.json has head_dim={config.get('head_dim')}, the model {told['head_dim']}")
    if "auto_map" in config:
        raise Refused("config.json asks for code of its own (auto_map)")


def load(folder: Path, dtype: str) -> Any:
    """The model, strictly.

    Raises:
        Refused: a key is missing, left over or of another shape.
    """
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=getattr(torch, dtype), output_loading_info=True, trust_remote_code=False)
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise Refused(f"{kind.replace('_', ' ')} after loading: {sorted(map(str, info[kind]))[0]}")
    return model.eval()


def check_model(folder: Path, source: Path, told: dict[str, Any]) -> None:
    """Count, ties, logits against the source, and a few generated tokens.

    Raises:
        Refused: one of them is not as promised.
    """
    import torch

    with torch.no_grad():
        before = load(source, told["dtype"])
        ids = (torch.arange(8) * 7919 + 1).remainder(before.get_input_embeddings().weight.shape[0])[None]
        expected = before(input_ids=ids, use_cache=False).logits
        del before  # one model in memory at a time
        model = load(folder, told["dtype"])
        count = sum(parameter.numel() for parameter in model.parameters())
        if count != told["num_parameters"]:
            raise Refused(f"{count} parameters after loading, the plan has {told['num_parameters']}")
        if (model.get_input_embeddings().weight is model.get_output_embeddings().weight) != told["tied"]:
            raise Refused(f"embedding and head are {'two tensors' if told['tied'] else 'one tensor'} after loading")
        logits = model(input_ids=ids, use_cache=False).logits
        if not bool(torch.isfinite(logits).all()):
            raise Refused(f"logits in {told['dtype']} are not finite")
        if not torch.equal(logits, expected):
            raise Refused(f"logits differ from the source's by {float((logits.double() - expected.double()).abs().max()):.1e}")
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=3, max_new_tokens=3, do_sample=False)
        if tuple(written.shape) != (1, 11):
            raise Refused(f"generate gave {written.shape[-1] - 8} tokens of the 3 asked for")


def check_tokenizer(folder: Path, source: Path) -> None:
    """The tokenizer and its chat template are the source's.

    Raises:
        Refused: they are not.
    """
    from transformers import AutoTokenizer

    path = source / "tokenizer_config.json"
    if not path.is_file() or "auto_map" in json.loads(path.read_text()):
        return
    there, here = (AutoTokenizer.from_pretrained(str(place)) for place in (source, folder))
    if there.get_vocab() != here.get_vocab() or there.chat_template != here.chat_template:
        raise Refused("the tokenizer or its chat template is not that of the source")


def check(told: dict[str, Any]) -> None:
    """Everything, the cheap first.

    Raises:
        Refused: the folder is not as promised.
    """
    folder, source = Path(told["folder"]), Path(told["source"])
    check_files(folder, told)
    check_model(folder, source, told)
    check_tokenizer(folder, source)


def main() -> None:
    """Check what standard input names."""
    told = json.loads(sys.stdin.read())
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        check(told)
        foreign = [name for name in sys.modules if name.split(".")[0] in ("minitron", "transformers_modules")]
        if foreign:
            raise Refused(f"loading imported {foreign[0]}")
        answer = {"transformers": transformers.__version__, "torch": torch.__version__}
    except Refused as refusal:
        answer = {"refused": str(refusal)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
