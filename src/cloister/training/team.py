"""Processes that train one adapter together: which of a step's packs each works on, and how the results meet.

Every process of a team holds the whole adapter and its optimiser. It adds up the gradients of its own packs, `total`
adds up those of all processes, and every process applies the same update: what distributed data parallelism does, for
the adapter alone, with one sum per step. Each pack is worked on by one process, so the sum has the terms that one
process would add, in another order: results differ by rounding only, and for a fixed number of processes not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from cloister.errors import RunError


class LostProcessError(RunError):
    """Another process of the team has ended or does not answer; it knows why, this one does not."""


@dataclass(frozen=True)
class Share:
    """What one process does of a list of packs, as places in that list, ascending."""

    own: list[int]
    idle: list[int]
    """To go through without effect, so that all processes make the same number of passes."""


class Team(Protocol):
    """The processes that train together, seen by one of them. All must call the same methods in the same order."""

    def share(self, tokens: Sequence[int]) -> Share:
        """This process's part of packs of so many tokens."""

    def total(self, parameters: Sequence[torch.nn.Parameter], loss: float) -> float:
        """Replace each gradient by the sum over all processes; returns the sum of their losses."""

    def gather(self, rows_KC: Tensor) -> Tensor:
        """The rows of all processes, float64 on the CPU, in the order of the processes."""

    def require_same(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Refuse to go on where the processes hold different values."""


class Alone:
    """A team of one."""

    def share(self, tokens: Sequence[int]) -> Share:
        return Share(list(range(len(tokens))), [])

    def total(self, parameters: Sequence[torch.nn.Parameter], loss: float) -> float:
        return loss

    def gather(self, rows_KC: Tensor) -> Tensor:
        return rows_KC

    def require_same(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """One process agrees with itself."""


class Joined:
    """One process of `torch.distributed`'s default group.

    Args:
        device: where parameters and gradients are. even: whether all processes must make the same number of passes,
            as they must where they hold parts of the frozen weights and send them to each other in each pass.
    """

    def __init__(self, device: torch.device, *, even: bool) -> None:
        self.dist_rank, self.count = dist.get_rank(), dist.get_world_size()
        self._device, self._even = device, even

    def share(self, tokens: Sequence[int]) -> Share:
        parts = spread(tokens, self.count)
        own = parts[self.dist_rank]
        missing = max(len(part) for part in parts) - len(own) if self._even else 0
        return Share(own, [0] * missing)

    def total(self, parameters: Sequence[torch.nn.Parameter], loss: float) -> float:
        """A parameter that has no gradient in any process still has none afterwards.

        Raises:
            LostProcessError: another process is gone.
        """
        present = [float(p.grad is not None) for p in parameters]
        counted = self._sum(torch.tensor([loss, *present], dtype=torch.float64, device=self._device))
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters])
        sums = torch.split(self._sum(flat), [p.numel() for p in parameters])
        loss_sum, *holders = counted.tolist()
        for parameter, gradient, holder in zip(parameters, sums, holders, strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if holder else None
        return float(loss_sum)

    def gather(self, rows_KC: Tensor) -> Tensor:
        """Raises: LostProcessError."""
        with _others_may_be_gone():
            counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
            dist.all_gather(counts, torch.tensor([len(rows_KC)]))
            most = max(int(n) for n in counts)
            padded_MC = torch.zeros(most, rows_KC.shape[1], dtype=rows_KC.dtype)
            padded_MC[: len(rows_KC)] = rows_KC
            all_MC = [torch.zeros_like(padded_MC) for _ in range(self.count)]
            dist.all_gather(all_MC, padded_MC)
        return torch.cat([part_MC[: int(n)] for part_MC, n in zip(all_MC, counts, strict=True)])

    def require_same(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Raises: RunError: the processes hold different values. LostProcessError."""
        own = torch.tensor(list(digest(tensors)), dtype=torch.uint8)
        with _others_may_be_gone():
            found = [torch.zeros_like(own) for _ in range(self.count)]
            dist.all_gather(found, own)
        odd = [index for index, other in enumerate(found) if not torch.equal(other, found[0])]
        if odd:
            names = ", ".join(map(str, odd))
            raise RunError(f"{what} differs between process 0 and {names}", where="[enclave] processes", hint=_HINT)

    def _sum(self, values: Tensor) -> Tensor:
        with _others_may_be_gone():
            dist.all_reduce(values)
        return values


_HINT = "the machine computes wrongly, or files changed while it started; start the enclave again"


@contextmanager
def _others_may_be_gone() -> Iterator[None]:
    """gloo and NCCL report a lost process as one of several RuntimeErrors with a text of their own."""
    try:
        yield
    except RuntimeError as exc:
        raise LostProcessError("the connection to another process is lost", where="[enclave] processes") from exc


def is_loss(error: RuntimeError) -> bool:
    """Whether torch says by this error that another process is gone, or does not answer."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def spread(tokens: Sequence[int], count: int) -> list[list[int]]:
    """Deal packs of so many tokens to `count` processes, as places in the list, ascending.

    The longest comes first, each to the process with the fewest tokens so far; every pack goes to one process.
    """
    parts: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for place in sorted(range(len(tokens)), key=lambda place: -tokens[place]):
        least = filled.index(min(filled))
        parts[least].append(place)
        filled[least] += tokens[place]
    return [sorted(part) for part in parts]


def digest(tensors: Mapping[str, Tensor]) -> bytes:
    """SHA-256 over names, types, shapes and values, in name order."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()
