"""Parties that send what does not fit, on the demo's data: they stand out, and the honest ones do not.

Five parties, the demo's base model, a real bundle's payload from each. What is malformed is refused elsewhere
(`test_work.py`); this is about payloads that are in order and do harm.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from cloister.data import synthetic
from cloister.data.activations import Schema
from cloister.data.packing import Pack
from cloister.data.payload import Payload, write_payload
from cloister.data.prepare import prepare
from cloister.data.synthetic import PartyFiles, write_demo_data
from cloister.enclave.compute import Work, run_training
from cloister.evaluation.outliers import fits_of
from cloister.job import Job
from cloister.model.anatomy import load_model, load_tokenizer
from cloister.model.cut import Former, Latter
from cloister.report.fits import warnings
from cloister.report.model import PartyFit

BASE = Path(synthetic.__file__).parents[1] / "assets" / "demo" / "base"
CUT = 2
Change = Callable[[list[Pack]], list[Pack]]
Measured = Callable[[str], None]


def job(names: list[str]) -> Job:
    return Job.model_validate(
        {
            "job": {"name": "poison"},
            "model": {"path": str(BASE), "cut": CUT, "dtype": "float32"},
            "data": {"validation": 0.0},
            "adapter": {"rank": 8, "alpha": 16.0},
            "training": {"epochs": 3, "batch_tokens": 512, "max_tokens": 256, "learning_rate": 5e-3},
            "party": [{"name": name} for name in names],
            "transport": {"activation_dtype": "float32"},
            "evaluation": {"baselines": []},
            "checkpoint": {"count": 0},
        }
    )


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> list[PartyFiles]:
    return list(write_demo_data(tmp_path_factory.mktemp("demo"), seed=1, train=60, test=4))


def shuffle_answers(files: PartyFiles, folder: Path) -> Path:
    """Each record gets the answer of another one."""
    rows = [json.loads(line) for line in files.train.read_text().splitlines()]
    answers = [{k: v for k, v in row.items() if k != "prompt"} for row in rows]
    moved = [{"prompt": row["prompt"], **answers[(i + 17) % len(rows)]} for i, row in enumerate(rows)]
    path = folder / "shuffled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in moved))
    return path


def scaled(by: float) -> Change:
    return lambda packs: [pack.with_activations(pack.given * by) for pack in packs]


def noise(packs: list[Pack]) -> list[Pack]:
    """Activations that come from no text, of a size that text has."""
    generator = torch.Generator().manual_seed(1)
    return [p.with_activations(torch.randn(p.given.shape, generator=generator) * p.given.std()) for p in packs]


def payload(party: str, declared: Job, train: Path, test: Path, former: Former, change: Change) -> Payload:
    data = prepare(declared, load_tokenizer(BASE), train, test)
    packs = [p.with_activations(former(p.given, p.layout.position_T, p.layout)) for p in data.parts["train"].packs]
    content = bytearray()
    write_payload(content.extend, change(packs), [], "float32")
    text = former.config.get_text_config()
    schema = Schema(activation_dtype="float32", hidden=text.hidden_size, vocabulary=text.vocab_size, max_tokens=256)
    read = partial(lambda whole, offset, length: whole[offset : offset + length], bytes(content))
    return Payload.open(read, len(content), schema, torch.float32, f"train bundle of {party}")


def trained(parties: list[PartyFiles], folder: Path, harm: str = "") -> list[PartyFit]:
    """Train on everybody's payloads, of which the first party's does harm; returns how each party's data fit."""
    declared = job([files.name for files in parties])
    former = Former(load_model(BASE, "float32", "cpu"), CUT)
    payloads = {}
    for index, files in enumerate(parties):
        done = harm if index == 0 else ""
        train = shuffle_answers(files, folder) if done == "shuffled answers" else files.train
        payloads[files.name] = payload(files.name, declared, train, files.test, former, CHANGES.get(done, list))
    latter = Latter(load_model(BASE, "float32", "cpu"), CUT)
    work = Work(job=declared, cut=CUT, latter=latter, payloads={"train": payloads}, cache_bytes=1 << 28)
    _, result = run_training(work, resume=None)
    found = fits_of({name: (fit.tokens, fit.loss, fit.gradient_norm) for name, fit in result.fits.items()})
    assert [f.party for f in found] == [files.name for files in parties]
    return found


def warned(found: list[PartyFit]) -> list[str]:
    """Whom the parties are warned of."""
    return list(dict.fromkeys(text.partition(":")[0] for text in warnings(found)))


def scores(found: list[PartyFit]) -> str:
    """The harmful party's first."""
    losses, gradients = ([getattr(f, name) for f in found] for name in ("loss_z", "gradient_z"))
    listed = [", ".join(f"{z:.2g}" for z in each) for each in (losses, gradients)]
    return f"robust z of losses {listed[0]}; of gradients {listed[1]}"


CHANGES: dict[str, Change] = {"scaled up": scaled(30.0), "scaled down": scaled(0.01), "noise": noise}


def test_shuffled_answers_stand_out(parties: list[PartyFiles], tmp_path: Path, measured: Measured) -> None:
    found = trained(parties, tmp_path, "shuffled answers")
    measured(scores(found))
    assert warned(found) == [parties[0].name]


@pytest.mark.slow
@pytest.mark.parametrize("harm", CHANGES)
def test_activations_that_do_not_fit_stand_out(
    parties: list[PartyFiles], tmp_path: Path, harm: str, measured: Measured
) -> None:
    found = trained(parties, tmp_path, harm)
    measured(scores(found))
    assert warned(found) == [parties[0].name]


@pytest.mark.slow
def test_honest_parties_do_not(parties: list[PartyFiles], tmp_path: Path, measured: Measured) -> None:
    found = trained(parties, tmp_path)
    measured(scores(found))
    assert warned(found) == []
