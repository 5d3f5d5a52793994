"""Linear layers whose weight is stored sparse and multiplied as it is: fewer bytes move, and bytes are what decoding a few rows waits for.

``kernels/sparse_matmul`` expands the weight on the way to the multipliers. That pays for few rows of x; for many, a dense product does, on a
weight that is unpacked for the purpose. Which one runs is measured once a machine (:mod:`minitron.ops.crossover`).
``$MINITRON_SPARSE_MATMUL`` forces ``packed`` or ``dense``; ``auto`` is the default; a layer reads it when it first sees so many rows. For inference:
nothing here has a gradient.
"""

from __future__ import annotations

import os

import torch
from torch import nn

from minitron.errors import ConfigError, MinitronError, nearest
from minitron.log import get_logger
from minitron.ops import sparse_rows as on_cpu
from minitron.ops import sparse_tiles as on_gpu
from minitron.ops.bitmap import BitmapWeight, check_bitmap, pack_bitmap
from minitron.ops.crossover import times_of
from minitron.ops.sparse_rows import say, sparse_rows, takes, unpack_rows

logger = get_logger(__name__)

SWITCH = "MINITRON_SPARSE_MATMUL"
CHOICES = ("auto", "packed", "dense")
#: Steps in which shares of kept weights are told apart when times are measured, in percent.
_STEP = 5


def wanted() -> str:
    """What the environment asks for, one of :data:`CHOICES`.

    Raises:
        ConfigError: something else.
    """
    found = os.environ.get(SWITCH, "auto")
    if found not in CHOICES:
        raise ConfigError(f"{SWITCH}={found} is unknown; {nearest(found, list(CHOICES))}")
    return found


def packed_obstacle(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why no kernel takes a sparse weight of this kind, in words."""
    if device.type == "cuda":
        return on_gpu.obstacle(shape, dtype, device)
    if device.type != "cpu" or not takes(dtype):
        return f"there is no kernel for {dtype} on {device.type}"
    return on_cpu.obstacle()


@torch.compiler.assume_constant_result
def packed_wins(shape: tuple[int, int], density: float, dtype: torch.dtype, device: torch.device, num_rows: int, *, dense_at_hand: bool) -> bool:
    """Whether so many rows of x are multiplied packed: by the environment, else by what was measured; why not is said once.

    Raises:
        ConfigError: the environment asks for what does not exist or cannot be.
    """
    choice = wanted()
    if choice == "dense":
        return False
    reason = packed_obstacle(shape, dtype, device)
    if reason is not None and choice == "packed":
        raise ConfigError(f"{SWITCH}=packed cannot be: {reason}; use {SWITCH}=auto")
    if reason is not None:
        say(f"sparse products run dense, since {reason}")
        return False
    if choice == "packed":
        return True
    if device.type == "cuda" and num_rows > on_gpu.MOST_ROWS:
        return False
    percent = min(100, max(_STEP, _STEP * round(100 * density / _STEP)))
    times = times_of(shape[0], shape[1], percent, dtype, str(device), torch.get_num_threads())
    return times.packed_wins(num_rows, dense_at_hand=dense_at_hand)


class SparseLinear(nn.Module):
    """``nn.Linear`` for inference with a sparse weight: packed where that is faster for so many rows of x, else dense.

    The weight is a bitmap until the layer first sees a GPU, where it becomes tiles. With ``keep_dense`` a dense copy stays beside it and
    is never slower than ``nn.Linear``; without one, dense products begin with unpacking, which long prompts pay once a forward.
    """

    bitmap: torch.Tensor | None
    row_starts: torch.Tensor | None
    values: torch.Tensor
    header: torch.Tensor
    starts: torch.Tensor
    bias: torch.Tensor | None
    dense: torch.Tensor | None

    def __init__(self, packed: BitmapWeight, bias: torch.Tensor | None = None, *, keep_dense: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.density, self.max_values = packed.density, 0
        for name, tensor in (("bitmap", packed.bitmap), ("values", packed.values), ("row_starts", packed.row_starts)):
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("dense", unpack_rows(packed) if keep_dense else None, persistent=False)
        self._choices: dict[tuple[object, ...], bool] = {}

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, keep_dense: bool = False) -> SparseLinear:
        """Pack a linear layer's weight as it is: its zeros are what is left out."""
        return cls(pack_bitmap(linear.weight), linear.bias, keep_dense=keep_dense)

    @classmethod
    def from_bitmap(cls, packed: BitmapWeight, bias: torch.Tensor | None = None, *, keep_dense: bool = False) -> SparseLinear:
        """A layer of a packed weight from elsewhere.

        Raises:
            CheckpointError: its parts do not agree.
        """
        check_bitmap(packed)
        return cls(packed, bias, keep_dense=keep_dense)

    def extra_repr(self) -> str:
        """As ``nn.Linear``, with the share of zeros."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, zeros={1 - self.density:.1%}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] to [..., out_features].

        Raises:
            MinitronError: a gradient would be lost, or x has another number of columns.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise MinitronError("a packed sparse weight is for inference: run it under torch.no_grad(), or train the dense weight under its mask")
        if x.shape[-1] != self.in_features:  # the op cannot tell: a bitmap is as long for 17 columns as for 24
            raise MinitronError(f"x of shape {list(x.shape)} for a sparse weight of {self.out_features} x {self.in_features}")
        num = x.numel() // max(self.in_features, 1)
        if not num or not self._packed(num, x):
            return nn.functional.linear(x, self.weight, self.bias)
        if x.is_cuda:
            return self._on_gpu(x)
        parts = self._buffers  # looking up attributes of a module takes as long as a small product
        product: torch.Tensor = sparse_rows(x, parts["bitmap"], parts["values"], parts["row_starts"], parts["bias"])
        return product

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight [out_features, in_features]: the copy at hand, else unpacked for the caller."""
        if self.dense is not None:
            return self.dense
        return unpack_rows(self.packed()) if self.bitmap is not None else on_gpu.untile(self.tiled())

    def packed(self) -> BitmapWeight:
        """The weight as a bitmap; not after it has become tiles."""
        assert self.bitmap is not None and self.row_starts is not None, "the weight has become tiles"
        return BitmapWeight(self.bitmap, self.values, self.row_starts, (self.out_features, self.in_features))

    def tiled(self) -> on_gpu.TiledWeight:
        """The weight as tiles, after it has become them."""
        return on_gpu.TiledWeight(self.header, self.values, self.starts, self.max_values, (self.out_features, self.in_features))

    def _packed(self, num: int, x: torch.Tensor) -> bool:
        shape, at_hand = (self.out_features, self.in_features), self._buffers["dense"] is not None
        if torch.compiler.is_compiling():
            return packed_wins(shape, self.density, x.dtype, x.device, num, dense_at_hand=at_hand)
        known = self._choices.get((num, x.dtype, x.device))
        if known is None:
            known = packed_wins(shape, self.density, x.dtype, x.device, num, dense_at_hand=at_hand)
            self._choices[num, x.dtype, x.device] = known
        return known

    def _on_gpu(self, x: torch.Tensor) -> torch.Tensor:
        if self.bitmap is not None:
            tiled = on_gpu.tile_bitmap(self.packed())
            self.register_buffer("header", tiled.header)
            self.register_buffer("starts", tiled.starts)
            self.bitmap = self.row_starts = None
            self.values, self.max_values = tiled.values, tiled.max_values
        rows = x.reshape(-1, self.in_features).split(on_gpu.MOST_ROWS)
        products = [on_gpu.sparse_tiles(part, self.header, self.values, self.starts, self.max_values, self.out_features, self.bias) for part in rows]
        return (products[0] if len(products) == 1 else torch.cat(products)).view(*x.shape[:-1], self.out_features)


def use_sparse_linears(model: nn.Module, *, keep_dense: bool = False) -> int:
    """Replace the linear layers of a sparse model, in place, where one row of x is multiplied faster packed; how many were replaced.

    Layers without zeros, and weights that several modules share, stay. What was done is said in one line.
    """
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    replaced, before, after = 0, 0, 0
    for name, linear in linears:
        weight = linear.weight
        density = float(weight.count_nonzero()) / max(weight.numel(), 1) if weight.device.type != "meta" else 1.0
        shape = (weight.shape[0], weight.shape[1])
        if density == 1.0 or users[id(weight)] > 1 or not packed_wins(shape, density, weight.dtype, weight.device, 1, dense_at_hand=True):
            continue
        sparse = SparseLinear.from_linear(linear, keep_dense=keep_dense).train(linear.training)
        model.set_submodule(name, sparse)
        replaced, before, after = replaced + 1, before + weight.nbytes, after + sparse.packed().num_bytes
    kept = " beside their dense copies" if keep_dense else ""
    megabytes = f", {after / 1e6:.0f} MB of weights for {before / 1e6:.0f}" if replaced else ""
    logger.info("sparse products: %d of %d linear layers packed%s%s, the others stay dense", replaced, len(linears), megabytes, kept)
    return replaced
