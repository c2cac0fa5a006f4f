"""Receiving a bundle: resume at any byte, never more than the signed header allows, no wrong bundle ever complete."""

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.crypto.bundle import IncomingBundle, IncomingStore, UnverifiedHeader, read_header
from cloister.crypto.keys import PartyKey
from cloister.errors import CapacityError, DataError, ProtocolError, VerificationError
from tests.unit.crypto.bundles import CHUNK, JOB, PARTY, header, slow_read, write

KEY = PartyKey.generate()


class Sent:
    """A finished bundle at the sender."""

    def __init__(self, folder: Path, payload: bytes = b"p" * 500, **changes: object) -> None:
        self.payload = payload
        self.key = write(folder / "sent", payload, KEY, **changes)
        self.data = (folder / "sent").read_bytes()
        self.header = read_header(self.data)

    def begin(self, incoming: IncomingBundle) -> int:
        return incoming.begin(self.header.encoded, self.header.signature)


def receiver(folder: Path, *, max_payload_bytes: int = 1 << 20) -> IncomingBundle:
    return IncomingBundle(
        folder / "in",
        job_id=JOB,
        party=PARTY,
        public_key=KEY.public,
        chunk_bytes=CHUNK,
        max_payload_bytes=max_payload_bytes,
    )


def test_whole(tmp_path: Path) -> None:
    sent, incoming = Sent(tmp_path), receiver(tmp_path)
    offset = sent.begin(incoming)
    assert offset == len(sent.header.prefix)
    assert incoming.feed(offset, sent.data[offset:]) is True
    assert incoming.bundle is not None
    assert incoming.bundle.path == tmp_path / "in"
    assert slow_read((tmp_path / "in").read_bytes(), sent.key)[0] == sent.payload
    assert not incoming.part.exists()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), size=st.integers(0, 300))
def test_any_pieces_any_restarts(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, size: int) -> None:
    folder = tmp_path_factory.mktemp("incoming")
    sent, incoming = Sent(folder, os.urandom(size)), receiver(folder)
    offset = sent.begin(incoming)
    complete = False
    while not complete:
        piece = data.draw(st.integers(1, 400))
        complete = incoming.feed(offset, sent.data[offset : offset + piece])
        if data.draw(st.booleans()):  # the receiver restarts
            incoming = receiver(folder)
            expected, offset = offset + piece, sent.begin(incoming)
            assert offset == min(expected, len(sent.data))  # no byte is lost
            complete = incoming.bundle is not None
        else:
            offset += piece
    assert (folder / "in").read_bytes() == sent.data


def test_nothing_is_written_before_the_header_holds(tmp_path: Path) -> None:
    sent = Sent(tmp_path)
    (tmp_path / "sent").unlink()
    other = PartyKey.generate()
    cases = [
        ("signature", UnverifiedHeader.sign(sent.header.header, other)),
        ("job", UnverifiedHeader.sign(header(job_id="cd" * 32), KEY)),
        ("party", UnverifiedHeader.sign(header(party="hospital-b"), KEY)),
    ]
    for code, unverified in cases:
        with pytest.raises(VerificationError) as refused:
            receiver(tmp_path).begin(unverified.encoded, unverified.signature)
        assert refused.value.code == code
    with pytest.raises(VerificationError) as refused:
        receiver(tmp_path).begin(b"\x00", sent.header.signature)
    assert refused.value.code == "header"
    with pytest.raises(CapacityError, match="4096"):
        sent.begin(receiver(tmp_path, max_payload_bytes=4095))
    with pytest.raises(RuntimeError, match="before begin"):
        receiver(tmp_path).feed(0, b"x")
    assert list(tmp_path.iterdir()) == []


def test_wrong_offsets(tmp_path: Path) -> None:
    sent, incoming = Sent(tmp_path), receiver(tmp_path)
    offset = sent.begin(incoming)
    for wrong in (0, offset - 1, offset + 1, 1 << 40):
        with pytest.raises(ProtocolError, match=f"the next is {offset}"):
            incoming.feed(wrong, sent.data[offset:])
    assert incoming.feed(offset, sent.data[offset:])


def test_two_connections_send_the_same_bundle(tmp_path: Path) -> None:
    """The loser of each race is told the offset; the file is right whoever wins."""
    sent, incoming = Sent(tmp_path), receiver(tmp_path)
    first, second = sent.begin(incoming), sent.begin(incoming)
    assert first == second
    incoming.feed(first, sent.data[first : first + 100])
    with pytest.raises(ProtocolError):
        incoming.feed(second, sent.data[second : second + 50])
    assert incoming.feed(incoming.offset, sent.data[incoming.offset :])


def test_more_than_the_header_allows(tmp_path: Path) -> None:
    """A sender that owns the key cannot fill the disk beyond what it signed, whatever it sends."""
    sent, incoming = Sent(tmp_path), receiver(tmp_path)
    offset = sent.begin(incoming)
    with pytest.raises(ProtocolError, match="header allows"):
        incoming.feed(offset, bytes(sent.header.header.max_file_bytes))
    assert incoming.part.stat().st_size == offset


def test_bytes_after_the_end(tmp_path: Path) -> None:
    sent, incoming = Sent(tmp_path), receiver(tmp_path)
    offset = sent.begin(incoming)
    with pytest.raises(ProtocolError, match="after the bundle's end"):
        incoming.feed(offset, sent.data[offset:] + b"x")
    # The good bytes stay: the next attempt finds the bundle complete.
    sent.begin(incoming)
    assert incoming.bundle is not None


def test_a_wrong_byte_is_found_at_the_end_and_the_part_discarded(tmp_path: Path) -> None:
    sent, incoming = Sent(tmp_path), receiver(tmp_path)
    offset = sent.begin(incoming)
    altered = bytearray(sent.data)
    altered[-200] ^= 1
    with pytest.raises(VerificationError) as refused:
        incoming.feed(offset, bytes(altered[offset:]))
    assert refused.value.code == "commitment"
    assert refused.value.hint
    assert not incoming.part.exists()
    assert incoming.bundle is None
    assert sent.begin(incoming) == offset
    assert incoming.feed(offset, sent.data[offset:])


def test_a_wrong_frame_is_found_at_once(tmp_path: Path) -> None:
    sent, incoming = Sent(tmp_path), receiver(tmp_path)
    offset = sent.begin(incoming)
    with pytest.raises(VerificationError) as refused:
        incoming.feed(offset, b"\x00\x00\x00\x01" + bytes(10))
    assert refused.value.code == "frame"
    assert not incoming.part.exists()


def test_a_bundle_begun_anew_replaces_its_part(tmp_path: Path) -> None:
    first, incoming = Sent(tmp_path), receiver(tmp_path)
    offset = first.begin(incoming)
    incoming.feed(offset, first.data[offset : offset + 100])
    second = Sent(tmp_path)
    offset = second.begin(incoming)
    assert offset == len(second.header.prefix)
    assert incoming.feed(offset, second.data[offset:])
    assert slow_read((tmp_path / "in").read_bytes(), second.key)[0] == second.payload


@pytest.mark.parametrize("restart", [False, True])
def test_a_complete_bundle_is_kept(tmp_path: Path, restart: bool) -> None:
    first, incoming = Sent(tmp_path), receiver(tmp_path)
    offset = first.begin(incoming)
    incoming.feed(offset, first.data[offset:])
    if restart:
        incoming = receiver(tmp_path)
    with pytest.raises(ProtocolError, match="already"):
        Sent(tmp_path).begin(incoming)
    assert first.begin(incoming) == len(first.data)
    assert incoming.bundle is not None
    with pytest.raises(ProtocolError):
        incoming.feed(len(first.data), b"x")
    assert (tmp_path / "in").read_bytes() == first.data


def test_a_complete_file_that_changed_on_disk_is_fetched_again(tmp_path: Path) -> None:
    sent, incoming = Sent(tmp_path), receiver(tmp_path)
    offset = sent.begin(incoming)
    incoming.feed(offset, sent.data[offset:])
    altered = bytearray(sent.data)
    altered[-200] ^= 1
    (tmp_path / "in").write_bytes(altered)
    incoming = receiver(tmp_path)
    offset = sent.begin(incoming)
    assert offset < len(altered)
    assert incoming.bundle is None
    assert incoming.feed(offset, sent.data[offset:])
    assert (tmp_path / "in").read_bytes() == sent.data


def test_disk_full_keeps_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent, incoming = Sent(tmp_path), receiver(tmp_path)
    offset = sent.begin(incoming)
    real, left = os.write, [150]

    def short_write(fd: int, data: memoryview) -> int:
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "full")
        count = real(fd, data[: left[0]])
        left[0] -= count
        return count

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", short_write)
        with pytest.raises(CapacityError, match="no space"):
            incoming.feed(offset, sent.data[offset:])
    assert sent.begin(incoming) == offset + 150
    assert incoming.feed(offset + 150, sent.data[offset + 150 :])


def test_a_folder_that_is_gone_and_a_part_that_cannot_be_read(tmp_path: Path) -> None:
    sent = Sent(tmp_path)
    gone = IncomingBundle(
        tmp_path / "none" / "in",
        job_id=JOB,
        party=PARTY,
        public_key=KEY.public,
        chunk_bytes=CHUNK,
        max_payload_bytes=1 << 20,
    )
    with pytest.raises(DataError, match="cannot write"):
        sent.begin(gone)
    incoming = receiver(tmp_path)
    incoming.part.mkdir()
    with pytest.raises(DataError, match="cannot read"):
        sent.begin(incoming)


def test_disk_full_at_the_very_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent, incoming = Sent(tmp_path), receiver(tmp_path)

    def full(fd: int, data: memoryview) -> int:
        if len(data) <= 10:
            raise OSError(errno.ENOSPC, "full")
        return real(fd, data[: len(data) - 10])

    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(CapacityError):
            sent.begin(incoming)
    assert sent.begin(incoming) == len(sent.header.prefix)
    assert incoming.feed(incoming.offset, sent.data[incoming.offset :])


def test_disk_full_at_the_very_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent, incoming = Sent(tmp_path), receiver(tmp_path)
    offset = sent.begin(incoming)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CapacityError):
            incoming.feed(offset, sent.data[offset:])
    assert incoming.bundle is None
    assert sent.begin(incoming) == len(sent.data)
    assert incoming.bundle is not None


def test_a_crash_before_what_followed_the_end_was_cut_off(tmp_path: Path) -> None:
    sent, incoming = Sent(tmp_path), receiver(tmp_path)
    incoming.part.write_bytes(sent.data + bytes(3 << 20))
    assert sent.begin(incoming) == len(sent.data)
    assert (tmp_path / "in").read_bytes() == sent.data


def test_a_part_that_went_bad_on_disk(tmp_path: Path) -> None:
    """Found when it is taken up again, or at the end; then the upload begins anew."""
    sent, incoming = Sent(tmp_path), receiver(tmp_path)
    start = len(sent.header.prefix)
    incoming.part.write_bytes(sent.data[:start] + b"\x00\x00\x00\x01" + bytes(9))
    with pytest.raises(VerificationError) as refused:
        sent.begin(incoming)
    assert refused.value.code == "frame"
    assert sent.begin(incoming) == start
    assert incoming.feed(start, sent.data[start:])


def test_chunks_of_another_size_than_the_jobs(tmp_path: Path) -> None:
    """A hash is kept of every chunk: a party must not choose how many there are."""
    sent, incoming = Sent(tmp_path, chunk_bytes=2 * CHUNK), receiver(tmp_path)
    with pytest.raises(VerificationError, match="chunks of 128 bytes") as refused:
        sent.begin(incoming)
    assert (refused.value.code, refused.value.where) == ("header", PARTY)
    assert not incoming.part.exists()


def test_store(tmp_path: Path) -> None:
    store = IncomingStore(
        tmp_path, job_id=JOB, public_keys={PARTY: KEY.public}, chunk_bytes=CHUNK, max_payload_bytes=1 << 20
    )
    assert store(header()) is store(header()) is store.expected(PARTY, "train")
    assert store(header(kind="test")) is not store(header())
    assert store(header()).path == tmp_path / "hospital-a.train.bundle"
    with pytest.raises(VerificationError) as refused:
        store(header(party="stranger"))
    assert refused.value.code == "party"


def test_a_disk_that_became_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a damaged bundle nor another bundle's part is taken for this one because it cannot be removed."""
    sent, incoming = Sent(tmp_path), receiver(tmp_path)
    incoming.path.write_bytes(sent.data[:-1])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", read_only)
        with pytest.raises(DataError, match="cannot write: Read-only"):
            sent.begin(incoming)
    incoming.path.unlink()
    incoming.part.write_bytes(b"another bundle")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", read_only)
        with pytest.raises(DataError, match="cannot write: Read-only"):
            sent.begin(incoming)
    assert sent.begin(incoming) < len(sent.data)


def read_only(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.EROFS, "Read-only file system")
