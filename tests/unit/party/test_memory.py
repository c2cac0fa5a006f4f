"""What a party remembers: written whole, read again before every decision, damaged never taken for empty."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from cloister.agreement.checkpoint import Position
from cloister.errors import DataError, VerificationError
from cloister.party.memory import Followed, Memory, State

MANIFEST = b"m" * 32
FULL = State(
    manifest_sha256=MANIFEST,
    position=Position(number=3, hash=b"h" * 32),
    instances=(Followed(id=b"i" * 16, signing_key=b"k" * 32, since=7),),
    shares={"69" * 16: b"s" * 34},
    consent=b"consent",
    authorised=("5: 4 -> 3",),
)


def test_a_new_memory_is_at_the_manifest(tmp_path: Path) -> None:
    state = Memory(tmp_path / "memory", MANIFEST).read()
    assert state.position == Position(number=0, hash=MANIFEST)
    assert state.current == b""
    assert state.certified() is None
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_read_by_another_start(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    first = Memory(path, MANIFEST).write(FULL)
    assert Memory(path, MANIFEST).read() == first == replace(FULL, counter=1)
    assert Memory(path, MANIFEST).write(first).counter == 2
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o600


def test_shares_do_not_print() -> None:
    assert "ssss" not in repr(FULL)


def test_damage_is_not_forgetting(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    memory = Memory(path, MANIFEST)
    memory.write(FULL)
    content = path.read_bytes()
    for damaged in (b"", content[:-1], content + b"\x00", b"\xa0", b"\xff" * 9):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged"):
            memory.read()
    path.write_bytes(content)
    with pytest.raises(DataError, match="another manifest"):
        Memory(path, bytes(32)).read()
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="cannot read"):
        memory.read()


def test_one_instance_is_followed(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "memory", MANIFEST)
    with pytest.raises(VerificationError) as error:
        memory.check_followed(b"i" * 16)
    assert error.value.code == "lease"
    memory.write(FULL)
    assert memory.check_followed(b"i" * 16).position.number == 3
    Memory(tmp_path / "memory", MANIFEST).write(
        replace(FULL, instances=(*FULL.instances, Followed(id=b"j" * 16, signing_key=b"l" * 32, since=8)))
    )
    with pytest.raises(VerificationError):
        memory.check_followed(b"i" * 16)
