"""On-policy distillation: gradients against enumeration of all sequences, samples against their distribution, engines against ``local``."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_engines import VOCAB as TINY_VOCAB
from helpers_engines import FixedBatches, blocks_of, column
from helpers_models import tiny_llama, tiny_model
from helpers_ranks import run_ranks
from torch import Tensor

from minitron.distill.loop import Progress, StepReport, train
from minitron.distill.losses import LossConfig
from minitron.distill.on_policy import ContinuationSampler, OnPolicyBatches, OnPolicyConfig, root_class
from minitron.distill.on_policy.minillm import token_weights
from minitron.distill.on_policy.sampling import Continuations, draw, sample, uniforms
from minitron.distill.pair import TeacherStudent
from minitron.distill.settings import TrainingConfig
from minitron.distill.teacher import TeacherSignal
from minitron.distill.training import TrainingRun
from minitron.engine import EngineConfig, OptimizerConfig, build_engine
from minitron.errors import ConfigError, Interrupted
from minitron.ops.kd_loss import IGNORE_INDEX
from minitron.tracking import CompositeTracker

VOCAB, END, PROMPT = 5, 1, (3, 2)


def micro(seed: int, *, dtype: torch.dtype = torch.float32, sharpness: float = 2.0) -> Any:
    """A one-layer Llama over five tokens: few enough that all its texts can be enumerated."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=16,
        initializer_range=0.5,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=END,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    return model.to(dtype)


def every_text(num_new: int) -> tuple[Tensor, Tensor]:
    """All continuations, closed by END or cut at ``num_new`` tokens, [texts, prompt + new], and which tokens are in them, [texts, new]."""
    texts, valid = [], []
    for tokens in itertools.product(range(VOCAB), repeat=num_new):
        length = tokens.index(END) + 1 if END in tokens else num_new
        if all(token == END for token in tokens[length:]):  # one spelling of each text
            texts.append((*PROMPT, *tokens))
            valid.append([position < length for position in range(num_new)])
    return torch.tensor(texts), torch.tensor(valid)


@dataclass
class Enumeration:
    """Float64 log-probabilities of every text: ``all_q`` and ``all_p`` [texts, new, vocab], those of its own tokens [texts, new]."""

    valid: Tensor
    all_q: Tensor
    all_p: Tensor
    q: Tensor
    p: Tensor


def enumerate_texts(student: Any, teacher: Any, num_new: int) -> Enumeration:
    """Every text under both models; the student's side carries a graph."""
    texts, valid = every_text(num_new)
    all_q, all_p = (model(input_ids=texts, use_cache=False).logits.log_softmax(-1)[:, len(PROMPT) - 1 : -1] for model in (student, teacher))
    index = texts[:, len(PROMPT) :, None]
    return Enumeration(valid, all_q, all_p.detach(), all_q.gather(2, index)[..., 0], all_p.gather(2, index)[..., 0].detach())


def sequence_kl(found: Enumeration) -> Tensor:
    """KL(q ‖ p) over whole texts, by definition."""
    log_q, log_p = ((each * found.valid).sum(1) for each in (found.q, found.p))
    return (log_q.exp() * (log_q - log_p)).sum()


def paper_surrogate(found: Enumeration, alpha: float, *, long_term: bool = True) -> Tensor:
    """What MiniLLM's estimator is in expectation (eq. 3 to 7): its gradient is that of this sum over all texts."""
    mixed = (alpha * found.p.exp() + (1 - alpha) * found.q.exp()).log().detach()
    probability = (mixed * found.valid).sum(1).exp()
    weight = (found.q.detach() - mixed).exp()
    reward = found.p - found.q.detach()
    kl = (found.all_q.exp() * (found.all_q - found.all_p)).sum(-1)
    total = torch.zeros((), dtype=torch.float64)
    for text, mask in enumerate(found.valid):
        length = int(mask.sum())
        for t in range(length):
            later = reward[text, t + 1 : length]
            mean = later.mean() if len(later) else torch.tensor(0.0)
            term = kl[text, t] + (-mean * found.q[text, t] if long_term else 0.0)
            total = total + probability[text] * weight[text, t] * term
    return total


def flat_gradient(loss: Tensor, model: Any) -> Tensor:
    return torch.cat([gradient.flatten().double() for gradient in torch.autograd.grad(loss, list(model.parameters()))])


class Prompts:
    """The same prompt in every sequence of the data."""

    def __init__(self, num_rows: int, length: int) -> None:
        ids = torch.zeros(num_rows, length, dtype=torch.int64)
        ids[:, : len(PROMPT)] = torch.tensor(PROMPT)
        self.batch, self.drawn = {"input_ids": ids, "labels": ids.roll(-1, 1)}, 0

    def next(self) -> list[dict[str, Tensor]]:
        self.drawn += 1
        return [self.batch]

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


def assemble(
    student: Any,
    teacher: Any,
    inner: Any,
    config: OnPolicyConfig,
    loss: LossConfig,
    *,
    engine: EngineConfig | None = None,
    placement: str = "replicate",
) -> tuple[Any, TeacherStudent, OnPolicyBatches]:
    """Engine, pair and batches as a training has them."""
    owner = build_engine(engine or EngineConfig(), optimizer=OptimizerConfig(gradient_clipping=0.5), precision="float32")
    root = root_class(config)(student.train(), loss, compute_dtype=owner.compute_dtype)
    signal = TeacherSignal(teacher, owner, blocks=blocks_of(teacher), placement=placement)
    wrapped = owner.prepare(root, blocks=blocks_of(student))
    sampler = ContinuationSampler(wrapped, signal, config, losses=root.losses, student_config=student.config, end_of_text=END)
    return owner, TeacherStudent(wrapped, signal), OnPolicyBatches(inner, sampler, seed=7)


# ------------------------------------------------------------------------------------------------------------------- MiniLLM's gradient


def monte_carlo(config: OnPolicyConfig, *, num_groups: int = 60, group: int = 256) -> tuple[Tensor, float]:
    """The gradient over many samples through the real pair, and the standard error of its length."""
    student = micro(1)
    _, pair, batches = assemble(student, micro(2), Prompts(group, 8), config, LossConfig(name="reverse_kl"))
    groups = []
    for _ in range(num_groups):
        (batch,) = batches.next()
        groups.append(flat_gradient(pair.losses(batch, torch.tensor(float(group)))["loss"], student))
    stacked = torch.stack(groups)
    return stacked.mean(0), float((stacked.var(0) / num_groups).sum().sqrt())


def minillm(num_new: int, alpha: float) -> OnPolicyConfig:
    return OnPolicyConfig(fraction=1.0, method="minillm", prompt_tokens=len(PROMPT), max_new_tokens=num_new, teacher_mix=alpha)


def test_without_mixing_the_gradient_is_that_of_the_sequence_level_reverse_kl() -> None:
    """With two new tokens the length normalisation divides by one, and the decomposition is exact."""
    student = micro(1, dtype=torch.float64)
    found = enumerate_texts(student, micro(2, dtype=torch.float64), 2)
    exact = flat_gradient(sequence_kl(found), student)
    found = enumerate_texts(student, micro(2, dtype=torch.float64), 2)
    assert (flat_gradient(paper_surrogate(found, 0.0), student) - exact).norm() < 1e-4 * exact.norm()  # the norms compute in float32
    found = enumerate_texts(student, micro(2, dtype=torch.float64), 2)
    myopic = flat_gradient(paper_surrogate(found, 0.0, long_term=False), student)
    estimate, error = monte_carlo(minillm(2, 0.0))
    assert (estimate - exact).norm() < 3 * error
    assert (myopic - exact).norm() > 6 * error, "the test would not notice a missing long-term part"


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_the_gradient_is_the_papers_estimator(alpha: float) -> None:
    """Importance weights, length normalisation and texts that end early, against the sum over all texts."""
    student = micro(1, dtype=torch.float64)
    found = enumerate_texts(student, micro(2, dtype=torch.float64), 3)
    exact = flat_gradient(paper_surrogate(found, alpha), student)
    estimate, error = monte_carlo(minillm(3, alpha))
    assert (estimate - exact).norm() < 3 * error
    found = enumerate_texts(student, micro(2, dtype=torch.float64), 3)
    other = flat_gradient(paper_surrogate(found, 0.8), student)
    assert (other - exact).norm() > 6 * error, "the test would not notice another mixture"


def test_weights_of_a_text_worked_out_by_hand() -> None:
    student, teacher, sampled = (torch.tensor([row]).log() for row in ([0.5, 0.25, 0.5, 0.1], [0.25, 0.5, 0.125, 0.9], [0.4, 0.3, 0.35, 0.1]))
    valid = torch.tensor([[True, True, True, False]])
    single, long_term = token_weights(student=student, teacher=teacher, sampled=sampled, valid=valid)
    importance = [0.5 / 0.4, 0.25 / 0.3, 0.5 / 0.35, 0.0]
    later = [(torch.tensor(2.0).log() + torch.tensor(0.25).log()) / 2, torch.tensor(0.25).log(), 0.0, 0.0]
    torch.testing.assert_close(single[0], torch.tensor(importance))
    torch.testing.assert_close(long_term[0], torch.tensor([float(w * r) for w, r in zip(importance, later, strict=True)]))


# ----------------------------------------------------------------------------------------------------------------------------- sampling


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (0.3, 1.0), (0.3, 0.5)])
def test_samples_have_the_mixtures_distribution(alpha: float, temperature: float) -> None:
    """The second token too, which depends on the first; 19 degrees of freedom, of which 60 is the 1 - 4e-6 quantile."""
    rows, generator = 40_000, torch.Generator().manual_seed(0)
    tables = [torch.randn(VOCAB, VOCAB, generator=generator) for _ in range(2)]  # logits after each last token
    student, teacher = (lambda ids, table=table: table[ids[:, -1]] for table in tables)
    found = sample(
        torch.full((rows, 1), 2),
        student=student,
        teacher=teacher if alpha else None,
        uniform=uniforms(rows, 2, first_row=0, step=0, seed=3),
        temperature=temperature,
        teacher_mix=alpha,
    )
    q, p = (torch.softmax(table.double() / temperature, -1) for table in tables)
    mixed = alpha * p + (1 - alpha) * q
    joint = mixed[2][:, None] * mixed
    first, second = found.tokens[:, 1], found.tokens[:, 2]
    counts = torch.bincount(first * VOCAB + second, minlength=VOCAB**2).double()
    assert chi_square(counts, joint.flatten()) < 65
    assert chi_square(counts, (p[2][:, None] * p).flatten()) > 1000
    torch.testing.assert_close(found.sampled[:, 1].double(), mixed[first, second].log(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.student[:, 0], torch.log_softmax(tables[0], -1)[2, first])
    assert found.valid.all() and (found.teacher is None) == (alpha == 0)


def test_random_numbers_depend_on_seed_step_and_row_alone() -> None:
    whole = uniforms(6, 50, first_row=10, step=4, seed=1)
    assert torch.equal(torch.cat([uniforms(2, 50, first_row=10, step=4, seed=1), uniforms(4, 50, first_row=12, step=4, seed=1)]), whole)
    assert whole.min() >= 0 and whole.max() < 1 and abs(float(whole.mean()) - 0.5) < 5 * (1 / 12 / 300) ** 0.5
    for other in ({"step": 5, "seed": 1}, {"step": 4, "seed": 2}):
        assert not torch.isin(uniforms(6, 50, first_row=10, **other), whole).any()


def test_what_has_no_probability_is_never_drawn() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64)
    edges = [0.0, 0.25 - 1e-12, 0.25, 1.0 - 2.0**-53]
    assert [int(draw(probabilities, torch.tensor([edge], dtype=torch.float64))) for edge in edges] == [1, 1, 3, 3]


def test_kept_keys_and_values_change_nothing() -> None:
    """Log-probabilities met while sampling are those of one forward over the finished text."""
    student, teacher = micro(1), micro(2)
    _, _, batches = assemble(student, teacher, Prompts(32, 12), minillm(8, 0.5), LossConfig(name="reverse_kl"))
    found = batches._sampler(torch.tensor([PROMPT]).expand(32, -1), uniforms(32, 8, first_row=0, step=0, seed=0))
    for model, known in ((student, found.student), (teacher, found.teacher)):
        with torch.no_grad():
            whole = model(input_ids=found.tokens, use_cache=False).logits.log_softmax(-1)[:, len(PROMPT) - 1 : -1]
        assert known is not None
        torch.testing.assert_close(known, whole.gather(2, found.tokens[:, len(PROMPT) :, None])[..., 0], rtol=0, atol=1e-5)
    without = replace(found, teacher=None)
    torch.testing.assert_close(batches._sampler.teacher_log_probs(without), found.teacher, rtol=0, atol=1e-5)
    assert student.training


# ------------------------------------------------------------------------------------------------------------------------------ batches


def test_labels_stand_on_sampled_tokens_up_to_the_end_of_text_only() -> None:
    config = OnPolicyConfig(fraction=1.0, prompt_tokens=len(PROMPT), max_new_tokens=4)
    _, _, batches = assemble(micro(1), micro(2), Prompts(64, 8), config, LossConfig(name="forward_kl"))
    (batch,) = batches.next()
    assert batch.keys() == {"input_ids", "labels"} and batch["input_ids"].shape == (64, len(PROMPT) + 4)
    lengths = set()
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        new = ids[len(PROMPT) :]
        kept = new[: new.index(END) + 1] if END in new else new
        lengths.add(len(kept))
        assert tuple(ids[: len(PROMPT)]) == PROMPT
        assert labels == [IGNORE_INDEX] * (len(PROMPT) - 1) + kept + [IGNORE_INDEX] * (len(new) - len(kept) + 1)
    assert len(lengths) > 2


def test_losses_on_labels_alone_skip_what_the_student_wrote() -> None:
    mixture = LossConfig(terms={"forward_kl": 1.0, "cross_entropy": 0.5})
    config = OnPolicyConfig(fraction=0.5, prompt_tokens=len(PROMPT), max_new_tokens=4)
    _, pair, batches = assemble(micro(1), micro(2), Prompts(8, 8), config, mixture)
    for step in range(6):
        (batch,) = batches.next()
        terms = pair.losses(batch, torch.tensor(8.0))
        assert bool(terms["cross_entropy"] == 0) == batches.replaces(step) and terms["forward_kl"] > 0
    assert {batches.replaces(step) for step in range(6)} == {True, False}


def test_steps_with_the_datas_text_carry_no_policy_gradient() -> None:
    """Under MiniLLM they are reverse KL and, where the losses name it, language modelling."""
    mixture = LossConfig(terms={"reverse_kl": 2.0, "cross_entropy": 0.5})
    _, pair, batches = assemble(micro(1), micro(2), Prompts(8, 8), replace(minillm(4, 0.2), fraction=0.5), mixture)
    for step in range(6):
        (batch,) = batches.next()
        terms = pair.losses(batch, torch.tensor(8.0))
        assert bool(terms["policy_gradient"] == 0) != batches.replaces(step)
        assert bool(terms["cross_entropy"] == 0) == batches.replaces(step)
        expected = 2.0 * (terms["reverse_kl"] + terms["policy_gradient"]) + 0.5 * terms["cross_entropy"]
        torch.testing.assert_close(terms["loss"].detach(), expected)


def test_the_fraction_is_met_and_none_is_none() -> None:
    def hits(fraction: float) -> int:
        _, _, batches = assemble(micro(1), micro(2), Prompts(2, 8), OnPolicyConfig(fraction=fraction), LossConfig())
        return sum(batches.replaces(step) for step in range(2000))

    assert abs(hits(0.3) - 600) < 5 * (2000 * 0.3 * 0.7) ** 0.5
    assert hits(1.0) == 2000 and hits(1e-9) == 0


@pytest.mark.parametrize(
    ("method", "loss"), [("gkd", LossConfig(name="jsd")), ("gkd", LossConfig(name="forward_kl")), ("minillm", LossConfig(name="reverse_kl"))]
)
def test_training_brings_the_distribution_of_texts_to_the_teachers(method: str, loss: LossConfig) -> None:
    """The exact divergence over all texts of three tokens falls to a fraction of what it was."""
    config = OnPolicyConfig(fraction=1.0, method=method, prompt_tokens=len(PROMPT), max_new_tokens=3)
    student, teacher = micro(1), micro(2)
    engine, pair, batches = assemble(student, teacher, Prompts(32, 8), config, loss)
    before = float(sequence_kl(enumerate_texts(student, teacher, 3)).detach())
    train(pair, engine, batches, learning_rate=lambda _: 1e-2, num_steps=80, progress=Progress(), hooks=[])
    after = float(sequence_kl(enumerate_texts(student, teacher, 3)).detach())
    assert before > 0.5 and after < 0.1 * before


# ------------------------------------------------------------------------------------------------------------------ engines and resuming


@dataclass(frozen=True)
class Case:
    """One short training on 8 sequences a step."""

    folder: Path
    engine: str = "local"
    zero_stage: int = 2
    placement: str = "replicate"
    method: str = "minillm"
    fraction: float = 0.7
    num_micro: int = 2


def run_case(case: Case) -> dict[str, Any]:
    """The curve of a few steps, and what was sampled."""
    config = OnPolicyConfig(fraction=case.fraction, method=case.method, prompt_tokens=6, max_new_tokens=5, teacher_mix=0.3)
    loss = LossConfig(name="reverse_kl") if case.method == "minillm" else LossConfig(terms={"jsd": 1.0, "cross_entropy": 0.2})
    student, teacher = (tiny_model(case.folder / role) for role in ("student", "teacher"))
    engine = EngineConfig(name=case.engine, zero_stage=case.zero_stage)
    owner, pair, batches = assemble(student, teacher, FixedBatches(case.num_micro), config, loss, engine=engine, placement=case.placement)
    curve: list[dict[str, float]] = []

    def hook(report: StepReport) -> None:
        curve.append(report.read())

    train(pair, owner, batches, learning_rate=lambda _: 3e-3, num_steps=4, progress=Progress(), hooks=[hook])
    weights = dict(owner.full_weights())
    return {"curve": curve, "weights": weights, "replaced": [batches.replaces(step) for step in range(4)]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_llama(root / "teacher", seed=1)
    tiny_llama(root / "student", layers=2, hidden=32, ffn=40, heads=4, seed=2)
    return root


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, Any]:
    """``local``, MiniLLM."""
    return run_ranks(run_case, 1, Case(folder))[0]


ENGINES = [
    ("local", 0, 1, {"num_micro": 4}),
    ("fsdp", 0, 2, {"placement": "shard"}),
    ("deepspeed", 1, 2, {}),
    ("deepspeed", 2, 2, {}),
    ("deepspeed", 3, 2, {"placement": "shard"}),
]


@pytest.mark.parametrize(("engine", "stage", "ranks", "options"), ENGINES)
def test_an_engine_writes_and_learns_the_same(
    folder: Path, reference: dict[str, Any], engine: str, stage: int, ranks: int, options: dict[str, Any]
) -> None:
    assert set(reference["replaced"]) == {True, False}
    for result in run_ranks(run_case, ranks, Case(folder, engine=engine, zero_stage=stage, **options)):
        assert torch.equal(column(result, "tokens"), column(reference, "tokens"))
        for name in ("loss", "gradient_norm", "reverse_kl", "policy_gradient"):
            torch.testing.assert_close(column(result, name), column(reference, name), rtol=2e-5, atol=2e-6)  # a signed sum may be near 0
        for name, tensor in result["weights"].items():
            assert (tensor - reference["weights"][name]).norm() < 1e-4 * reference["weights"][name].norm(), name


def test_gkd_under_sharded_ranks(folder: Path) -> None:
    expected = run_ranks(run_case, 1, Case(folder, method="gkd"))[0]
    for result in run_ranks(run_case, 2, Case(folder, method="gkd", engine="fsdp")):
        for name in ("loss", "gradient_norm", "jsd", "cross_entropy"):
            torch.testing.assert_close(column(result, name), column(expected, name), rtol=2e-5, atol=1e-7)


class Sequences:
    """An endless stream of random sequences whose place is a number."""

    def __init__(self) -> None:
        self.drawn = 0

    def next(self) -> Tensor:
        self.drawn += 1
        return torch.randint(2, TINY_VOCAB, (16,), generator=torch.Generator().manual_seed(self.drawn))

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


def training(folder: Path, out: Path | None, config: OnPolicyConfig, *, stop_after: int | None = None) -> dict[str, Tensor]:
    """The weights after six steps of the whole training, begun anew or gone on from the checkpoint in ``out``."""
    student, teacher = (tiny_model(folder / role) for role in ("student", "teacher"))
    asked = itertools.count(1)
    run = TrainingRun(
        student=student,
        teacher=teacher,
        stream=Sequences(),  # type: ignore[arg-type]
        validation=torch.randint(2, TINY_VOCAB, (2, 16), generator=torch.Generator().manual_seed(9)),
        sequence_length=16,
        training=TrainingConfig(num_steps=6, batch_size=4, micro_batch_size=2, learning_rate=3e-3, precision="float32", checkpoint_every=0),
        loss=LossConfig(name="reverse_kl"),
        engine=EngineConfig(),
        blocks_of=blocks_of,
        open_tracker=lambda step: CompositeTracker([]),
        what="test",
        folder=out,
        stop=lambda: next(asked) == stop_after,
        on_policy=config,
        end_of_text=END,
        seed=5,
    )
    return dict(run.run().student_weights())


@pytest.mark.parametrize("method", ["gkd", "minillm"])
def test_resuming_is_exact(folder: Path, tmp_path: Path, method: str) -> None:
    config = OnPolicyConfig(fraction=0.7, method=method, prompt_tokens=6, max_new_tokens=5)
    whole = training(folder, None, config)
    with pytest.raises(Interrupted):
        training(folder, tmp_path, config, stop_after=3)
    halves = training(folder, tmp_path, config)
    assert all(torch.equal(halves[name], tensor) for name, tensor in whole.items())
    plain = training(folder, None, OnPolicyConfig())
    assert any(not torch.equal(plain[name], tensor) for name, tensor in whole.items())


def test_a_fraction_of_nothing_is_plain_training_bit_for_bit(folder: Path) -> None:
    """Also where the root could sample, and the batches are asked."""
    plain = training(folder, None, OnPolicyConfig())
    never = training(folder, None, OnPolicyConfig(fraction=1e-12, prompt_tokens=6, max_new_tokens=5))
    assert all(torch.equal(never[name], tensor) for name, tensor in plain.items())


# ----------------------------------------------------------------------------------------------------------------------------- bad input


REFUSED = [
    ({"fraction": 1.5}, {}, "on_policy.fraction=1.5 is not a share"),
    ({"fraction": -0.1}, {}, "on_policy.fraction=-0.1 is not a share"),
    ({"method": "gdk"}, {}, "on_policy.method=gdk is unknown; .*gkd"),
    ({"max_new_tokens": 0}, {}, "on_policy.max_new_tokens=0 must be at least 1"),
    ({"temperature": 0.0}, {}, "on_policy.temperature=0.0 must be positive"),
    ({"teacher_mix": 1.0}, {}, "on_policy.teacher_mix=1.0 must be from 0 to below 1"),
    ({"prompt_tokens": 60, "max_new_tokens": 50}, {}, "make 110 tokens, more than the 100 of the shortest sequences"),
    ({}, {"placement": "cached"}, "teacher.placement=replicate, shard or offload instead of cached"),
    ({"method": "minillm"}, {"num_teachers": 2}, "follows one teacher, and 2 are given"),
    ({}, {"loss": LossConfig(name="cross_entropy")}, "only cross_entropy, would teach the student to repeat itself"),
    ({"method": "minillm"}, {"loss": LossConfig(name="forward_kl")}, "the losses are forward_kl: use loss=reverse_kl"),
    ({"method": "minillm"}, {"loss": LossConfig(terms={"reverse_kl": 1.0, "jsd": 1.0})}, "the losses are jsd and reverse_kl"),
    ({"method": "minillm"}, {"loss": LossConfig(name="reverse_kl", temperature=2.0)}, "loss.temperature=2.0: set it to 1"),
]


@pytest.mark.parametrize(("options", "surroundings", "sentence"), REFUSED)
def test_what_cannot_work_is_refused_in_one_sentence(options: dict[str, Any], surroundings: dict[str, Any], sentence: str) -> None:
    around = {"loss": LossConfig(name="reverse_kl"), "sequence_length": 100, "placement": "replicate", **surroundings}
    config = OnPolicyConfig(**{"fraction": 0.5, "prompt_tokens": 50, "max_new_tokens": 50, **options})
    with pytest.raises(ConfigError, match=sentence) as caught:
        config.check(**around)
    assert "\n" not in str(caught.value)
    replace(config, fraction=0.0).check(**around)


def test_what_works_passes() -> None:
    for config in (OnPolicyConfig(fraction=1.0), minillm(4, 0.2)):
        config.check(loss=LossConfig(terms={"reverse_kl": 1.0, "cross_entropy": 0.1}), sequence_length=128, placement="replicate")


def test_the_command_line_refuses_before_a_model_is_loaded() -> None:
    from minitron.checks import check_config
    from minitron.cli import compose
    from minitron.config import build_config

    words = ["teacher.path=nowhere", "data.builtin=python_docs", "training.num_steps=1", "data.sequence_length=64", "on_policy.fraction=0.5"]
    with pytest.raises(ConfigError, match="make 128 tokens, more than the 64 of the shortest sequences"):
        check_config(build_config(compose(words)[0]), ["distill"])


def test_sampled_text_is_data_only() -> None:
    """Nothing that is sampled carries a graph."""
    _, _, batches = assemble(micro(1), micro(2), Prompts(4, 8), minillm(3, 0.2), LossConfig(name="reverse_kl"))
    found = batches._sampler(torch.tensor([PROMPT]).expand(4, -1), uniforms(4, 3, first_row=0, step=0, seed=0))
    assert isinstance(found, Continuations)
    assert not any(tensor is not None and tensor.requires_grad for tensor in vars(found).values())
    assert not any(tensor.requires_grad for tensor in batches.next()[0].values())
