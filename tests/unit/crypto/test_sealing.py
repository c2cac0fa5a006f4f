"""What is sealed opens with the same key, salt and purpose, whole, or not at all."""

from __future__ import annotations

import copy
import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest

from cloister.crypto import sealing
from cloister.crypto.sealing import SealingKey, write_durably
from cloister.errors import CapacityError, DataError, VerificationError

KEY = SealingKey(bytes(32))
SALT = b"s" * 32


def sealed(plain: bytes) -> bytes:
    return KEY.seal(plain, salt=SALT, purpose=b"purpose")


def opens(data: bytes, key: SealingKey = KEY, salt: bytes = SALT, purpose: bytes = b"purpose") -> bytes | None:
    with suppress(VerificationError):
        return key.open(data, salt=salt, purpose=purpose)
    return None


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 31, 32, 33, 64])
def test_any_length(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setattr(sealing, "CHUNK_BYTES", 16)
    plain = os.urandom(length)
    assert opens(sealed(plain)) == plain
    assert len(sealed(plain)) == length + 16 * max(1, -(-length // 16))


def test_every_altered_byte_cut_and_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "CHUNK_BYTES", 16)
    data = sealed(bytes(range(48)))
    for at in range(len(data)):
        assert opens(data[:at] + bytes([data[at] ^ 0x80]) + data[at + 1 :]) is None
        assert opens(data[:at]) is None
    for swapped in (data[32:64] + data[:32] + data[64:], data + data[64:], data[:32] + data[64:], data + b"\x00"):
        assert opens(swapped) is None


def test_another_key_salt_or_purpose() -> None:
    data = sealed(b"state")
    assert opens(data) == b"state"
    with pytest.raises(VerificationError) as error:
        KEY.open(data, salt=SALT, purpose=b"")
    assert error.value.code == "sealed"
    assert opens(data, key=SealingKey.generate()) is None
    assert opens(data, salt=b"t" * 32) is None
    assert opens(data, purpose=b"purposf") is None


def test_the_key_comes_back_from_its_shares() -> None:
    key = SealingKey.generate()
    shares = key.shares(quorum=2, count=3)
    data = key.seal(b"state", salt=SALT, purpose=b"")
    assert SealingKey.from_shares(shares[1:], quorum=2).open(data, salt=SALT, purpose=b"") == b"state"


def test_a_key_does_not_print_or_travel() -> None:
    assert repr(SealingKey(b"k" * 32)) == "SealingKey(***)"
    with pytest.raises(TypeError):
        copy.copy(KEY)
    with pytest.raises(ValueError, match="31"):
        SealingKey(bytes(31))


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_durably(path, b"old", b" content")
    assert path.read_bytes() == b"old content"
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o600

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CapacityError) as error:
        write_durably(path, b"new")
    assert error.value.where == str(path)
    assert path.read_bytes() == b"old content"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def read_only(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.EROFS, "Read-only file system")


def test_a_disk_that_became_read_only_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the half-written file cannot be removed either."""
    path = tmp_path / "file"
    write_durably(path, b"old")
    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(DataError, match="cannot write: Read-only file system") as error:
        write_durably(path, b"new")
    assert error.value.hint
    assert path.read_bytes() == b"old"
