"""What a training holds on each rank, by part, in bytes. Pure functions of shapes and of how models lie on the ranks.

Activations are what autograd keeps, counted module by module as the Hugging Face decoders are written:

- RMS norm: computes in float32, so it keeps its input (a float32 copy of it in bf16), the normalised values and one number a token (a few families
  cast back later, as olmo2, and keep 2 bytes a value more in bf16). A fused layer norm keeps its input and two numbers.
- Matrix product: its input. Products that read the same input share it, except under autocast, which casts it anew for each.
- Attention (SDPA or FlashAttention): query, key and value as rotated, its result, which is the output projection's input, and the log-sum-exp of
  every head. No [sequence, sequence] tensor, and rotation keeps nothing. Masks of packed documents are left out.
- Gated MLP: the gate before and after the activation, the other branch, and the product of both, which is the last matrix's input.
- Experts: the same for each of a token's experts, with the copy of the token that each of them reads.
- Residual additions keep nothing.

With full activation checkpointing every block keeps its input, and one block at a time holds all of the above while it is recomputed. The selective
one keeps the results of products and attention besides, and recomputes the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from minitron.core.architecture import Architecture
from minitron.core.axes import ParameterSpec

#: Float32 tensors [chunk, vocabulary] that are alive at once in a divergence written in torch: both logits, both log-softmaxes, and the
#: probabilities that become the gradient; with several losses the sum so far. A compiled kernel writes the gradient over the logits.
_CHUNK_TENSORS, _FUSED_TENSORS = 5, 2
#: DeepSpeed's defaults, in elements: a bucket of gradients to reduce, and gathered parameters kept alive under ZeRO-3.
_BUCKET, _GATHERED = 5e8, 1e9


@dataclass(frozen=True)
class Setup:
    """How a training lies on its ranks, and what one micro-batch is.

    ``shard_size`` ranks share one copy of the student and ``teacher_size`` one copy of every teacher (1: each rank has its own), out of
    ``world_size`` ranks, ``node_size`` of them on a node. ``width`` and ``teacher_width`` are bytes of a number that student and teacher compute in.
    ``chunk_rows`` rows go through the heads at a time, in float32 where ``wide_heads`` (on CPUs that do not multiply bf16), and through a compiled
    kernel where ``fused``.
    """

    engine: str = "local"
    zero_stage: int = 2
    world_size: int = 1
    node_size: int = 1
    shard_size: int = 1
    teacher_size: int = 1
    placement: str = "replicate"
    offload: str = "none"
    width: int = 4
    teacher_width: int = 4
    checkpointing: str = "none"
    num_sequences: int = 1
    sequence_length: int = 1
    num_micro_batches: int = 1
    chunk_rows: int = 1024
    num_moments: int = 2
    num_losses: int = 1
    wide_heads: bool = False
    fused: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.num_sequences * self.sequence_length

    @property
    def autocast(self) -> bool:
        """Whether the student's weights and residual stream are float32 and cast for every product: the local engine in bf16."""
        return self.engine == "local" and self.width == 2

    @property
    def sharded(self) -> bool:
        """Whether the student's weights are gathered block by block."""
        return self.engine == "fsdp" or (self.engine == "deepspeed" and self.zero_stage == 3)


@dataclass(frozen=True)
class StateSizes:
    """What losses on intermediate states hold of a micro-batch: states of both models, what is kept for the backward pass, what comes on top for a
    moment, maps that do not change, and the number of trained parameters."""

    teacher_bytes: int = 0
    student_bytes: int = 0
    kept_bytes: int = 0
    extra_bytes: int = 0
    fixed_bytes: int = 0
    num_parameters: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes on each rank: ``parts`` on the device, ``host`` in CPU memory, and ``moments``, what is alive at once at the fullest of them."""

    parts: dict[str, float]
    moments: dict[str, float]
    host: dict[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        """The most that is alive on the device at once."""
        return max(self.moments.values())


def activation_bytes(shape: Architecture, setup: Setup) -> tuple[float, float]:
    """Bytes that autograd keeps of a micro-batch, from embedding to final norm, and those that come on top in the backward pass of a block."""
    assert shape.layout is not None
    kept = shape.kept_layers if shape.kept_layers is not None else range(shape.num_layers)
    layers = [_layer_bytes(shape.layout.by_layer[layer % shape.layout.num_layers], shape, setup) for layer in kept]
    stream = (4 if setup.autocast else setup.width) * shape.hidden_size
    fused = sum(spec.layer is None and len(spec.dims) == 1 and "hidden" in spec.axes() for spec in shape.layout.parameters) > 1
    ends = setup.tokens * (2 * 8 + _norm_bytes(shape.hidden_size, setup, fused=fused) + stream)  # ids and labels, final norm, what it hands over
    if setup.checkpointing == "none":
        return sum(layers) + ends, 0.0
    inputs = setup.tokens * stream * len(layers) + ends
    if setup.checkpointing == "full":
        return inputs, max(layers)
    products = [_product_bytes(shape.layout.by_layer[layer % shape.layout.num_layers], shape, setup) for layer in kept]
    return inputs + sum(every for every, _ in products), max(whole - used for whole, (_, used) in zip(layers, products, strict=True))


def _product_bytes(specs: Sequence[ParameterSpec], shape: Architecture, setup: Setup) -> tuple[float, float]:
    """Bytes of the results of one layer's products and attention, and of those of them that autograd keeps anyway: values, attention, branches."""
    axes = {axis for spec in specs for axis in spec.axes()}
    every = used = 0.0
    for spec in specs:
        if len(spec.dims) == 2 and spec.expert is None:
            every += setup.width * spec.shape(shape.size)[0]
    if "head" in axes:
        every += setup.width * shape.num_heads * shape.head_dim + 4 * shape.num_heads
        used += setup.width * (shape.num_heads + shape.num_kv_heads) * shape.head_dim + 4 * shape.num_heads
    for axis in ("ffn", "shared_ffn"):
        if axis in axes:
            used += setup.width * (2 if _gated(specs, axis, shape) else 1) * shape.size(axis)
    if "expert" in axes:
        branches = (2 if _gated(specs, "expert_ffn", shape) else 1) * shape.expert_ffn_size
        every += setup.width * shape.num_experts_per_token * (branches + shape.hidden_size)
        used += setup.width * shape.num_experts_per_token * branches
    return setup.tokens * every, setup.tokens * used


def _layer_bytes(specs: Sequence[ParameterSpec], shape: Architecture, setup: Setup) -> float:
    """Bytes that autograd keeps of one layer."""
    width, tokens, hidden = setup.width, setup.tokens, shape.hidden_size
    axes = {axis for spec in specs for axis in spec.axes()}
    matrices = {spec.module for spec in specs if len(spec.dims) > 1}
    vectors: dict[str, list[ParameterSpec]] = {}
    for spec in specs:
        if len(spec.dims) == 1 and spec.module not in matrices and not spec.buffer:
            vectors.setdefault(spec.module, []).append(spec)
    per_token, num_stream_norms, num_head_norms = 0.0, 0, 0
    heads, kv_heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    for norm in vectors.values():
        size = norm[0].shape(shape.size)[0]
        if "hidden" in norm[0].axes():
            num_stream_norms += 1
        elif not norm[0].axes():  # over each head by itself; query's and key's come in pairs
            size = kv_heads if num_head_norms % 2 else heads
            num_head_norms += 1
        per_token += _norm_bytes(size, setup, fused=len(norm) > 1)
    readers = [spec for spec in specs if len(spec.dims) == 2 and spec.expert is None and "hidden" in {s.axis for s in spec.dims[1]}]
    # A norm before the matrices hands its output to them; norms beyond two follow attention and MLP, and additions keep nothing.
    per_token += width * hidden * (len(readers) if setup.autocast else min(num_stream_norms, 2))
    if "head" in axes:
        per_token += width * (2 * heads + 2 * kv_heads) + 4 * shape.num_heads
        projections = [spec for spec in specs if len(spec.dims) == 2 and {"head", "kv_head"} & {s.axis for s in spec.dims[0]}]
        if len(projections) == 1:  # of a joined projection the values are a view, and keep all of it alive
            per_token += width * (heads + kv_heads)
    for axis in ("ffn", "shared_ffn"):
        if axis in axes:
            per_token += width * (4 if _gated(specs, axis, shape) else 2) * shape.size(axis)
    if "expert" in axes:
        one = (4 if _gated(specs, "expert_ffn", shape) else 2) * shape.expert_ffn_size
        per_token += width * shape.num_experts_per_token * (one + 2 * hidden) + 2 * 4 * shape.num_experts
    return tokens * per_token


def _norm_bytes(size: int, setup: Setup, *, fused: bool = False) -> float:
    """Bytes a token that a norm over ``size`` values keeps, without its output."""
    if fused:
        return (4 if setup.autocast else setup.width) * size + 8
    return 4 * size + (4 if setup.autocast else setup.width) * size + 4


def _gated(specs: Sequence[ParameterSpec], axis: str, shape: Architecture) -> bool:
    """Whether the rows that lead into an axis are twice its size: a gate and the branch that it multiplies."""
    found = 0
    for spec in specs:
        if spec.expert not in (None, 0) or len(spec.dims) < 2:
            continue
        rows = spec.dims[-1] if len(spec.dims) == 3 else spec.dims[0]
        other = spec.dims[-2] if len(spec.dims) == 3 else spec.dims[1]
        both = [sum(s.size(shape.size) for s in dim if s.axis == axis) for dim in (rows, other)]
        found += max(both)
    return found >= 3 * shape.size(axis)  # gate, branch and way back


def student_bytes(shape: Architecture, setup: Setup, *, extra: int = 0) -> tuple[dict[str, float], dict[str, float]]:
    """Weights, masters, gradients and moments of the student (and ``extra`` trained numbers) that stay over a step: on the device, on the host."""
    count = shape.num_parameters + extra
    share = count / setup.shard_size if setup.engine != "local" else count
    device = {"student weights": 4.0 * share, "gradients": 4.0 * share, "optimizer": 4.0 * setup.num_moments * share}
    if setup.engine == "deepspeed":
        stage, world = setup.zero_stage, setup.world_size
        device["student weights"] = setup.width * count / (world if stage == 3 else 1) if stage else 4.0 * count
        device["gradients"] = 4.0 * count / (world if stage >= 2 else 1) + (4.0 * min(count, _BUCKET) if stage else 0.0)
        device["optimizer"] = 4.0 * setup.num_moments * count / (world if stage else 1)
        if stage:
            device["master weights"] = 4.0 * count / world
    moved = {"none": (), "optimizer": ("optimizer", "master weights"), "parameters": tuple(device)}[setup.offload]
    host = {name: device.pop(name) for name in moved if name in device}
    return device, host


def gathered_bytes(shape: Architecture, setup: Setup) -> tuple[float, float]:
    """Whole student weights beside the shards: those kept from a micro-batch's forward to the end of its backward, and those of one block."""
    if not setup.sharded:
        return (2.0 * shape.num_non_embedding_parameters if setup.autocast else 0.0), 0.0  # autocast's copies, kept for the backward pass
    if setup.engine == "deepspeed":
        return setup.width * min(shape.num_parameters, _GATHERED), 0.0
    return float(setup.width * shape.num_embedding_parameters), setup.width * shape.num_non_embedding_parameters / shape.num_layers


def teacher_bytes(shape: Architecture, setup: Setup) -> tuple[float, float, float]:
    """Bytes of a teacher that stay on the device, those of one of its blocks where blocks come and go, and those in CPU memory."""
    size = float(setup.teacher_width * shape.num_parameters)
    outside = float(setup.teacher_width * shape.num_embedding_parameters)
    block = (size - outside) / shape.num_layers
    if setup.placement == "cached":
        return 0.0, 0.0, 0.0
    if setup.placement == "offload":
        return outside + 2.0 * block, 0.0, size - outside  # two slots, held for good
    if setup.placement == "shard":
        return size / setup.teacher_size, block, 0.0
    return size, 0.0, 0.0


def loss_bytes(student: Architecture, teachers: Sequence[Architecture], setup: Setup) -> tuple[float, float, float]:
    """Of the losses on logits: what their gradients hold until the backward pass, what a chunk takes on top, and whole heads of teachers."""
    vocab, hidden = student.vocab_size, student.hidden_size
    kept = (4 if setup.autocast else setup.width) * setup.tokens * hidden + 4.0 * vocab * hidden
    tensors = _FUSED_TENSORS if setup.fused else _CHUNK_TENSORS + (setup.num_losses > 1)
    rows = min(setup.chunk_rows, setup.tokens)
    chunk = 4.0 * tensors * rows * vocab
    if setup.width == 2:  # copies of the student's head for the products with hidden states and with gradients, and the gradient's own
        chunk += 2.0 * vocab * hidden * (setup.wide_heads or setup.autocast)
        chunk += (0.0 if setup.autocast else 4.0 * vocab * hidden) if setup.wide_heads else 0.0
        chunk += 2.0 * rows * vocab * setup.fused
    heads = 0.0
    for teacher in teachers:
        size = vocab * teacher.hidden_size
        if setup.placement == "shard" and setup.teacher_size > 1:
            heads += float(setup.teacher_width * size)
        if setup.teacher_width == 2 and setup.wide_heads and setup.placement != "cached":
            chunk += 4.0 * size
    return kept, chunk, heads


def training_memory(student: Architecture, teachers: Sequence[Architecture], setup: Setup, states: StateSizes | None = None) -> Memory:
    """Everything by part, and what is alive at once while the teacher runs, in the losses, and when the backward pass begins and ends."""
    states = states or StateSizes()
    static, host = student_bytes(student, setup, extra=states.num_parameters)
    held, block = gathered_bytes(student, setup)
    activations, recomputed = activation_bytes(student, setup)
    kept, chunk, heads = loss_bytes(student, teachers, setup)
    placed = [teacher_bytes(teacher, setup) for teacher in teachers]
    theirs, their_blocks = sum(row[0] for row in placed), max((2 * row[1] for row in placed), default=0.0)
    said = states.teacher_bytes + sum(float(setup.tokens * setup.teacher_width * teacher.hidden_size) for teacher in teachers)
    parts = {
        **static,
        "gathered weights": held + 2 * block,
        "teacher": theirs,
        "gathered teacher": their_blocks,
        "teacher's states": said + heads,
        "activations": activations + recomputed,
        "loss": kept + chunk,
        "losses on states": float(states.student_bytes + states.kept_bytes + states.extra_bytes + states.fixed_bytes),
    }
    if any(row[2] for row in placed):
        host["teacher"] = sum(row[2] for row in placed)
    gradients = static.get("gradients", 0.0)
    always = sum(static.values()) - gradients + theirs + states.fixed_bytes
    before = gradients if setup.num_micro_batches > 1 or setup.engine == "deepspeed" else 0.0
    # The last buffer that blocks were gathered into stays until the next one is.
    forward = always + before + held + block + their_blocks / 2 + activations + said + states.student_bytes
    # FSDP reduces the gradients of embedding and head last: whole in the compute dtype, and once more in float32 to be sent.
    whole = (setup.width + 4.0) * student.num_embedding_parameters if setup.engine == "fsdp" else 0.0
    moments = {
        "teacher": always + before + their_blocks + max((_working_bytes(teacher, setup) for teacher in teachers), default=0.0),
        "loss": forward + heads + kept + max(chunk, states.kept_bytes + states.extra_bytes),
        "start of backward": forward + block + states.kept_bytes + 2 * kept + recomputed,
        "end of backward": always + gradients + held + whole,
    }
    return Memory({name: size for name, size in parts.items() if size}, moments, host)


def _working_bytes(teacher: Architecture, setup: Setup) -> float:
    """What one of the teacher's layers has alive in its forward: the stream, a norm's float32 copy and output, and the MLP's branches."""
    if setup.placement == "cached":
        return 0.0
    ffn = max(teacher.ffn_size, teacher.num_experts_per_token * teacher.expert_ffn_size)
    return float(setup.tokens * (setup.teacher_width * (2 * teacher.hidden_size + 3 * ffn) + 4 * teacher.hidden_size))
