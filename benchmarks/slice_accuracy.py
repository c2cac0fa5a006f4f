"""Does method `slice` cost accuracy? The five-silo medical job with its integer arithmetic, and in plain float32.

python benchmarks/slice_accuracy.py [--job examples/medical/slice.toml] [--steps 40] [--rounds 8] [--examples 200]

Both systems run the same rounds on the same batches in this process: one with frozen weights in 8 bits, activations and
gradients in fixed point (what masks hide and leave bit for bit as it is: tests/integration/test_slice.py), the other
with plain float32 products. The difference on the held-out text is paired, with a 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.unit.masking.local import LocalAccelerator

from cloister.data.prepare import PartyData, prepare
from cloister.evaluation.compare import compare_scores
from cloister.evaluation.rows import results_rows
from cloister.evaluation.scores import Scores
from cloister.federation.aggregate import aggregate
from cloister.federation.state import GlobalState
from cloister.job import Job
from cloister.jobfile import load_job
from cloister.masking.model import build_masked_model
from cloister.masking.pads import InsecureNoPads
from cloister.masking.skeleton import plan_groups
from cloister.model.anatomy import load_model, load_tokenizer
from cloister.model.cut import Whole
from cloister.silo.work import SiloWork
from cloister.training.loop import snapshot


def integer_half(folder: Path, job: Job) -> Whole:
    """Products of integers without pads: what masks leave as it is."""
    accelerator = LocalAccelerator()
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}
    masked = build_masked_model(
        folder,
        hashes,
        dtype="float32",
        bits=job.masking.bits,
        rows=job.training.max_tokens,
        sinks=[accelerator],
        accelerator=Forgetful(accelerator),
        pads=InsecureNoPads(plan_groups(folder), parts=job.masking.bits // 8),
    )
    return Whole(masked.model)


class Forgetful:
    """The test's accelerator without its memory of what it saw."""

    def __init__(self, accelerator: LocalAccelerator) -> None:
        self.name, self._accelerator = accelerator.name, accelerator

    def submit(self, group: str, direction: str, z: torch.Tensor):  # type: ignore[no-untyped-def]
        return lambda: self._accelerator.products(group, direction, z)  # type: ignore[arg-type]


def rounds(name: str, folder: Path, job: Job, data: dict[str, PartyData]) -> dict[str, dict[str, Scores]]:
    """Scores by system and party after all rounds."""
    halves = {p: integer_half(folder, job) if name == "slice" else Whole(load_model(folder, "float32")) for p in data}
    works = {party: SiloWork(halves[party], own, job, party) for party, own in data.items()}
    state = GlobalState(round=0, weights=snapshot(next(iter(works.values())).adapted))
    while state.round < job.federation.rounds:
        began = time.monotonic()
        results = {party: work.train(state.round, state.weights, state.moments) for party, work in works.items()}
        state = aggregate(
            [r.as_update(p, state.round, job.federation) for p, r in results.items()], state, job.federation
        )
        loss = sum(r.loss * r.tokens for r in results.values()) / sum(r.tokens for r in results.values())
        print(f"{name}: round {state.round}, loss {loss:.4f}, {time.monotonic() - began:.0f} s", file=sys.stderr)
    scored = {party: work.score(state.weights, lambda tokens: None) for party, work in works.items()}
    return {system: {party: found[system] for party, found in scored.items()} for system in ("base", "cloister")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, default=Path("examples/medical/slice.toml"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--examples", type=int)
    arguments = parser.parse_args()
    loaded = load_job(arguments.job)
    job = loaded.job
    if arguments.steps:
        job = job.model_copy(update={"training": job.training.model_copy(update={"steps": arguments.steps})})
    if arguments.rounds:
        job = job.model_copy(update={"federation": job.federation.model_copy(update={"rounds": arguments.rounds})})
    if arguments.examples:
        job = job.model_copy(
            update={"evaluation": job.evaluation.model_copy(update={"max_examples": arguments.examples})}
        )
    folder = loaded.local_path(job.model.path)
    tokenizer = load_tokenizer(folder)
    data = {
        p.name: prepare(job, tokenizer, *(loaded.data_file(p.name, k) for k in ("train", "test"))) for p in job.party
    }
    plain, masked = rounds("plain", folder, job, data), rounds("slice", folder, job, data)
    rows = [row.model_dump(mode="json") for row in results_rows("cloister", masked["cloister"]) if row.task == "all"]
    compared = compare_scores(masked["cloister"], plain["cloister"], names=("slice", "plain float32"), where="here")
    base = [row.bits_per_byte for row in results_rows("base", plain["base"]) if (row.party, row.task) == ("all", "all")]
    fp32 = [r.bits_per_byte for r in results_rows("cloister", plain["cloister"]) if (r.party, r.task) == ("all", "all")]
    found = {
        "base": base[0],
        "plain": fp32[0],
        "slice": rows,
        "slice - plain": [c.model_dump(mode="json") for c in compared],
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
