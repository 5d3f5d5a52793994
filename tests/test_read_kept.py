"""From a checkpoint only what stays is read; what comes out is the same as from whole tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_models import family_config, random_plan, random_weights

from minitron.models import discover
from minitron.models.stored import to_stored
from minitron.models.weights import WeightReader, write_weights
from minitron.prune import prune_weights


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("phi3", {"ffn_size": 24}),
        ("gemma2", {"ffn_size": 24}),
        ("gpt_oss", {"num_experts": 3, "expert_ffn_size": 16}),
        ("mixtral", {"num_experts": 3, "expert_ffn_size": 16, "head_merge": "paper"}),
    ],
)
def test_a_reader_gives_what_whole_tensors_give(tmp_path: Path, model_type: str, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = family_config(model_type)
    family = discover(config)
    weights = dict(to_stored(family.stored, random_weights(family).items(), family.architecture.size))
    config.save_pretrained(tmp_path)
    write_weights(tmp_path, weights.items(), shard_bytes=20_000)
    plan = random_plan(family, layers=(0, 2), hidden_size=64, num_heads=4, num_kv_heads=4, **sizes)
    read = 0

    def counted(self: WeightReader, name: str, kept: Any = ()) -> torch.Tensor:
        nonlocal read
        tensor = get(self, name, kept)
        read += tensor.numel()
        return tensor

    get = WeightReader.get
    monkeypatch.setattr(WeightReader, "get", counted)
    with WeightReader(tmp_path) as reader:
        kept = dict(prune_weights(reader, plan, family))
    whole = dict(prune_weights(weights.__getitem__, plan, family))
    assert kept.keys() == whole.keys()
    assert all(torch.equal(kept[name], whole[name]) for name in whole)
    written = sum(tensor.numel() for tensor in whole.values())
    assert read == written if "head_merge" not in sizes else written < read < sum(tensor.numel() for tensor in weights.values())
