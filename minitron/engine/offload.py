"""A frozen model that lies in CPU memory and visits the device one block at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from minitron import dist


def offload_blocks(model: nn.Module, blocks: list[nn.Module]) -> nn.Module:
    """Keep the blocks' weights on the CPU and bring each one over for the length of its forward.

    What is outside the blocks (embedding, final norm, head) moves to the device for good. On a CPU this changes nothing.
    """
    device = dist.device()
    if device.type == "cpu":
        return model
    inside = {id(p) for block in blocks for p in block.parameters()}
    for parameter in model.parameters():
        if id(parameter) in inside:
            parameter.data = parameter.data.cpu().pin_memory()
        else:
            parameter.data = parameter.data.to(device)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    for block in blocks:
        home = {parameter: parameter.data for parameter in block.parameters()}

        def bring(module: nn.Module, args: Any, home: dict[nn.Parameter, torch.Tensor] = home) -> None:
            for parameter, data in home.items():
                parameter.data = data.to(device, non_blocking=True)

        def release(module: nn.Module, args: Any, output: Any, home: dict[nn.Parameter, torch.Tensor] = home) -> None:
            for parameter, data in home.items():
                parameter.data = data

        block.register_forward_pre_hook(bring)
        block.register_forward_hook(release)
    return model
