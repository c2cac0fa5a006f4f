"""The parties' files as the study uses them: fixed held-out examples, and more silos than sets where asked.

Test sets are sampled once, evenly over tasks, so that every system and every seed answers the same examples. Choices
are kept where they are the labels of a classification (the same for all rows of the task); examination questions with
choices of their own, which a model of this size answers by chance, count by their bits alone.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cloister.errors import DataError
from cloister.job import Job, PartySection

Row = dict[str, Any]
_SEED = 1


def prepare_files(job: Job, folder: Path, *, examples: int) -> Job:
    """`job` over files in `folder`, with at most `examples` test records of each task of each party.

    Raises:
        DataError: a file is not JSON lines.
    """
    parties = []
    for party in job.party:
        rows = sample(classification_only(_rows(party.test)), examples)
        test = _write(folder / f"{party.name}.test.jsonl", rows)
        parties.append(party.model_copy(update={"test": str(test)}))
    changes = {"party": parties, "evaluation": job.evaluation.model_copy(update={"max_examples": None})}
    return job.model_copy(update=changes)


def split_silos(job: Job, folder: Path, count: int) -> Job:
    """Every set cut into `count` / sets parties along the rows' `silo`, without cutting a silo where that can be.

    Each party keeps the held-out records of its own silos.

    Raises:
        DataError: the count is no multiple of the number of sets, or a set has too few rows.
    """
    each, rest = divmod(count, len(job.party))
    if rest or each < 1:
        raise DataError(f"{count} silos are no multiple of the {len(job.party)} sets", where="number of silos")
    parties = list[PartySection]()
    for party in job.party:
        train, test = (_parts(_rows(path), each) for path in (party.train, party.test))
        for index in range(each):
            if not (train[index] and test[index]):
                raise DataError(f"has too few rows for {each} silos", where=f"party {party.name}")
            name = f"{party.name}.{index + 1}"
            own = {part: rows[index] for part, rows in (("train", train), ("test", test))}
            paths = {k: str(_write(folder / f"{count}" / f"{name}.{k}.jsonl", rows)) for k, rows in own.items()}
            parties.append(PartySection(name=name, train=paths["train"], test=paths["test"]))
    return job.model_copy(update={"party": parties})


def _parts(rows: Sequence[Row], count: int) -> list[list[Row]]:
    """Parts of about equal size: rows in the order of their silos, cut evenly."""
    ordered = sorted(rows, key=lambda row: (str(row.get("silo", "")), _rank(row)))
    edges = [len(ordered) * i // count for i in range(count + 1)]
    return [ordered[a:b] for a, b in pairwise(edges)]


def _rank(row: Row) -> str:
    """A row's place among those of its silo: by chance, the same everywhere."""
    return hashlib.sha256(str(row["id"]).encode()).hexdigest()


def classification_only(rows: Iterable[Row]) -> list[Row]:
    """Rows without the choices that are no labels."""
    kept, choices = list(rows), defaultdict[str, set[frozenset[str]]](set)
    for row in kept:
        choices[row.get("task", "")].add(frozenset(row.get("choices", ())))
    single = {task for task, found in choices.items() if len(found) == 1}
    judged = ("question", "choices", "answer")
    return [row if row.get("task", "") in single else {k: v for k, v in row.items() if k not in judged} for row in kept]


def sample(rows: Sequence[Row], examples: int) -> list[Row]:
    """At most `examples` rows of each task, in file order."""
    by_task = defaultdict[str, list[int]](list)
    for index, row in enumerate(rows):
        by_task[row.get("task", "")].append(index)
    rng = np.random.default_rng(_SEED)
    chosen = [members[i] for members in by_task.values() for i in rng.permutation(len(members))[:examples].tolist()]
    return [rows[index] for index in sorted(chosen)]


def _rows(path: str | None) -> list[Row]:
    file = Path(path or "")
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as exc:
        raise DataError("the study reads JSON lines, which this is not", where=str(file)) from exc


def _write(path: Path, rows: Iterable[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
