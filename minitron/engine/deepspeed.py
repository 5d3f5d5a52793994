"""DeepSpeed ZeRO, stages 0 to 3. The only file that imports deepspeed, and only once an engine is made.

ZeRO keeps this rank's float32 master weights as one flat tensor for each parameter group, and the optimiser's moments beside it. Those tensors
are the whole training state of stages 1 to 3, so checkpoints hold them bare instead of DeepSpeed's own pickled files.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from minitron import dist
from minitron.core.share import Share
from minitron.engine.compiling import compile_blocks
from minitron.engine.frozen import gathered, place_frozen
from minitron.engine.lazy import LazyWeights, parts_of
from minitron.engine.optimizer import set_learning_rate, skip_if
from minitron.engine.optimizers import OptimizerConfig, build_optimizer
from minitron.engine.shares import Piece, flat_shares, pack_flat, shares_of, unpack_flat, zero_pieces
from minitron.engine.state import full_tensors, pack, unpack
from minitron.errors import ConfigError
from minitron.log import get_logger

if TYPE_CHECKING:
    from minitron.engine import EngineConfig

logger = get_logger(__name__)

#: Where ZeRO-1/2, bf16 ZeRO-1 (which has an optimiser class of its own) and ZeRO-3 keep their flat float32 masters.
_MASTERS = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")


class DeepSpeedEngine:
    """ZeRO with float32 masters, float32 gradient accumulation and reduction, and minitron's own optimisers."""

    name = "deepspeed"

    def __init__(self, config: EngineConfig, *, optimizer: OptimizerConfig, compute_dtype: torch.dtype) -> None:
        if config.zero_stage == 0 and compute_dtype == torch.bfloat16:
            raise ConfigError(
                "engine.zero_stage=0 with precision=bf16 trains differently from every other engine, because DeepSpeed then takes a step of "
                "its own on empty gradients: use engine.zero_stage=1 or higher, or training.precision=float32"
            )
        self.compute_dtype = compute_dtype
        self._optimizer_config = optimizer
        self._config, self._stage = config, config.zero_stage
        self._deepspeed = _import_deepspeed()
        dist.init_single()

    def prepare(self, root: nn.Module, *, blocks: list[nn.Module]) -> Callable[..., dict[str, torch.Tensor]]:
        """Hand the root to DeepSpeed, which shards parameter by parameter; weights that still lie in files are read block by block."""
        self._root = root.float()
        self._num_parameters = sum(parameter.numel() for parameter in root.parameters())
        if self._config.compile:
            compile_blocks(blocks)
        bf16 = self.compute_dtype == torch.bfloat16
        originals = {name: p.data for name, p in root.named_parameters() if not p.is_meta} if bf16 else {}
        weights = LazyWeights(root)
        if weights:
            self._read(weights, blocks)
        optimizer = build_optimizer(root, self._optimizer_config)
        self._engine = self._initialize(root, optimizer=optimizer)
        self._base_optimizer = optimizer
        if bf16:
            self._set_masters(originals, weights)
        weights.close()
        return self._engine  # type: ignore[no-any-return]

    def prepare_frozen(self, teacher: nn.Module, *, blocks: list[nn.Module], placement: str) -> Callable[..., tuple[torch.Tensor, ...]]:
        """The teacher by its own placement, in its own dtype; a sharded one is FSDP2's and no business of DeepSpeed's."""
        placed = place_frozen(teacher, blocks=blocks, placement=placement)
        if self._config.compile:
            compile_blocks(blocks)
        return placed

    def backward(self, loss: torch.Tensor, *, boundary: bool) -> None:
        """Reduce at the boundary. DeepSpeed averages over ranks, so the loss is multiplied by their number."""
        self._engine.set_gradient_accumulation_boundary(boundary)
        self._engine.backward(loss * dist.world_size(), scale_wrt_gas=False)

    def step(self, learning_rate: float) -> torch.Tensor:
        """Clip by the global norm, update, clear. An update that DeepSpeed skips because of inf or NaN reports a norm of NaN."""
        set_learning_rate(self._base_optimizer, learning_rate)
        norm: Any = None
        if self._stage == 0:  # DeepSpeed clips here too, but keeps the norm to itself
            norm = nn.utils.get_total_norm([p.grad for p in self._root.parameters() if p.grad is not None])
            skip_if(self._base_optimizer, ~torch.isfinite(norm))
        self._engine.step()
        if self._stage > 0:
            norm = float("nan") if getattr(self._engine.optimizer, "overflow", False) else self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=dist.device()).detach()

    def blame(self) -> str:
        """ZeRO keeps no norms of single parameters."""
        return ""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """This rank's runs of numbers of every parameter and of its moments, which ZeRO keeps in flat tensors."""
        if self._stage == 0:
            return pack(self._root, self._base_optimizer)
        return pack_flat(self._pieces(), self._masters(), self._base_optimizer)

    def shares(self) -> dict[str, Share]:
        """Which numbers of every entry lie here."""
        if self._stage == 0:
            return shares_of(self._root, self._base_optimizer)
        return flat_shares(self._pieces(), self._masters(), self._base_optimizer)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Put masters and moments back, and the compute weights that follow from the masters."""
        if self._stage == 0:
            unpack(self._root, self._base_optimizer, state)
            return
        unpack_flat(self._pieces(), self._masters(), self._base_optimizer, state)
        self._refresh_weights()

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole masters, one gathered at a time."""
        if self._stage == 0:
            yield from full_tensors(self._root)
            return
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self._root.named_parameters():
            yield name, safe_get_full_fp32_param(parameter).detach().float().cpu().view(getattr(parameter, "ds_shape", parameter.shape))

    @contextmanager
    def gathered(self, parameters: Iterable[nn.Parameter]) -> Iterator[list[torch.Tensor]]:
        """Parameters whole for the length of the context: the teacher's, which FSDP may have sharded, or the student's, which ZeRO-3 has."""
        held = list(parameters)
        with self._deepspeed.zero.GatheredParameters([p for p in held if hasattr(p, "ds_id")]), gathered(held) as whole:
            yield whole

    def _read(self, weights: LazyWeights, blocks: list[nn.Module]) -> None:
        """Read what lies in files, in the compute dtype. In stage 3 one part after another is read by rank 0, sent to all and sharded."""
        device = dist.device()
        if self._stage < 3:
            weights.fill(device=device, dtype=self.compute_dtype)
            return
        for parameter in self._root.parameters():
            if not parameter.is_meta:
                parameter.data = parameter.data.to(self.compute_dtype)
        self._deepspeed.init_distributed()
        for part in parts_of(self._root, blocks):
            weights.fill(part, device=device, dtype=self.compute_dtype, read=dist.is_main())
            self._deepspeed.zero.Init(module=part, config_dict_or_path=self._settings())
        for buffer in self._root.buffers():
            buffer.data = buffer.data.to(device)

    def _settings(self) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        memory = {"device": "cpu", "pin_memory": dist.device().type == "cuda"}
        offload = {"offload_optimizer": memory} if self._config.offload != "none" else {}
        if self._config.offload == "parameters":
            offload["offload_param"] = memory
        bucket = min(5 * 10**8, self._num_parameters)  # DeepSpeed's own size, of which stage 3 takes two gigabytes whatever the model
        return {
            "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own throughput lines, which are off
            "gradient_accumulation_steps": 1,  # the loop owns accumulation
            "gradient_clipping": self._optimizer_config.gradient_clipping,  # left out, DeepSpeed clips at 1.0
            "steps_per_print": 10**9,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # its own CPU optimiser is compiled on first use; ours is fused too
            "bf16": {"enabled": self.compute_dtype == torch.bfloat16},
            "data_types": {"grad_accum_dtype": "fp32"},  # sums over micro-batches and ranks lose bits in bf16
            "communication_data_type": "fp32",
            "zero_optimization": {"stage": self._stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": bucket, **offload},
        }

    def _initialize(self, module: nn.Module, *, optimizer: torch.optim.Optimizer) -> Any:
        with redirect_stdout(io.StringIO()) as chatter:  # some of its optimisers print their memory use
            engine = self._deepspeed.initialize(model=module, optimizer=optimizer, config=self._settings())[0]
        logger.debug("DeepSpeed says: %s", chatter.getvalue())
        return engine

    def _masters(self) -> list[torch.Tensor]:
        """This rank's flat float32 weights, one tensor for each of ZeRO's parameter groups."""
        zero = self._engine.optimizer
        return list(next(getattr(zero, name) for name in _MASTERS if hasattr(zero, name)))

    def _pieces(self) -> dict[str, Piece]:
        return zero_pieces(self._root, self._engine.optimizer, stage=self._stage)

    def _set_masters(self, originals: dict[str, torch.Tensor], weights: LazyWeights) -> None:
        """DeepSpeed makes masters out of weights that are rounded to bf16; put back what was rounded away, from memory or from the files."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        for name, parameter in self._root.named_parameters():
            known = originals.pop(name, None)
            if self._stage < 3:
                whole = known if known is not None else weights.read(name).float()
                safe_set_full_fp32_param(parameter, whole.to(dist.device()))
                continue
            # ZeRO-3's own setter of whole tensors fails where the ranks do not divide a parameter, which is then padded.
            size: int = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            first, last = dist.rank() * size, (dist.rank() + 1) * size
            mine = known.flatten()[first:last] if known is not None else weights.read_flat(name, parameter.ds_shape, first, last)  # type: ignore[attr-defined]
            safe_set_local_fp32_param(parameter, nn.functional.pad(mine.float(), (0, size - mine.numel())).to(dist.device()))

    @torch.no_grad()
    def _refresh_weights(self) -> None:
        """Round this rank's masters into the compute weights and, below stage 3, gather them from all ranks."""
        zero = self._engine.optimizer
        if self._stage < 3:
            zero.update_lp_params()
            return
        # Loading ZeRO-3's own state into itself copies masters onto themselves and then refreshes the weights.
        zero.load_state_dict([zero.state_dict()] * dist.world_size(), load_optimizer_states=False)


def _import_deepspeed() -> Any:
    """DeepSpeed, told about the machine first."""
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if on_cpu:  # the shared-memory op serves inference only; building it takes half a minute and a compiler
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
