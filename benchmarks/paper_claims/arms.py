"""The arms of each suite: one student each, per seed. Claims compare arms and share them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from minitron.distill.settings import TrainingConfig
from paper_claims.cutting import Cut
from paper_claims.suites import Suite


@dataclass(frozen=True)
class Arm:
    """One student: how it is cut and how it is trained. ``loss`` None measures it right after the cut.

    ``cut_from`` and ``guided_by`` name teachers of the suite, ``text`` what it is trained and measured on.
    """

    name: str
    cut: Cut
    training: TrainingConfig | None = None
    loss: dict[str, Any] | None = None
    text: str = "main"
    cut_from: str = "original"
    guided_by: str = "original"
    seeds: tuple[int, ...] = (0, 1, 2)


#: Loss of an arm by the last part of its name.
LOSSES: dict[str, dict[str, Any]] = {
    "forward_kl": {"name": "forward_kl"},
    "cross_entropy": {"name": "cross_entropy"},
    "reverse_kl": {"name": "reverse_kl"},
    "mse": {"name": "mse"},
    "cosine": {"name": "cosine"},
    "kl+ce": {"terms": {"forward_kl": 1.0, "cross_entropy": 1.0}},
}


def _trained(suite: Suite, kind: str, loss: str, cut: Cut, **more: Any) -> Arm:
    training = replace(suite.student, learning_rate=suite.scratch_learning_rate) if cut.metric == "scratch" else suite.student
    return Arm(**({"name": f"{kind}/{loss}", "cut": cut, "training": training, "loss": LOSSES[loss], "seeds": suite.seeds} | more))


def _with_states(suite: Suite, kind: str, cut: Cut, layers: list[list[int]], **more: Any) -> Arm:
    """Hidden states beside forward KL at the papers' dynamic weight: after the last layer but one of both models, and of the embedding."""
    loss = {"terms": {"forward_kl": 1.0, "hidden_states": "dynamic"}, "states": {"layers": layers, "embedding": True}}
    return Arm(f"{kind}/kl+hidden", cut, suite.student, loss, seeds=suite.seeds, **more)


def _measured(suite: Suite, name: str, cut: Cut) -> Arm:
    return Arm(f"cut/{name}", cut, seeds=suite.seeds)


def _teacher(name: str, text: str = "main") -> Arm:
    """A teacher itself on a text."""
    return Arm(f"teacher/{name}/{text}", Cut("whole", "random"), text=text, cut_from=name, seeds=(0,))


def toy_arms(suite: Suite) -> list[Arm]:
    """Ten claims on the small teacher."""
    width = Cut("width")
    arms = [_teacher("original")]
    arms += [_measured(suite, metric, Cut("width", metric)) for metric in ("activation", "magnitude", "random")]
    arms += [_measured(suite, f"rounds={rounds}", Cut("width", rounds=rounds)) for rounds in (2, 4)]
    arms += [_trained(suite, "width", loss, width) for loss in LOSSES]
    arms.append(_with_states(suite, "width", width, [[4, 4]]))
    arms += [_trained(suite, size, "forward_kl", Cut(size)) for size in ("depth", "half_depth")]
    arms.append(_with_states(suite, "half_depth", Cut("half_depth"), [[4, 1]]))
    arms.append(_trained(suite, "scratch", "cross_entropy", Cut("width", "scratch")))
    arms += [_trained(suite, f"other_text/{guide}", "forward_kl", width, text="other", guided_by=guide) for guide in ("original", "corrected")]
    arms += [_teacher("original", "other"), _teacher("corrected", "other")]
    arms.append(_trained(suite, "rounds=4", "forward_kl", Cut("width", rounds=4)))
    arms.append(_trained(suite, "random", "forward_kl", Cut("width", "random")))
    arms.append(_trained(suite, "scratch", "forward_kl", Cut("width", "scratch")))
    for size in suite.ranked_sizes:
        arms.append(Arm(f"shape/{size}", Cut(size), suite.ranking, LOSSES["forward_kl"], seeds=suite.ranking_seeds))
    return arms


def smollm2_arms(suite: Suite) -> list[Arm]:
    """The main rows on a real model."""
    width, corrected = Cut("width"), {"cut_from": "corrected", "guided_by": "corrected"}
    arms = [_teacher("original")]
    arms += [_measured(suite, metric, Cut("width", metric)) for metric in ("activation", "magnitude", "random")]
    arms.append(_teacher("corrected"))
    arms.append(_trained(suite, "uncorrected/width", "forward_kl", width))
    arms += [_trained(suite, "width", loss, width, **corrected) for loss in ("forward_kl", "cross_entropy")]
    arms.append(_trained(suite, "scratch", "cross_entropy", Cut("width", "scratch")))
    arms.append(_trained(suite, "depth", "forward_kl", Cut("depth"), **corrected))
    arms += [_trained(suite, "width", loss, width, **corrected) for loss in ("kl+ce", "reverse_kl")]
    return arms


ARMS = {"toy": toy_arms, "smollm2": smollm2_arms}


def arms_of(suite: Suite) -> list[Arm]:
    """All arms of a suite."""
    return ARMS[suite.name](suite)


@dataclass
class Result:
    """What an arm measured. ``windows`` are losses of the held-out windows, in nats per token."""

    arm: str
    seed: int
    windows: list[float]
    num_parameters: int
    seconds: float
    tokens: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    kept_layers: list[int] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """Mean held-out loss."""
        return sum(self.windows) / len(self.windows)
