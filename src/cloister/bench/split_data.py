"""What `cloister bench split` trains on: a job file with a model and five silos' records, none of it larger than asked.

FOLDER/job.toml             the job; its cut is set for each system
FOLDER/data/PARTY.jsonl     training records, and one short test record, which a party must have, in PARTY-test.jsonl
FOLDER/model/               where weights are random
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from cloister.bench.shape import Shape, write_model
from cloister.data.packing import Pack
from cloister.data.prepare import PartyData, prepare
from cloister.data.records import Record, load_records
from cloister.data.tokens import Encoder
from cloister.errors import UsageError
from cloister.job import (
    AdapterSection,
    CheckpointSection,
    DataSection,
    EvaluationSection,
    Job,
    JobSection,
    ModelSection,
    PartySection,
    TrainingSection,
)
from cloister.jobfile import LoadedJob, load_job, render_job
from cloister.model.anatomy import find_anatomy, load_tokenizer

SILOS = ("north", "east", "south", "west", "centre")
_PROMPT, _RESPONSE = (110.0, 0.6, 16, 320), (30.0, 0.9, 4, 128)
"""Words of a synthetic text: median, spread (sigma of the logarithm), least and most. Together about 175 words, a
quarter of them in the response: what the medical silos of examples/medical come to on average."""
_RESERVED = 3
"""Token numbers before the words: unknown, begin and end of text."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much every system trains on. `tokens`: of all silos, once, about."""

    tokens: int = 6144
    epochs: float = 3.0
    batch_tokens: int = 2048
    max_tokens: int = 512

    def training(self, base: TrainingSection) -> TrainingSection:
        """`base` with this length; its held-out loss is measured where a system is asked to, its last state kept."""
        settings = asdict(self) | {"steps": None, "evaluations": 0, "keep": "last"}
        settings.pop("tokens")
        return TrainingSection(**{**base.model_dump(), **settings})


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A prepared folder."""

    loaded: LoadedJob
    shape: str
    parameters: int
    layers: int
    epoch_tokens: int
    records: int
    target_share: float
    """Of all positions."""

    def figures(self, rounds: int) -> dict[str, float]:
        """What the report says about it."""
        job = self.loaded.job
        return {
            "parties": len(job.party),
            "records": self.records,
            "tokens": self.epoch_tokens,
            "epochs": job.training.epochs or 0.0,
            "batch_tokens": job.training.batch_tokens,
            "max_tokens": job.training.max_tokens,
            "rounds": rounds,
            "rank": job.adapter.rank,
        }

    def with_cut(self, cut: int) -> LoadedJob:
        """The job with its cut. Raises: UsageError: it leaves no layer on one side."""
        if not 1 <= cut < self.layers:
            hint = f"choose 1 to {self.layers - 1}"
            raise UsageError(f"{cut} leaves no layer on one side of {self.layers} layers", where="--cut", hint=hint)
        return self.changed("model", cut=cut)

    def changed(self, section: str, **values: Any) -> LoadedJob:
        """The job with other values in one section, in a file of its own beside the first."""
        job = self.loaded.job
        job = job.model_copy(update={section: getattr(job, section).model_copy(update=values)})
        name = "-".join([self.loaded.path.stem, *(f"{key}-{value}" for key, value in values.items())])
        path = self.loaded.path.with_name(f"{name}.toml")
        path.write_text(render_job(job), encoding="utf-8")
        return load_job(path)


def random_workload(shape: Shape, budget: Budget, *, dtype: str, folder: Path) -> Workload:
    """A Llama with random weights, a tokenizer of as many words, and five silos' records of random words."""
    training = budget.training(TrainingSection(epochs=1.0, learning_rate=1e-4, warmup=0.0))
    write_model(shape, folder / "model")
    _word_tokenizer(shape.vocabulary).save_pretrained(folder / "model")
    parties = []
    for number, name in enumerate(SILOS):
        rows = _synthetic(np.random.default_rng([1, number]), shape.vocabulary, training.max_tokens)
        enough = list(_until(rows, budget.tokens / len(SILOS)))
        test = {"id": "test", "task": "text", "prompt": "w3 w4", "response": "w5"}
        parties.append(_write_party(name, enough, test, folder / "data"))
    job = Job(
        job=JobSection(name="bench", seed=1),
        model=ModelSection(path=str(folder / "model"), cut=1, dtype=dtype),  # type: ignore[arg-type]  # checked by it
        data=DataSection(validation=0.0),
        adapter=AdapterSection(rank=shape.rank, alpha=2.0 * shape.rank),
        training=training,
        party=parties,
        **_without_extras(),
    )
    text = f"random Llama, hidden {shape.hidden}, {shape.layers} layers, vocabulary {shape.vocabulary:,}, tied"
    return _described(_write_job(job, folder), text)


def job_workload(loaded: LoadedJob, model: Path | None, budget: Budget, *, dtype: str | None, folder: Path) -> Workload:
    """A job's model, settings and silos, with as many of their training records as the budget says, by its seed.

    Raises:
        UsageError: the job is not one of method `split` with an adapter of kind `lora`.
        DataError, JobError, ModelError: its data or model are wrong.
    """
    job = loaded.job
    if job.job.method != "split" or job.adapter.kind != "lora":
        where = loaded.where("job", "method") if job.job.method != "split" else loaded.where("adapter", "kind")
        raise UsageError("the peers train LoRA for a job of method split, and this is none", where=where)
    path = model.resolve() if model else loaded.local_path(job.model.path)
    training = budget.training(job.training)
    tokenizer = load_tokenizer(path)
    encoder = Encoder(tokenizer=tokenizer, settings=job.data, max_tokens=training.max_tokens)
    parties = []
    for party in job.party:
        records = load_records(loaded.data_file(party.name, "train"), job.data.format)
        order = np.random.default_rng(job.job.seed).permutation(len(records))
        quota = budget.tokens / len(job.party) / (1.0 - job.data.validation)
        sized = ((_row(records[i]), len(encoder.training([records[i]])[0])) for i in order)
        tests = load_records(loaded.data_file(party.name, "test"), job.data.format)
        shortest = min(map(_row, tests), key=lambda row: len(json.dumps(row)))
        parties.append(_write_party(party.name, list(_until(sized, quota)), shortest, folder / "data"))
    changes: dict[str, Any] = {
        "model": ModelSection(path=str(path), cut=1, dtype=dtype or job.model.dtype),  # type: ignore[arg-type]  # ditto
        "data": job.data.model_copy(update={"format": "auto"}),
        "training": training,
        "party": parties,
        "enclave": type(job.enclave)(),
        "inference": type(job.inference)(),
        "release": type(job.release)(),
        **_without_extras(),
    }
    return _described(_write_job(job.model_copy(update=changes), folder), path.name)


def party_data(loaded: LoadedJob) -> dict[str, PartyData]:
    """Every silo's packs, as its party would make them."""
    tokenizer = load_tokenizer(loaded.local_path(loaded.job.model.path))
    files = {p.name: [loaded.data_file(p.name, kind) for kind in ("train", "test")] for p in loaded.job.party}
    return {name: prepare(loaded.job, tokenizer, *both) for name, both in files.items()}


def train_packs(data: dict[str, PartyData]) -> list[Pack]:
    """All silos' packs in one place."""
    return [pack for own in data.values() for pack in own.parts["train"].packs]


def _without_extras() -> dict[str, Any]:
    """No system scores test sets or saves checkpoints here; one test record is what a party must have."""
    return {"evaluation": EvaluationSection(baselines=[], max_examples=1), "checkpoint": CheckpointSection(count=0)}


def _write_job(job: Job, folder: Path) -> LoadedJob:
    path = folder / "job.toml"
    path.write_text(render_job(job), encoding="utf-8")
    return load_job(path)


def _described(loaded: LoadedJob, shape: str) -> Workload:
    data = party_data(loaded)
    packs = train_packs(data)
    tokens = sum(map(len, packs))
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(loaded.local_path(loaded.job.model.path), local_files_only=True)
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return Workload(
        loaded=loaded,
        shape=shape,
        parameters=sum(p.numel() for p in model.parameters()),
        layers=find_anatomy(model).num_layers,
        epoch_tokens=tokens,
        records=sum(own.parts["train"].records for own in data.values()),
        target_share=sum(len(pack.target_pos_N) for pack in packs) / tokens,
    )


def _write_party(name: str, train: list[dict[str, Any]], test: dict[str, Any], folder: Path) -> PartySection:
    folder.mkdir(exist_ok=True)
    paths = {"train": folder / f"{name}.jsonl", "test": folder / f"{name}-test.jsonl"}
    for path, rows in ((paths["train"], train), (paths["test"], [test])):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return PartySection(name=name, train=str(paths["train"]), test=str(paths["test"]))


def _until(sized: Iterable[tuple[dict[str, Any], int]], tokens: float) -> Iterator[dict[str, Any]]:
    """Rows until they hold so many tokens; at least two, so that one can be held out."""
    counted = 0
    for number, (row, size) in enumerate(sized):
        if number >= 2 and counted >= tokens:
            return
        counted += size
        yield row


def _row(record: Record) -> dict[str, Any]:
    """As a line of a file; what is scored by choosing stays behind."""
    if isinstance(record.prompt, str):
        return {"id": record.id, "task": record.task, "prompt": record.prompt, "response": record.response}
    messages = [*record.prompt, ("assistant", record.response)]
    rows = [{"role": role, "content": content} for role, content in messages]
    return {"id": record.id, "task": record.task, "messages": rows}


def _synthetic(rng: np.random.Generator, vocabulary: int, max_tokens: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Endless records of random words, each with its tokens, end of text included."""
    number = 0
    while True:
        sizes = [_length(rng, *_PROMPT), _length(rng, *_RESPONSE)]
        share = min(1.0, (max_tokens - 1) / sum(sizes))
        sizes = [max(1, int(size * share)) for size in sizes]
        prompt, response = (" ".join(f"w{i}" for i in rng.integers(_RESERVED, vocabulary, size)) for size in sizes)
        yield {"id": str(number), "task": "text", "prompt": prompt, "response": response}, sum(sizes) + 1
        number += 1


def _length(rng: np.random.Generator, median: float, spread: float, least: int, most: int) -> int:
    return int(np.clip(rng.lognormal(np.log(median), spread), least, most))


def _word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token a word: w3, w4, ..."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(_RESERVED, vocabulary)}
    inner = Tokenizer(models.WordLevel(vocab=words, unk_token="<unk>"))  # noqa: S106  # no password
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner,
        unk_token="<unk>",  # noqa: S106
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
    )
