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

from cloister.adapters.state import adapter_files
from cloister.errors import RunError
from cloister.model.cut import Latter
from cloister.training.checkpoint import Checkpoint
from cloister.training.loop import PackList, train
from cloister.training.team import Joined, LostProcessError
from tests.unit.model.tiny import tiny_model
from tests.unit.training.test_loop import CUT, PACKS, _at_the_cut, _prepare, _section


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
