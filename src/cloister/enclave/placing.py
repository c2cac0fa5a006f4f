"""Which device a process of an enclave computes on, and whether it holds whole layers or parts of them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from peft import PeftModel

from cloister.errors import JobError
from cloister.job import Job
from cloister.model.anatomy import pick_device
from cloister.model.cut import Latter
from cloister.training.sharded import fits, part


def own_device(kind: str, dist_rank: int) -> torch.device:
    """The device of process `dist_rank`: one CUDA device each, else the processor, which all share.

    Raises:
        JobError: there are too few devices, or several processes cannot use this kind.
    """
    if kind == "mps":
        raise JobError("several processes cannot train on MPS", where="[enclave] processes", hint='device = "cpu"')
    if kind != "cuda":
        return torch.device(kind)
    if dist_rank >= (there := torch.cuda.device_count()):
        message = f"process {dist_rank} has no CUDA device: this machine has {there}"
        raise JobError(message, where="[enclave] processes", hint="take as many processes as devices, or fewer")
    return torch.device("cuda", dist_rank)


def is_parted(job: Job, model_bytes: int) -> bool:
    """Whether frozen layers are parted between the processes, by `[enclave] sharding` and what fits on a device."""
    section = job.enclave
    if section.processes == 1 or section.sharding == "none" or job.adapter.kind == "spf":
        return False
    return section.sharding == "full" or not fits(model_bytes, torch.device(pick_device(section.device)))


def placing(device: torch.device, *, parted: bool) -> Callable[[Latter, PeftModel], None]:
    """What is done with the latter half once its adapter is there."""
    return functools.partial(part, device=device) if parted else lambda latter, adapted: None
