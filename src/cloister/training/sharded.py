"""Frozen layers that are too large for one device, parted between the processes of a team (FSDP2, `fully_shard`).

Each process holds an equal part of every frozen weight and gathers a layer's whole weights just before it uses them,
once forward and once backward. What is trained stays whole in every process, as do embedding, final norm and head: so
gradients, optimiser and checkpoints are those of unparted training, and a checkpoint fits any number of processes.
All processes must make the same number of passes (`Joined(even=True)`).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cloister.model.cut import Whole

ROOM = 0.8
"""Share of a device's free memory that weights may take; the rest is for activations."""


def fits(weight_bytes: int, device: torch.device) -> bool:
    """Whether a whole model can be held by one device. A processor's memory is not asked: it is shared anyway."""
    return device.type != "cuda" or weight_bytes <= ROOM * torch.cuda.mem_get_info(device)[0]


def part(half: Whole, adapted: PeftModel, device: torch.device) -> None:
    """Keep this process's part of each frozen layer on `device`, and all that is not in a layer whole.

    The model may be on the processor before: layers are moved one after the other.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    trained = {p for p in adapted.parameters() if p.requires_grad}
    layers = [layer for layer in half.anatomy.layers(half.model) if any(True for _ in layer.parameters())]
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params={p for p in layer.parameters() if p in trained})
    trunk = half.anatomy.trunk(half.model)
    inside = {p for layer in layers for p in layer.parameters()}
    # The trunk is what is called first: as the root it lets each layer's weights be gathered ahead.
    fully_shard(trunk, mesh=mesh, ignored_params={p for p in trunk.parameters() if p not in inside or p in trained})
    for value in (*half.model.parameters(), *half.model.buffers()):
        if not isinstance(value, DTensor) and value.device != device:
            value.data = value.data.to(device)
    half.device = device
