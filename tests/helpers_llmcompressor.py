"""llm-compressor as an oracle, in a process of its own: ``python helpers_llmcompressor.py MODEL IDS OUT METHOD PATTERN``."""

from __future__ import annotations

import sys
from pathlib import Path


def run(model: str, ids: str, out: str, method: str, pattern: str) -> None:
    """Sparsify the model in a folder on token ids [num, sequence] in a safetensors file; write its weights."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = load_file(ids)["ids"].tolist()
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    kind = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
    groups = {"mask_structure": pattern} if ":" in pattern else {}
    modifier = kind(sparsity=0.5 if groups else float(pattern), targets=["Linear"], ignore=["lm_head"], **groups)
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    sizes = {"num_calibration_samples": len(rows), "max_seq_length": len(rows[0]), "shuffle_calibration_samples": False}
    done = oneshot(model=loaded, tokenizer=AutoTokenizer.from_pretrained(model), dataset=data, recipe=[modifier], **sizes)
    save_file({name: tensor.clone() for name, tensor in done.named_parameters()}, out)


if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    run(*sys.argv[1:])
