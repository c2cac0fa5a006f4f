"""Sealed checkpoints on disk: whole or absent, the last two kept, a damaged one passed over."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cloister.agreement.checkpoint import Certificate, Seal, ShareRecord
from cloister.crypto.keys import PartyKey
from cloister.enclave.checkpoints import MAGIC, CheckpointFolder
from cloister.errors import CapacityError, DataError

KEY = PartyKey.generate()
RECORD = ShareRecord(
    job_id="00" * 32, manifest_sha256=bytes(32), instance_id=bytes(16), quorum=1, commitments={"north": bytes(32)}
).signed(KEY)


def seal(number: int, content: bytes) -> Seal:
    unsigned = Seal(
        job_id="00" * 32,
        manifest_sha256=bytes(32),
        instance_id=bytes(16),
        number=number,
        previous=bytes(32),
        step=number,
        shares_sha256=RECORD.sha256,
        salt=bytes(32),
    )
    return unsigned.signed(content, KEY)


def write(folder: CheckpointFolder, *numbers: int) -> None:
    for number in numbers:
        content = b"content %d" % number
        folder.write(seal(number, content), RECORD, content)


def names(path: Path) -> list[str]:
    return sorted(each.name for each in path.iterdir())


def test_an_empty_folder_is_not_made_by_looking(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    assert folder.newest() is None
    assert list(folder.certificates()) == []
    assert list(tmp_path.iterdir()) == []


def test_the_last_two_are_kept_with_their_certificates(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for number in (1, 2, 3):
        write(folder, number)
        folder.write_certificate(Certificate(seal=seal(number, b"content %d" % number)))
    assert names(tmp_path) == ["00000002.certificate", "00000002.sealed", "00000003.certificate", "00000003.sealed"]
    newest = folder.newest()
    assert newest is not None
    assert (newest.seal.number, newest.content(), newest.record) == (3, b"content 3", RECORD)
    assert [certificate.seal.number for certificate in folder.certificates()] == [3, 2]


def test_a_damaged_one_is_passed_over_and_replaced(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    write(folder, 4, 5)
    path = tmp_path / "00000005.sealed"
    whole = path.read_bytes()
    for damaged in (
        b"", whole[:5], whole[:-1], whole + b"\x00", b"X" + whole[1:], MAGIC + b"\xff" * 4, whole[:-1] + b"X",
    ):  # fmt: skip
        path.write_bytes(damaged)
        newest = folder.newest()
        assert newest is not None
        assert newest.seal.number == 4, damaged
    (tmp_path / "00000004.certificate").write_bytes(b"nonsense")
    assert list(folder.certificates()) == []
    (tmp_path / "00000009.sealed.part").write_bytes(b"a crash")
    (tmp_path / "notes.txt").write_bytes(b"not ours")
    write(folder, 5)
    newest = folder.newest()
    assert newest is not None
    assert newest.seal.number == 5


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path)
    write(folder, 1, 2)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CapacityError):
        write(folder, 3)
    assert names(tmp_path) == ["00000001.sealed", "00000002.sealed"]


def test_an_old_one_that_cannot_be_removed_does_not_cost_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(tmp_path)
    write(folder, 1, 2)

    def fail(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(Path, "unlink", fail)
    write(folder, 3)
    newest = folder.newest()
    assert newest is not None
    assert newest.seal.number == 3


def test_a_folder_that_cannot_be_made_or_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    folder = CheckpointFolder(tmp_path / "file" / "checkpoints")
    with pytest.raises(DataError, match="cannot write") as refused:
        write(folder, 1)
    assert "can be written to" in refused.value.hint
    folder = CheckpointFolder(tmp_path / "good")
    write(folder, 1)
    newest = folder.newest()
    assert newest is not None
    newest.path.unlink()
    with pytest.raises(DataError, match="cannot read"):
        newest.content()
