"""One process of a team, started by `test_team.py`: trains tiny models and writes down what came out.

    python -m tests.unit.training.member RANK COUNT FOLDER

FOLDER/one.checkpoint is a checkpoint of one process after two steps. Writes FOLDER/RANK.json; process 1 ends without a
word at last.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from cloister.adapters.add import add_adapter
from cloister.adapters.state import adapter_files
from cloister.errors import RunError
from cloister.job import AdapterSection
from cloister.model.cut import Latter
from cloister.training.checkpoint import Checkpoint
from cloister.training.loop import PackList, train
from cloister.training.loss import target_nll
from cloister.training.sharded import part
from cloister.training.team import Joined, LostProcessError
from tests.unit.model.tiny import tiny_model
from tests.unit.training.test_loop import CUT, PACKS, _at_the_cut, _prepare, _section

PARTED = [
    ("llama", "lora", torch.float32),
    ("llama", "ptuning", torch.float32),
    ("gpt2", "lora", torch.float32),
    ("gemma2", "lora", torch.bfloat16),
]
"""GPT-2's head is its embedding."""


class Counted(PackList):
    """Notes which packs are read."""

    read: list[int]

    def __getitem__(self, index: int, /) -> Any:
        self.read.append(index)
        return super().__getitem__(index)


def trained(team: Joined, resume: Checkpoint | None = None, **section: Any) -> dict[str, Any]:
    latter = Latter(tiny_model("llama"), CUT)
    adapted, saved = _prepare(latter), list[Checkpoint]()
    source = Counted(_at_the_cut("llama", PACKS))
    object.__setattr__(source, "read", [])
    result = train(
        latter, adapted, source, _section(**section),
        seed=0, resume=resume, checkpoints=5, on_checkpoint=saved.append, team=team,
    )  # fmt: skip
    files = adapter_files(adapted, "base")
    return {
        "loss": [p.train_loss for p in result.curve],
        "norm": [p.grad_norm for p in result.curve],
        "adapter": {name: content.hex() for name, content in files.items()},
        "read": source.read,
        "checkpoint": saved[1].to_bytes().hex() if resume is None else "",
    }


def totals(team: Joined) -> dict[str, Any]:
    """Of parameters with a gradient in both processes, in one, in none."""
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3)]
    parameters[0].grad = torch.full((2, 3), 1.0 + team.dist_rank)
    if team.dist_rank == 1:
        parameters[1].grad = torch.arange(6.0).view(2, 3)
    loss = team.total(parameters, 0.1 * (1 + team.dist_rank))
    return {"loss": loss, "gradients": [None if p.grad is None else p.grad.tolist() for p in parameters]}


def parted(name: str, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """A loss and its gradients before and after the frozen layers are parted, and what share of them stays here."""
    latter = Latter(tiny_model(name, dtype), CUT)
    adapted = add_adapter(latter, AdapterSection.model_validate({"kind": kind}), first_layer=CUT, seed=0)
    frozen = [p for p in latter.anatomy.layers(latter.model)[CUT:].parameters() if not p.requires_grad]
    trained, whole = [p for p in adapted.parameters() if p.requires_grad], sum(p.numel() for p in frozen)
    for parameter in trained:
        parameter.data.add_(0.01)
    pack = _at_the_cut(name, PACKS[:1], dtype)[0]
    found: list[tuple[float, list[torch.Tensor]]] = []
    for place in (lambda: None, lambda: part(latter, adapted, torch.device("cpu")), lambda: None):
        place()
        loss = target_nll(latter, pack).mean()
        found.append((loss.item(), list(torch.autograd.grad(loss, trained))))
    layers = latter.anatomy.layers(latter.model)[CUT:]
    here = sum(p.to_local().numel() for p in layers.parameters() if isinstance(p, DTensor))
    same = all(loss == found[0][0] and all(map(torch.equal, gradients, found[0][1])) for loss, gradients in found[1:])
    return {"same": same, "share": here / whole, "moved": found[0][1][0].abs().sum().item() > 0}


def drift(team: Joined) -> str:
    team.require_same({"a": torch.ones(3)}, "something")
    try:
        team.require_same({"a": torch.full((3,), float(team.dist_rank))}, "something")
    except RunError as error:
        return str(error)
    return ""


def main(rank: int, count: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=dt.timedelta(seconds=120))
    team = Joined(torch.device("cpu"), even=False)
    one = Checkpoint.from_bytes((folder / "one.checkpoint").read_bytes())
    found: dict[str, Any] = {
        "first": trained(team),
        "again": trained(team),
        "uneven": trained(Joined(torch.device("cpu"), even=True)),
        "resumed": trained(team, one),
        "totals": totals(team),
        "parted": {f"{name} {kind} {dtype}": parted(name, kind, dtype) for name, kind, dtype in PARTED},
        "rows": team.gather(torch.full((rank + 1, 2), float(rank), dtype=torch.float64)).tolist(),
        "drift": drift(team),
    }
    if rank == 1:
        (folder / "1.json").write_text(json.dumps(found))
        os._exit(0)
    try:
        team.total([torch.nn.Parameter(torch.zeros(1))], 0.0)
    except LostProcessError as error:
        found["lost"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
