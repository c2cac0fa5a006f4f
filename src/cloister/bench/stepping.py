"""One system of `cloister bench slice` as a process: it takes a training step for each line on stdin.

python -m cloister.bench.stepping SYSTEM MODEL_FOLDER STEPS IN_FLIGHT ADDRESS[,ADDRESS] SHAPE...

SYSTEM: plain-float32, plain-bfloat16, precomputed, dual, unchecked (precomputed, products not checked).
It prints a JSON line when it is ready and one after each step.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from cloister.accelerator.client import AcceleratorClient
from cloister.adapters.add import add_adapter
from cloister.bench.shape import Shape, packs
from cloister.job import AdapterSection, TrainingSection
from cloister.masking.budget import Work, first_trained, pad_budget
from cloister.masking.dual import DualPads
from cloister.masking.linear import PadSource
from cloister.masking.model import build_masked_model
from cloister.masking.precomputed import ephemeral_pads
from cloister.masking.skeleton import plan_groups
from cloister.masking.weights import WeightSink
from cloister.model.anatomy import load_model
from cloister.model.cut import Whole
from cloister.training.loop import PackList, Stepper
from cloister.training.loss import MAX_LOGITS


def main(arguments: list[str]) -> None:
    """Serve steps until stdin ends."""
    system, folder, steps, in_flight, addresses, *shape_arguments = arguments
    shape = Shape.of(shape_arguments)
    with ExitStack() as ends:
        verify: Callable[[], None] = lambda: None  # noqa: E731
        if system.startswith("plain-"):
            half = Whole(load_model(Path(folder), system.removeprefix("plain-")))
        else:
            masked = ends.enter_context(_masked(system, Path(folder), int(steps), addresses.split(","), shape))
            half, verify = masked
        adapted = add_adapter(half, AdapterSection(rank=shape.rank), first_layer=0, seed=0)
        training = TrainingSection(steps=1, learning_rate=1e-4)
        stepper = Stepper(half, adapted, training, in_flight=int(in_flight), verify=verify)
        source = PackList(packs(shape))
        _say({"ready": system, **_memory_now()})
        for line in sys.stdin:
            if not line.strip():
                break
            cpu, began = time.process_time(), time.perf_counter()
            loss, _ = stepper.step(source, range(len(source.packs)), 1e-4, where="bench")
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            _say({"seconds": seconds, "cpu": cpu, "loss": loss, **_memory_now()})


@contextmanager
def _masked(
    system: str, folder: Path, steps: int, addresses: list[str], shape: Shape
) -> Iterator[tuple[Whole, Callable[[], None]]]:
    plans, rows = plan_groups(folder), shape.pack_tokens
    work = Work(trained=[rows - 1] * shape.packs * steps, scored=[])
    with ExitStack() as ends:
        clients = [ends.enter_context(AcceleratorClient(address, timeout_s=600.0)) for address in addresses]
        sinks: list[WeightSink] = [*clients]
        pads: PadSource
        if system == "dual":
            pads = DualPads(clients[1], plans, first=clients[0])
        else:
            budget = pad_budget(
                plans,
                work,
                rows=rows,
                head_rows=max(1, MAX_LOGITS // shape.vocabulary),
                first_trained=first_trained(plans, "all-linear"),
                bits=8,
            )
            disk = Path(ends.enter_context(tempfile.TemporaryDirectory()))
            computing, pads = ends.enter_context(ephemeral_pads(plans, budget.rows, parts=1, folder=disk))
            sinks.append(computing)
        masked = build_masked_model(
            folder,
            {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()},
            dtype="float32",
            bits=8,
            rows=rows,
            sinks=sinks,
            accelerator=clients[0],
            pads=pads,
            check=system != "unchecked",
        )
        yield Whole(masked.model, all_tokens=True), masked.verify


def memory() -> int:
    """Resident bytes of this process that are its own (anonymous)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


def _memory_now() -> dict[str, int]:
    return {"resident": memory()}


def _say(content: dict[str, Any]) -> None:
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(True)
    main(sys.argv[1:])
