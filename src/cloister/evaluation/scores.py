"""Per-example scores: bits of each response, and whether the likeliest choice is the right one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cloister.data.packing import Pack
from cloister.data.tokens import Example
from cloister.errors import DataError, ProtocolError
from cloister.model.cut import Whole
from cloister.training.ahead import ahead
from cloister.training.loop import PackSource
from cloister.training.loss import target_nll
from cloister.training.team import Alone, Team


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One entry per test example of one party, in file order."""

    example_id: list[str]
    task: list[str]
    bits: NDArray[np.float64]
    """Negative log2-likelihood of the response text, summed over its tokens; the end-of-text token is not counted."""
    response_bytes: NDArray[np.int64]
    correct: NDArray[np.int8]
    """1 or 0 where the example has choices, else -1."""

    def __len__(self) -> int:
        return len(self.example_id)

    def bits_per_byte(self) -> float:
        return float(self.bits.sum() / self.response_bytes.sum())

    def take(self, index: Sequence[int] | NDArray[np.int64]) -> Scores:
        """The entries at `index`, in that order."""
        return Scores(
            example_id=[self.example_id[i] for i in index],
            task=[self.task[i] for i in index],
            bits=self.bits[np.asarray(index, dtype=np.int64)],
            response_bytes=self.response_bytes[np.asarray(index, dtype=np.int64)],
            correct=self.correct[np.asarray(index, dtype=np.int64)],
        )

    def to_json_lines(self) -> str:
        columns = zip(self.example_id, self.task, self.bits, self.response_bytes, self.correct, strict=True)
        rows = (
            {"id": i, "task": t, "bits": float(b), "response_bytes": int(n), "correct": int(c)}
            for i, t, b, n, c in columns
        )
        return "".join(json.dumps(row) + "\n" for row in rows)

    @classmethod
    def from_json_lines(cls, text: str, where: str = "scores") -> Scores:
        """Read what `to_json_lines` wrote.

        Raises:
            DataError: a line is malformed.
        """
        rows = []
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                row = json.loads(line)
                rows.append(
                    (
                        str(row["id"]),
                        str(row["task"]),
                        float(row["bits"]),
                        int(row["response_bytes"]),
                        int(row["correct"]),
                    )
                )
            except (ValueError, KeyError, TypeError) as exc:
                raise DataError("is not a line of scores", where=f"{where}:{number}") from exc
        ids, tasks, bits, sizes, correct = zip(*rows, strict=True) if rows else ((), (), (), (), ())
        return cls(
            example_id=list(ids),
            task=list(tasks),
            bits=np.array(bits, dtype=np.float64),
            response_bytes=np.array(sizes, dtype=np.int64),
            correct=np.array(correct, dtype=np.int8),
        )


def score(
    half: Whole,
    source: PackSource,
    examples: Sequence[Example],
    *,
    where: str,
    on_pack: Callable[[int], None] = lambda tokens: None,
    team: Team | None = None,
) -> Scores:
    """Score the test documents of one party. The model is used as it stands (set it to evaluation mode).

    Args:
        on_pack: Is told of tokens as they are done. team: Processes that share the packs; all get all scores.

    Raises:
        ProtocolError: the packs do not account for every text of every example once, or a likelihood is not finite
            (`where` names the party).
    """
    nats: dict[tuple[int, int], float] = {}
    for key, value in _all_nats(half, source, on_pack, team or Alone()):
        if key in nats:
            raise ProtocolError(f"text {key[1]} of example {key[0]} is scored twice", where=where)
        if not math.isfinite(value):
            raise ProtocolError(f"text {key[1]} of example {key[0]} has no finite likelihood", where=where)
        nats[key] = value
    expected = {(i, r) for i, e in enumerate(examples) for r in (e.response_role, *range(len(e.choice_bytes)))}
    for fault, keys in (
        ("is not accounted for by any pack", expected - set(nats)),
        ("is unknown", set(nats) - expected),
    ):
        if keys:
            example, role = min(keys)
            raise ProtocolError(f"text {role} of example {example} {fault}", where=where)
    rows = [_example_score(i, e, nats) for i, e in enumerate(examples)]
    return Scores(
        example_id=[e.id for e in examples],
        task=[e.task for e in examples],
        bits=np.array([r[0] for r in rows], dtype=np.float64),
        response_bytes=np.array([e.response_bytes for e in examples], dtype=np.int64),
        correct=np.array([r[1] for r in rows], dtype=np.int8),
    )


def _all_nats(
    half: Whole, source: PackSource, on_pack: Callable[[int], None], team: Team
) -> Iterator[tuple[tuple[int, int], float]]:
    """((example, role), nats) of each group of all packs, of which each process works on its share."""
    share, rows = team.share(source.tokens), list[tuple[float, float, float]]()
    with torch.no_grad():
        for pack in ahead(source, share.own):
            rows += [(example, role, value) for (example, role), value in _group_nats(half, pack)]
            on_pack(len(pack))
        for pack in ahead(source, share.idle):
            _group_nats(half, pack)
    if others := sum(source.tokens) - sum(source.tokens[index] for index in share.own):
        on_pack(others)
    for example, role, value in team.gather(torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)).tolist():
        yield (int(example), int(role)), value


def _group_nats(half: Whole, pack: Pack) -> list[tuple[tuple[int, int], float]]:
    """((example, role), nats) of each group."""
    nll_N = target_nll(half, pack.to(half.device)).double().cpu()
    sums_G = torch.zeros(len(pack.group_role_G), dtype=torch.float64).index_add_(0, pack.target_group_N, nll_N)
    keys = zip(pack.group_example_G.tolist(), pack.group_role_G.tolist(), strict=True)
    return list(zip(keys, sums_G.tolist(), strict=True))


def _example_score(index: int, example: Example, nats: dict[tuple[int, int], float]) -> tuple[float, int]:
    """(bits of the response, correct) of one example."""
    bits = nats[index, example.response_role] / math.log(2)
    # Length-normalised likelihood: nats per byte, so that tokenisation does not favour a choice.
    choice = [nats[index, k] / size for k, size in enumerate(example.choice_bytes)]
    return bits, int(int(np.argmin(choice)) == example.answer) if choice else -1
