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
from minitron.engine.offload import offload_blocks
from minitron.engine.optimizer import set_learning_rate
from minitron.engine.optimizers import OptimizerConfig, build_optimizer
from minitron.engine.state import full_tensors, pack, unpack
from minitron.errors import CheckpointError, ConfigError
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
        self._stage = config.zero_stage
        self._deepspeed = _import_deepspeed()
        dist.init_single()

    def prepare(self, root: nn.Module, *, blocks: list[nn.Module]) -> Callable[..., dict[str, torch.Tensor]]:
        """Hand the root to DeepSpeed, which shards parameter by parameter and needs no blocks."""
        self._root = root.float()
        bf16 = self.compute_dtype == torch.bfloat16
        originals = {name: p.data for name, p in root.named_parameters()} if bf16 else {}
        optimizer = build_optimizer(root, self._optimizer_config)
        self._engine = self._initialize(root, stage=self._stage, dtype=self.compute_dtype, optimizer=optimizer)
        self._base_optimizer = optimizer
        self._set_masters(originals)
        return self._engine  # type: ignore[no-any-return]

    def prepare_frozen(self, teacher: nn.Module, *, blocks: list[nn.Module], placement: str) -> Callable[..., tuple[torch.Tensor, ...]]:
        """``shard``: the teacher becomes a ZeRO-3 engine of its own, in its own dtype and without an optimiser."""
        if placement == "offload":
            return offload_blocks(teacher, blocks)
        if placement == "shard":
            dtype = next(teacher.parameters()).dtype
            return self._initialize(teacher, stage=3, dtype=dtype, optimizer=None)  # type: ignore[no-any-return]
        return teacher.to(dist.device())

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
        self._engine.step()
        if self._stage > 0:
            norm = float("nan") if getattr(self._engine.optimizer, "overflow", False) else self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=dist.device()).detach()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """This rank's flat masters and moments by group number; in stage 0, which shards nothing, weights and moments by name."""
        if self._stage == 0:
            return pack(self._root, self._base_optimizer)
        state = {}
        for number, master in enumerate(self._masters()):
            state[f"optimizer/{number}/master"] = master.detach()
            for key, value in self._base_optimizer.state.get(master, {}).items():
                state[f"optimizer/{number}/{key}"] = value.detach() if torch.is_tensor(value) else torch.tensor(value)
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Put masters and moments back, and the compute weights that follow from the masters.

        Raises:
            CheckpointError: a shard is missing or has another length, as after a change of ZeRO stage or number of ranks.
        """
        if self._stage == 0:
            unpack(self._root, self._base_optimizer, state)
            return
        for number, master in enumerate(self._masters()):
            prefix = f"optimizer/{number}/"
            entries = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
            saved = entries.pop("master", None)
            if saved is None or saved.shape != master.shape:
                found = "nothing" if saved is None else f"{saved.numel()} numbers"
                raise CheckpointError(
                    f"the checkpoint holds {found} for parameter group {number}, this run needs {master.numel()}: "
                    "was it made on another number of ranks or with another engine.zero_stage?"
                )
            master.data.copy_(saved)
            if entries:
                self._base_optimizer.state[master] = {key: value.to(master.device, copy=True) for key, value in entries.items()}
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
        """Sharded parameters whole for the length of the context."""
        held = list(parameters)
        with self._deepspeed.zero.GatheredParameters(held):  # does nothing where no parameter is sharded
            yield [p.detach() for p in held]

    def _initialize(self, module: nn.Module, *, stage: int, dtype: torch.dtype, optimizer: torch.optim.Optimizer | None) -> Any:
        config = {
            "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own throughput lines, which are off
            "gradient_accumulation_steps": 1,  # the loop owns accumulation
            "gradient_clipping": self._optimizer_config.gradient_clipping,  # left out, DeepSpeed clips at 1.0
            "steps_per_print": 10**9,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
            "data_types": {"grad_accum_dtype": "fp32"},  # sums over micro-batches and ranks lose bits in bf16
            "communication_data_type": "fp32",
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        }
        if optimizer is None:
            del config["data_types"]
        with redirect_stdout(io.StringIO()) as chatter:  # some of its optimisers print their memory use
            engine = self._deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]
        logger.debug("DeepSpeed says: %s", chatter.getvalue())
        return engine

    def _masters(self) -> list[torch.Tensor]:
        """This rank's flat float32 weights, one tensor for each of ZeRO's parameter groups."""
        zero = self._engine.optimizer
        return list(next(getattr(zero, name) for name in _MASTERS if hasattr(zero, name)))

    def _set_masters(self, originals: dict[str, torch.Tensor]) -> None:
        """DeepSpeed makes masters out of weights it has rounded to bf16; put back what was rounded away."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        for name, parameter in self._root.named_parameters():
            if name not in originals:
                continue
            whole = originals.pop(name).to(dist.device())
            if self._stage < 3:
                safe_set_full_fp32_param(parameter, whole)
                continue
            # ZeRO-3's own setter of whole tensors fails where the ranks do not divide a parameter, which is then padded.
            size: int = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = nn.functional.pad(whole.flatten(), (0, size * dist.world_size() - whole.numel()))
            safe_set_local_fp32_param(parameter, padded[dist.rank() * size : (dist.rank() + 1) * size])

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
