"""What a training step costs: Hugging Face's model with PEFT, and Cloister's loop on a whole model and a latter half.

python benchmarks/split_step.py [--cut 6 9] [--runs 5] [--tokens 1024] [--hidden 768 --layers 12 --vocabulary 32000]

All systems lie in one process and take a step in turn, so that whatever else the machine does falls on all of them;
seconds are the process's own processor time (with OMP_WAIT_POLICY=passive, so that waiting costs none). The former part
is what a party computes once for the same tokens. "plain" is without repacked weights. Ratios are of medians.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from cloister.adapters.add import add_adapter
from cloister.bench.shape import Shape
from cloister.bench.split_data import Budget, Workload, party_data, random_workload, train_packs
from cloister.bench.split_trainer import add_peft_lora, rows_of
from cloister.data.packing import Pack
from cloister.model.anatomy import load_model
from cloister.model.cut import Former, Latter, Whole
from cloister.model.repacked import repack
from cloister.training.loop import PackList, Stepper

Step = Callable[[], object]


def peft_step(whole: Whole, workload: Workload, packs: list[Pack]) -> Step:
    """What Trainer does in a step, without what it adds around it."""
    adapted = add_peft_lora(whole.model, workload.loaded.job.adapter, 0)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    rows = rows_of(packs)
    targets = int((rows["labels"] != -100).sum())

    def step() -> None:
        adapted.train()
        adapted(**rows, num_items_in_batch=targets, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return step


def our_step(half: Whole, workload: Workload, packs: list[Pack], first_layer: int) -> Step:
    job, source = workload.loaded.job, PackList(packs)
    adapted = add_adapter(half, job.adapter, first_layer=first_layer, seed=0)
    stepper = Stepper(half, adapted, job.training)
    return lambda: stepper.step(source, range(len(packs)), 1e-4, where="benchmark")


def activations(former: Former, packs: list[Pack]) -> list[Pack]:
    passed = [former(pack.given, pack.layout.position_T, pack.layout) for pack in packs]
    return [p.with_activations(x_TD.bfloat16().float()) for p, x_TD in zip(packs, passed, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cut", type=int, nargs="+", default=[6, 9])
    for name, value in (("hidden", 768), ("layers", 12), ("vocabulary", 32_000), ("tokens", 1024), ("runs", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    asked = parser.parse_args()
    shape = Shape(hidden=asked.hidden, layers=asked.layers, vocabulary=asked.vocabulary, tokens=512)
    with tempfile.TemporaryDirectory() as folder:
        budget = Budget(tokens=5 * asked.tokens, batch_tokens=asked.tokens)
        workload = random_workload(shape, budget, dtype="float32", folder=Path(folder))
        print(json.dumps(measure(workload, asked.cut, asked.tokens, asked.runs), indent=1))


def measure(workload: Workload, cuts: list[int], tokens: int, runs: int) -> dict[str, object]:
    """Processor seconds of every step, and ratios."""
    path = workload.loaded.local_path(workload.loaded.job.model.path)
    packs, filled = list[Pack](), 0
    for pack in train_packs(party_data(workload.loaded)):
        if filled + len(pack) <= tokens:
            packs.append(pack)
            filled += len(pack)
    steps: dict[str, Step] = {
        "peft": peft_step(Whole(load_model(path, "float32")), workload, packs),
        "whole": our_step(Whole(repack(load_model(path, "float32"))), workload, packs, 0),
    }
    for cut, plain in itertools.product(cuts, (False, True)):
        name = f"{cut} plain" if plain else str(cut)
        former = Former(repack(load_model(path, "float32"), wanted=not plain), cut)
        latter = Latter(repack(load_model(path, "float32"), wanted=not plain), cut)
        steps[f"latter {name}"] = our_step(latter, workload, activations(former, packs), cut)
        steps[f"former {name}"] = functools.partial(activations, former, packs)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(runs + 1):  # the first warms up
        for name, step in steps.items():
            began = time.process_time()
            step()
            if number:
                seconds[name].append(round(time.process_time() - began, 3))
    middle = {name: median(taken) for name, taken in seconds.items()}
    ratios = {"peft / whole": middle["peft"] / middle["whole"]}
    for cut in cuts:
        latter, former_s = middle[f"latter {cut}"], middle[f"former {cut}"]
        ratios[f"peft / latter {cut}"] = middle["peft"] / latter
        ratios[f"latter {cut}, plain / repacked"] = middle[f"latter {cut} plain"] / latter
        ratios[f"former {cut}, plain / repacked"] = middle[f"former {cut} plain"] / former_s
        ratios[f"bound {cut}"] = workload.layers / (workload.layers - cut)
        ratios[f"3 epochs, cut {cut}, without all else"] = 3 * middle["peft"] / (3 * latter + former_s)
        plain_s = 3 * middle[f"latter {cut} plain"] + middle[f"former {cut} plain"]
        ratios[f"3 epochs, cut {cut}, plain, without all else"] = 3 * middle["peft"] / plain_s
    share = sum(len(pack.target_pos_N) for pack in packs) / filled
    return {"tokens": filled, "packs": len(packs), "target_share": share, "cpu_seconds": seconds, "ratios": ratios}


if __name__ == "__main__":
    main()
