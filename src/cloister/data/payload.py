"""The payload of a bundle: a table of examples, packs, and an index at the end for reading them in any order.

    payload = table | pack_0 | pack_1 | ... | index | length of the index (8 bytes, little endian)

The table is JSON (what must be known of each example to score it); the index is a safetensors blob of three int64
rows: where each part ends, and the tokens and targets of each pack. Written and read as a stream: memory does not grow
with its size.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError

from cloister.data.activations import Schema, decode_pack, encode_pack, max_bytes
from cloister.data.packing import Pack
from cloister.data.records import MAX_NAME
from cloister.data.tokens import Example
from cloister.errors import ProtocolError

_MAX_INDEX_BYTES = 64 << 20
_MAX_TABLE_BYTES = 256 << 20


def write_payload(
    write: Callable[[bytes], object], packs: Iterable[Pack], examples: Sequence[Example], activation_dtype: str
) -> None:
    """Write a payload of packs that hold activations."""
    table = json.dumps([asdict(e) for e in examples], separators=(",", ":")).encode()
    write(table)
    ends, tokens, targets = [len(table)], [], []
    for pack in packs:
        blob = encode_pack(pack, activation_dtype)
        write(blob)
        ends.append(ends[-1] + len(blob))
        tokens.append(len(pack))
        targets.append(len(pack.target_pos_N))
    index = {"end": torch.tensor(ends), "tokens": torch.tensor(tokens), "targets": torch.tensor(targets)}
    blob = bytes(safetensors.torch.save({k: v.to(torch.int64) for k, v in index.items()}))
    write(blob)
    write(struct.pack("<Q", len(blob)))


def max_payload_bytes(packs: Sequence[Pack], examples: Sequence[Example], hidden: int, activation_dtype: str) -> int:
    """An upper bound of what `write_payload` writes, known before any activation is computed."""
    table = len(json.dumps([asdict(e) for e in examples], separators=(",", ":")).encode())
    integers = sum(12 * len(p) + 12 * len(p.target_pos_N) + 8 * len(p.group_role_G) for p in packs)
    values = sum(max_bytes(activation_dtype, len(p), hidden) for p in packs)
    # A safetensors header of ten names, shapes and places takes less than 1 KiB.
    return table + integers + values + (1024 + 24) * (len(packs) + 1)


@dataclass(frozen=True, kw_only=True)
class Payload:
    """An opened payload. `read(offset, length)` gives its bytes, authenticated; their meaning is unverified."""

    read: Callable[[int, int], bytes]
    schema: Schema
    dtype: torch.dtype
    where: str
    ends: list[int]
    tokens: list[int]
    targets: list[int]

    @classmethod
    def open(
        cls, read: Callable[[int, int], bytes], size: int, schema: Schema, dtype: torch.dtype, where: str
    ) -> Payload:
        """Read the index.

        Raises:
            ProtocolError: the index does not describe this payload.
        """
        if size < 8:
            raise ProtocolError("the payload is too short for an index", where=where)
        (length,) = struct.unpack("<Q", read(size - 8, 8))
        if length > min(size - 8, _MAX_INDEX_BYTES):
            raise ProtocolError(f"the payload's index claims {length} bytes", where=where)
        try:
            index = safetensors.torch.load(read(size - 8 - length, length))
            ends, tokens, targets = (index[k].tolist() for k in ("end", "tokens", "targets"))
        except (SafetensorError, KeyError, ValueError, RuntimeError) as exc:
            raise ProtocolError("the payload's index cannot be read", where=where) from exc
        sound = (
            all(t.dtype == torch.int64 and t.dim() == 1 for t in index.values())
            and len(ends) == len(tokens) + 1 == len(targets) + 1 >= 2
            and 0 <= ends[0] <= _MAX_TABLE_BYTES
            and all(a < b for a, b in itertools.pairwise(ends))
            and ends[-1] == size - 8 - length
            and all(0 < t <= schema.max_tokens for t in tokens)
            and all(0 < t < 2**31 for t in targets)
        )
        if not sound:
            raise ProtocolError("the payload's index does not fit the payload", where=where)
        return cls(read=read, schema=schema, dtype=dtype, where=where, ends=ends, tokens=tokens, targets=targets)

    def __len__(self) -> int:
        return len(self.tokens)

    def examples(self) -> list[Example]:
        """The table of examples.

        Raises:
            ProtocolError: it is malformed.
        """
        try:
            rows = json.loads(self.read(0, self.ends[0]))
            examples = [Example(**{**row, "choice_bytes": tuple(row["choice_bytes"])}) for row in rows]
        except (ValueError, TypeError, KeyError, RecursionError) as exc:
            raise ProtocolError("the payload's table of examples cannot be read", where=self.where) from exc
        for index, example in enumerate(examples):
            # By its place: the name is the party's, and the operator reads the enclave's errors.
            _check(example, f"{self.where}, example {index + 1}")
        return examples

    def __getitem__(self, index: int) -> Pack:
        start, end = self.ends[index], self.ends[index + 1]
        where = f"{self.where}, pack {index}"
        pack = decode_pack(self.read(start, end - start), self.schema, self.dtype, where)
        if len(pack) != self.tokens[index] or len(pack.target_pos_N) != self.targets[index]:
            raise ProtocolError("a pack has other counts than the index says", where=where)
        return pack


def _check(example: Example, where: str) -> None:
    numbers = (example.response_bytes, example.response_role, example.answer, *example.choice_bytes)
    sound = (
        _is_name(example.id)
        and _is_name(example.task)
        and all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
        and 0 < example.response_bytes < 2**31
        and all(0 < n < 2**31 for n in example.choice_bytes)
        and -1 <= example.answer < max(len(example.choice_bytes), 0)
        and -1 <= example.response_role < max(len(example.choice_bytes), 0)
    )
    if not sound:
        raise ProtocolError("an entry of the table of examples is malformed", where=where)


def _is_name(value: object) -> bool:
    """Text that can be written as UTF-8, not too long."""
    return isinstance(value, str) and len(value) <= MAX_NAME and not any("\ud800" <= c <= "\udfff" for c in value)
