"""A party's records as the packs of a job: train, validation and test. The same for a party and for the baselines."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from cloister.data.packing import Pack, pack_documents
from cloister.data.records import Record, load_records
from cloister.data.tokens import Encoder, Example, Truncation
from cloister.errors import DataError
from cloister.job import Job

KINDS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One kind of a party's data. Training parts have no examples: nobody scores them one by one."""

    records: int
    packs: list[Pack]
    examples: list[Example]


@dataclass(frozen=True, kw_only=True)
class PartyData:
    """All of a party's data, by kind. `validation` is missing where the job keeps no records for it."""

    parts: dict[str, Part]
    truncated: Truncation


def prepare(job: Job, tokenizer: PreTrainedTokenizerBase, train: Path, test: Path) -> PartyData:
    """Read, tokenise and pack a party's files. Depends on the files and the job alone.

    Raises:
        DataError: a file or record is malformed, or there are too few.
    """
    encoder = Encoder(tokenizer=tokenizer, settings=job.data, max_tokens=job.training.max_tokens)
    records = load_records(train, job.data.format)
    if job.data.validation > 0 and len(records) < 2:
        hint = "give more records, or set validation = 0 in the job"
        raise DataError("one record is too few to keep some for validation", where=str(train), hint=hint)
    training, validation = _hold_out(records, job)
    tests = _first(load_records(test, job.data.format), job.evaluation.max_examples, job.job.seed)
    seed, width = job.job.seed, job.training.max_tokens
    parts = {
        "train": Part(records=len(training), packs=pack_documents(encoder.training(training), width, seed), examples=[])
    }
    for kind, records in (("validation", validation), ("test", tests)):
        if records:
            documents, examples = encoder.scoring(records, choices=kind == "test")
            packs = pack_documents(documents, width, seed)
            parts[kind] = Part(records=len(records), packs=packs, examples=examples)
    return PartyData(parts=parts, truncated=encoder.truncated)


def files_sha256(paths: Iterable[Path]) -> str:
    """SHA-256 over the contents of data files, hex: whether they are still what something was made from."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _hold_out(records: list[Record], job: Job) -> tuple[list[Record], list[Record]]:
    """(training, validation) records; a seeded choice, at least one of each where a share is asked for."""
    count = round(job.data.validation * len(records))
    if job.data.validation > 0:
        count = min(max(count, 1), len(records) - 1)
    held = set(_seeded_choice(len(records), count, job.job.seed))
    return [r for i, r in enumerate(records) if i not in held], [records[i] for i in sorted(held)]


def _first(records: list[Record], most: int | None, seed: int) -> list[Record]:
    """At most `most` records: the first ones of a seeded shuffle, in file order."""
    if most is None or most >= len(records):
        return records
    return [records[i] for i in sorted(_seeded_choice(len(records), most, seed))]


def _seeded_choice(size: int, count: int, seed: int) -> Sequence[int]:
    return np.random.default_rng(seed).permutation(size)[:count].tolist()  # type: ignore[no-any-return]
