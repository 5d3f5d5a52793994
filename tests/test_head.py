"""Heads of real model types: what they do to their product is found and proved by numbers, and the losses on them are the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_losses import OPTIONS, members, reference
from torch import Tensor, nn

from minitron.distill.losses import LOSSES, LossConfig, build_losses
from minitron.distill.pair import StudentLosses, TeacherStudent
from minitron.distill.teacher import TeacherSignal
from minitron.distill.validation import validate, validation_batches
from minitron.engine import EngineConfig, OptimizerConfig, build_engine
from minitron.errors import ArchitectureError
from minitron.evaluate import perplexity
from minitron.models.head import decoder_of, head_of
from minitron.ops.head import PLAIN, Head, LogitTransform, products_into
from minitron.ops.kd_loss import IGNORE_INDEX

MIXTURE = LossConfig(terms={name: 0.5 + i / 4 for i, name in enumerate(LOSSES)}, temperature=2.0, k=5)
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}
#: Model type, options, the transform that its modelling code applies.
FAMILIES = {
    "llama": ({}, PLAIN),
    "gemma2": ({"final_logit_softcapping": 5.0}, LogitTransform(cap=5.0)),
    "granite": ({"logits_scaling": 8.0}, LogitTransform(scale=1 / 8)),
    "hyperclovax": ({"logits_scaling": 0.25}, LogitTransform(scale=0.25)),  # multiplies by what granite divides by
    "cohere2": ({"logit_scale": 0.0625}, LogitTransform(scale=0.0625)),
    "phi": ({}, PLAIN),  # a bias
}


def model_of(kind: str, *, vocab: int = 60, seed: int = 0, **options: Any) -> Any:
    """A tiny random float32 model; its head's bias, where it has one, is not zero."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, vocab_size=vocab, **SMALL | options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float()
        bias = getattr(model.get_output_embeddings(), "bias", None)
        if bias is not None:
            nn.init.normal_(bias)
    return model


def batch_of(vocab: int = 60, *, seed: int = 1) -> dict[str, Tensor]:
    """Two sequences, partly masked."""
    ids = torch.randint(2, vocab, (2, 9), generator=torch.Generator().manual_seed(seed))
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, :-1] = ids[:, 1:]
    labels[1, 5:] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels}


def root_of(student: nn.Module, config: LossConfig = MIXTURE) -> StudentLosses:
    return StudentLosses(student, config, compute_dtype=torch.float32)


def losses_through_the_root(student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Loss terms by the way that training takes, the teacher in plain sight."""
    with torch.no_grad():
        hidden = decoder_of(teacher)(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    return root_of(student)(**batch, denominator=torch.tensor(11.0), teacher_hidden=hidden, teacher_head=head_of(teacher), **options)


def expected_loss(student: Any, teacher: Any, batch: dict[str, Tensor], *, weights: Tensor | None = None) -> Tensor:
    """The mixture from the models' own logits in float64, on the vocabulary that both have."""
    vocab = min(model.config.vocab_size for model in (student, teacher))
    ours, theirs = (m(input_ids=batch["input_ids"], use_cache=False).logits.flatten(0, 1)[:, :vocab] for m in (student, teacher.double()))
    labels = batch["labels"].flatten()
    valid = labels != IGNORE_INDEX
    rows = torch.ones_like(labels) if weights is None else weights.double().flatten()
    terms = [weight * (reference(each, ours, theirs.detach(), labels) * rows)[valid].sum() / 11.0 for weight, each in members(MIXTURE)]
    return torch.stack(terms).sum()


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_transform_is_found_and_the_losses_are_the_models_own(kind: str) -> None:
    """Value and gradient of every parameter of the student, soft-capped, scaled or with a bias, against the model in float64."""
    options, transform = FAMILIES[kind]
    model, teacher = model_of(kind, **options), model_of("gemma2", seed=2, final_logit_softcapping=4.0)
    model.train()
    found = head_of(model)
    assert found.transform == transform and model.training
    assert (found.bias is not None) == (kind == "phi")
    batch = batch_of()
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    labels = batch["input_ids"][:, 1:]
    mean = perplexity(model, batch["input_ids"], batch_size=1, what="tiny")["loss"]
    assert mean == pytest.approx(float(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())), rel=1e-5)

    total = losses_through_the_root(model, teacher, batch)["loss"]
    total.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    exact = expected_loss(model.double(), teacher, batch)
    exact.backward()
    assert total.item() == pytest.approx(exact.item(), rel=2e-5)
    assert any(name.endswith("lm_head.bias") for name in gradients) == (kind == "phi")
    largest = max(float(parameter.grad.abs().max()) for parameter in model.parameters() if parameter.grad is not None)
    for name, parameter in model.named_parameters():
        assert float((gradients[name].double() - parameter.grad).abs().max()) <= 1e-4 * largest, name


@pytest.mark.parametrize("student_vocab", [60, 52, 70])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_padded_vocabularies_and_tied_heads(tied: bool, student_vocab: int) -> None:
    """Padding rows of the larger vocabulary play no part and get no gradient from the head; a tied weight gets both of its gradients."""
    student = model_of("llama", vocab=student_vocab, tie_word_embeddings=tied)
    teacher, batch = model_of("llama", seed=2), batch_of(50)
    total = losses_through_the_root(student, teacher, batch)["loss"]
    total.backward()
    weight = student.get_output_embeddings().weight
    mine = weight.grad.clone()
    assert (weight is student.get_input_embeddings().weight) == tied
    assert not mine[60:].any() and mine[:60].any()
    student.zero_grad()
    exact = expected_loss(student.double(), teacher, batch)
    exact.backward()
    assert total.item() == pytest.approx(exact.item(), rel=2e-5)
    assert float((mine.double() - weight.grad).abs().max()) <= 1e-4 * float(weight.grad.abs().max())


def test_weights_of_a_batch_reach_the_losses() -> None:
    student, teacher, batch = model_of("llama"), model_of("llama", seed=2), batch_of()
    weights = torch.rand(2, 9, generator=torch.Generator().manual_seed(4))
    total = losses_through_the_root(student, teacher, batch, weights=weights)["loss"]
    assert total.item() == pytest.approx(expected_loss(student.double(), teacher, batch, weights=weights).item(), rel=2e-5)

    received: dict[str, Any] = {}

    def root(ids: Tensor, labels: Tensor, denominator: Tensor, **options: Any) -> dict[str, Tensor]:
        received.update(options)
        return {}

    TeacherStudent(root, None).losses(batch | {"weights": weights}, torch.tensor(1.0))
    assert torch.equal(received["weights"], weights)
    TeacherStudent(root, None).losses(batch, torch.tensor(1.0))
    assert received["weights"] is None


def test_validation_reports_loss_divergence_and_agreement() -> None:
    student, teacher = model_of("gemma2"), model_of("gemma2", seed=2)
    with torch.no_grad():  # near the teacher, so that they agree on some tokens
        for mine, other in zip(student.parameters(), teacher.parameters(), strict=True):
            mine.copy_(0.9 * other + 0.1 * mine)
    ids = torch.randint(2, 60, (5, 12), generator=torch.Generator().manual_seed(8))
    batches = validation_batches(ids, micro_batch_size=2)
    engine = build_engine(EngineConfig(name="local"), optimizer=OptimizerConfig(), precision="float32")
    signal = TeacherSignal(teacher, engine, blocks=list(teacher.model.layers), placement="replicate")
    found = validate(TeacherStudent(root_of(student), signal), batches)
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, use_cache=False).logits[:, :-1].double().flatten(0, 1) for m in (student, teacher))
    labels = ids[:, 1:].flatten()
    assert set(found) == {"validation_loss", "validation_kl", "validation_agreement"}
    assert found["validation_loss"] == pytest.approx(float(F.cross_entropy(ours, labels)), rel=1e-5)
    assert found["validation_kl"] == pytest.approx(float(reference(LossConfig(), ours, theirs, labels).mean()), rel=1e-4)
    same = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
    assert 0.1 < float(same) < 1.0 and found["validation_agreement"] == pytest.approx(float(same))
    assert set(validate(TeacherStudent(root_of(student), None), batches)) == {"validation_loss"}


def test_a_cap_that_small_logits_hide_is_found() -> None:
    """At logits of about 1 a cap at 30 changes nothing that bf16 shows; the proof pushes them up, and names the cap all the same."""
    model = model_of("gemma2", final_logit_softcapping=30.0, initializer_range=0.02).bfloat16()
    with torch.no_grad():
        largest = model(input_ids=torch.arange(1, 6)[None], use_cache=False).logits.abs().max()
    assert float(largest) < 3.0
    assert head_of(model).transform == LogitTransform(cap=30.0)
    model.config.final_logit_softcapping = None  # obeyed: the code reads the same field
    assert head_of(model).transform == PLAIN


def test_what_the_config_says_is_not_believed() -> None:
    model = model_of("llama")
    model.config.final_logit_softcapping = 3.0
    model.config.logits_scaling = 7.0
    assert head_of(model).transform == PLAIN


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda module, inputs, logits: logits + 0.3 * logits.abs().max(), "is off by"),
        (lambda module, inputs, logits: torch.relu(logits), "is off by"),
        (lambda module, inputs, logits: 3.0 * torch.tanh(logits / 3.0), "is off by"),
        (lambda module, inputs, logits: logits[..., :-2], "has 58 logits for 60 rows"),
    ],
    ids=["shift", "relu", "cap unnamed", "cut"],
)
def test_heads_that_nothing_explains_are_refused(change: Any, words: str) -> None:
    model = model_of("llama")
    model.lm_head.register_forward_hook(change)
    with pytest.raises(ArchitectureError, match=f"the head of 'llama' {words}.* do not explain the model's logits"):
        root_of(model)


def test_a_head_of_fewer_tokens_is_a_view() -> None:
    head = Head(torch.randn(6, 3), torch.randn(6), LogitTransform(cap=2.0))
    hidden = torch.randn(4, 3)
    torch.testing.assert_close(head.first(4).logits(hidden), head.logits(hidden)[:, :4])
    assert head.first(6) is head and head.first(4).weight.data_ptr() == head.weight.data_ptr()


@pytest.mark.parametrize("vocab", [5, 1024, 2048, 2500])
def test_products_by_slices_of_the_vocabulary(vocab: int) -> None:
    """Into a part of a wider matrix, from a weight whose rows lie apart: float64's numbers, and nothing beside them is touched."""
    hidden, wide, room = torch.randn(7, 33), torch.randn(vocab, 40), torch.full((9, vocab + 3), 7.0)
    weight, out = wide[:, :33], room[:7, :vocab]
    assert products_into(out, hidden, weight).data_ptr() == out.data_ptr()
    torch.testing.assert_close(out.double(), hidden.double() @ weight.double().T, rtol=1e-5, atol=1e-5)
    assert (room[7:] == 7.0).all() and (room[:, vocab:] == 7.0).all()


def test_options_belong_to_members_of_the_table() -> None:
    assert set(OPTIONS) <= set(LOSSES)
    for name, grid in OPTIONS.items():
        for options in grid:
            function = build_losses(LossConfig(name=name, **options))[0].function
            assert {key: getattr(function, key) for key in options} == options
