"""What `cloister bench split` compares with, each in a process of its own that holds all silos' records.

trainer     Hugging Face's Trainer and PEFT on all records in one place
central     the same by Cloister's own loop
fedavg      a Trainer for each silo in turn, and after each round the mean of their adapters, weighted by tokens

All of them train LoRA on all layers, on the packs and at the learning rates that the enclave of method `split` has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor

from cloister.adapters.add import add_adapter
from cloister.adapters.state import load_adapter_weights
from cloister.bench.split_clock import Clock, Logbook, due_steps, held_out_loss
from cloister.bench.split_data import party_data, train_packs
from cloister.bench.split_trainer import add_peft_lora, train_with_trainer
from cloister.data.packing import Pack
from cloister.data.prepare import PartyData
from cloister.errors import UsageError
from cloister.job import Job
from cloister.jobfile import LoadedJob
from cloister.model.anatomy import load_model, pick_device
from cloister.model.cut import Whole
from cloister.model.repacked import repack
from cloister.progress import Progress, Task, task
from cloister.report.bench import BenchMeasured
from cloister.training.checkpoint import Point
from cloister.training.loop import PackList, snapshot, train
from cloister.training.schedule import learning_rate, plan_steps

Peer = Literal["trainer", "central", "fedavg"]
PEERS: tuple[Peer, ...] = ("trainer", "central", "fedavg")
Weights = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class PeerTask:
    """What a peer is asked for. `evaluations`: how often the held-out loss is measured; `rounds`: of fedavg."""

    loaded: LoadedJob
    evaluations: int
    rounds: int
    folder: Path

    @property
    def job(self) -> Job:
        return self.loaded.job

    def load(self) -> tuple[Whole, dict[str, PartyData]]:
        """Model and records."""
        device = pick_device(self.job.enclave.device)
        model = load_model(self.loaded.local_path(self.job.model.path), self.job.model.dtype, device)
        return Whole(model), party_data(self.loaded)


def run_peer(peer: Peer, asked: PeerTask, out: Path, *, progress: Progress) -> None:
    """Measure one system and write OUT.

    Raises:
        CloisterError: what is wrong with the job.
    """
    measure = {"trainer": _trainer, "central": _central, "fedavg": _fedavg}[peer]
    clock = Clock()
    with task(progress, peer, unit="rounds" if peer == "fedavg" else "steps") as running:
        measured = measure(asked, clock, running)
    out.write_text(measured.to_json(), encoding="utf-8")


def _central(asked: PeerTask, clock: Clock, running: Task) -> BenchMeasured:
    whole, data = asked.load()
    repack(whole.model, asked.job.enclave.repack)
    job, source = asked.job, PackList(train_packs(data))
    adapted = add_adapter(whole, job.adapter, first_layer=0, seed=job.job.seed)
    num_steps = len(plan_steps(source.tokens, job.training, job.job.seed))
    book = Logbook(clock, due_steps(num_steps, asked.evaluations), held_out_loss(whole, adapted, data), running)
    book.begin()

    def on_point(point: Point, num_steps: int) -> None:
        book.step(point.step, num_steps, point.tokens, point.train_loss)

    train(whole, adapted, source, job.training, seed=job.job.seed, validate=None, on_point=on_point)
    snapshot(adapted)
    return book.close(steps=num_steps, wire_bytes=0, how="Cloister's loop, all records in one place")


def _trainer(asked: PeerTask, clock: Clock, running: Task) -> BenchMeasured:
    whole, data = asked.load()
    job, packs = asked.job, train_packs(data)
    adapted = add_peft_lora(whole.model, job.adapter, job.job.seed)
    steps = plan_steps([len(pack) for pack in packs], job.training, job.job.seed)
    book = Logbook(clock, due_steps(len(steps), asked.evaluations), held_out_loss(whole, adapted, data), running)
    batches = [[packs[i] for i in step] for step in steps]
    done = _running_total(batches)
    book.begin()
    train_with_trainer(
        adapted,
        batches,
        [learning_rate(step, len(steps), job.training) for step in range(len(steps))],
        job.training,
        seed=job.job.seed,
        folder=asked.folder,
        on_step=lambda number, loss: book.step(number, len(steps), done[number - 1], loss),
    )
    snapshot(adapted)
    return book.close(steps=len(steps), wire_bytes=0, how="transformers' Trainer and PEFT, all records in one place")


def _fedavg(asked: PeerTask, clock: Clock, running: Task) -> BenchMeasured:
    whole, data = asked.load()
    job = asked.job
    adapted = add_peft_lora(whole.model, job.adapter, job.job.seed)
    silos = silos_of(data, job, asked.rounds)
    book = Logbook(clock, set(range(1, asked.rounds + 1)), held_out_loss(whole, adapted, data), running)
    weights, tokens, sent = snapshot(adapted), 0, 0
    book.begin()
    for number in range(asked.rounds):
        trained = [silo.train(adapted, weights, number, asked.folder) for silo in silos.values()]
        weights = weighted_mean([(update.weights, update.tokens) for update in trained])
        sent += 2 * len(silos) * sum(value.numel() * value.element_size() for value in weights.values())
        tokens += sum(update.tokens for update in trained)
        load_adapter_weights(adapted, weights)
        loss = sum(update.loss * update.tokens for update in trained) / sum(update.tokens for update in trained)
        book.step(number + 1, asked.rounds, tokens, loss)
    steps = sum(len(silo.steps) for silo in silos.values())
    how = "plain rounds in one process, without Flower: a Trainer and PEFT for each silo in turn, mean by tokens"
    return book.close(steps=steps, wire_bytes=sent, how=how)


@dataclass(frozen=True, kw_only=True)
class SiloUpdate:
    """What a silo's round came to. `loss`: mean over its steps."""

    weights: Weights
    tokens: int
    loss: float


class Silo:
    """One silo of federated averaging: its own steps, spread evenly over the rounds, with a new optimiser in each.

    Raises:
        UsageError: it has fewer steps than there are rounds.
    """

    def __init__(self, name: str, packs: Sequence[Pack], job: Job, rounds: int) -> None:
        self._packs, self._job, self._rounds = packs, job, rounds
        self.steps = plan_steps([len(pack) for pack in packs], job.training, job.job.seed)
        if len(self.steps) < rounds:
            hint = "lower --rounds or --batch-tokens, or raise --tokens"
            raise UsageError(f"{name} has {len(self.steps)} steps for {rounds} rounds", where="--rounds", hint=hint)

    def train(self, adapted: PeftModel, weights: Weights, number: int, folder: Path) -> SiloUpdate:
        """Round `number` (from 0), beginning with the mean of the round before."""
        total = len(self.steps)
        span = range(total * number // self._rounds, total * (number + 1) // self._rounds)
        losses: list[float] = []
        load_adapter_weights(adapted, weights)
        train_with_trainer(
            adapted,
            [[self._packs[i] for i in self.steps[step]] for step in span],
            [learning_rate(step, total, self._job.training) for step in span],
            self._job.training,
            seed=self._job.job.seed + number,
            folder=folder,
            on_step=lambda _, loss: losses.append(loss),
        )
        tokens = sum(len(self._packs[i]) for step in span for i in self.steps[step])
        return SiloUpdate(weights=snapshot(adapted), tokens=tokens, loss=sum(losses) / len(losses))


def silos_of(data: Mapping[str, PartyData], job: Job, rounds: int) -> dict[str, Silo]:
    """All silos, by name. Raises: UsageError: one has fewer steps than there are rounds."""
    return {name: Silo(name, own.parts["train"].packs, job, rounds) for name, own in data.items()}


def weighted_mean(states: Sequence[tuple[Weights, int]]) -> dict[str, Tensor]:
    """The mean of adapters, each with its weight; in float64, rounded once."""
    total = sum(weight for _, weight in states)
    names = states[0][0]
    return {name: torch.stack([s[name].double() * (w / total) for s, w in states]).sum(0).float() for name in names}


def _running_total(batches: Sequence[Sequence[Pack]]) -> list[int]:
    done, totals = 0, []
    for batch in batches:
        done += sum(map(len, batch))
        totals.append(done)
    return totals
