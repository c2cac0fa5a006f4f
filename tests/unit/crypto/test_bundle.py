"""Sealed bundles: writing, verifying and reading agree with a slow reader of the documented format."""

import errno
import hashlib
import os
import threading
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.crypto.bundle import (
    BundleHeader,
    BundleWriter,
    SealedReader,
    UnverifiedHeader,
    VerifiedBundle,
    read_header,
    verify_bundle,
)
from cloister.crypto.bundle import writer as writer_module
from cloister.crypto.bundle.scan import BundleScanner
from cloister.crypto.keys import DataKey, PartyKey
from cloister.errors import CapacityError, DataError, VerificationError
from tests.unit.crypto.bundles import CHUNK, JOB, PARTY, header, slow_read, verify, write

KEY = PartyKey.generate()


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 5 * CHUNK + 7])
def test_round_trip(tmp_path: Path, size: int) -> None:
    payload = os.urandom(size)
    path = tmp_path / "b"
    data_key = write(path, payload, KEY)
    bundle = verify(path, KEY)
    assert slow_read(path.read_bytes(), data_key) == (payload, bundle.commitment)
    assert bundle.payload_bytes == size
    assert bundle.num_chunks == max(1, -(-size // CHUNK))
    assert path.stat().st_size <= bundle.header.max_file_bytes
    with SealedReader(bundle, data_key) as reader:
        assert b"".join(reader.stream()) == payload
        assert reader.read(0, size) == payload


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 200), max_size=8), data=st.data())
def test_any_writes_any_reads(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("bundle") / "b"
    parts = [os.urandom(n) for n in sizes]
    with BundleWriter(path, header(), KEY) as writer:
        for part in parts:
            writer.write(memoryview(bytearray(part)))
    payload = b"".join(parts)
    with SealedReader(verify(path, KEY), writer.data_key) as reader:
        for _ in range(5):
            start = data.draw(st.integers(0, len(payload)))
            stop = data.draw(st.integers(start, len(payload)))
            assert reader.read(start, stop - start) == payload[start:stop]


def test_header_fields_arrive(tmp_path: Path) -> None:
    path = tmp_path / "b"
    write(path, b"x", KEY, kind="test", counts={"packs": 7, "tokens": 2**40})
    found = read_header(path).header
    assert found == read_header(path.read_bytes()).header == verify(path, KEY).header
    assert (found.kind, found.counts["tokens"], found.schema["hidden_size"]) == ("test", 2**40, 8)
    assert found.job_id == JOB
    with pytest.raises(TypeError):
        found.schema["hidden_size"] = 9  # type: ignore[index]  # the point: it is read-only


@pytest.mark.parametrize(
    "changes",
    [
        {"job_id": "AB" * 32},
        {"job_id": "ab"},
        {"party": "../../etc/passwd"},
        {"party": ""},
        {"kind": "other"},
        {"chunk_bytes": 1},
        {"chunk_bytes": 1 << 30},
        {"max_payload_bytes": -1},
        {"max_payload_bytes": 1 << 60},
        {"bundle_id": b"short"},
        {"counts": {"packs": -1}},
        {"counts": {"packs": 1.5}},
        {"counts": {"packs": True}},
    ],
)
def test_header_bounds(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must"):
        header(**changes)


def test_a_parsed_header_has_the_same_bounds() -> None:
    """What the constructor refuses must not come in through bytes either."""
    good = UnverifiedHeader.sign(header(), KEY)
    bad = good.encoded.replace(b"hospital-a", b"../etc/pwd")
    for encoded, signature in ((bad, good.signature), (good.encoded, b"short")):
        with pytest.raises(VerificationError) as refused:
            UnverifiedHeader.parse(encoded, signature)
        assert refused.value.code == "header"
    with pytest.raises(ValueError, match="header has"):
        header(schema={"x": "y" * 70000}).to_bytes()


def test_every_bundle_has_its_own_key_and_id(tmp_path: Path) -> None:
    keys = {write(tmp_path / "b", b"same", KEY).reveal() for _ in range(4)}
    assert len(keys) == 4
    assert header().bundle_id != header().bundle_id


def write_and_raise(path: Path, error: BaseException) -> None:
    with BundleWriter(path, header(), KEY) as writer:
        writer.write(b"x" * 500)
        assert path.with_name("b.part").exists()
        raise error


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="interrupted"):
        write_and_raise(tmp_path / "b", RuntimeError("interrupted"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="not open"):
        BundleWriter(tmp_path / "b", header(), KEY).write(b"x")


def test_an_exception_keeps_the_bundle_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "b"
    data_key = write(path, b"first", KEY)
    with pytest.raises(KeyboardInterrupt):
        write_and_raise(path, KeyboardInterrupt())
    assert slow_read(path.read_bytes(), data_key)[0] == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_more_than_the_header_allows(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="100 bytes"):
        write(tmp_path / "b", b"x" * 101, KEY, max_payload_bytes=100)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "b", b"x" * 100, KEY, max_payload_bytes=100)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("after", [0, 2, 200])
def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, after: int) -> None:
    """The disk is full after `after` bytes of a write: the error names path and bytes, and nothing is left."""
    real, left = os.write, [after]

    def short_write(fd: int, data: memoryview) -> int:
        if left[0] == 0:
            raise OSError(code, os.strerror(code))
        count = real(fd, data[: left[0]])
        left[0] -= count
        return count

    monkeypatch.setattr(os, "write", short_write)
    with pytest.raises(CapacityError, match=r"up to \d+ more bytes") as full:
        write(tmp_path / "b", b"x" * 4000, KEY)
    assert full.value.where == str(tmp_path / "b")
    assert full.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_disk_full_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os if function == "fsync" else Path, function, full)
    with pytest.raises(CapacityError, match="no space"):
        write(tmp_path / "b", b"x", KEY)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot write"):
        write(tmp_path / "none" / "b", b"x", KEY)
    with pytest.raises(DataError, match="cannot read"):
        verify(tmp_path / "none", KEY)


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    write(tmp_path / "b", b"x", KEY)
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o600


def test_a_bundle_that_vanishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_key = write(tmp_path / "b", b"x" * 100, KEY)
    bundle = verify(tmp_path / "b", KEY)
    with pytest.raises(VerificationError) as refused:
        verify_bundle(bundle.path, job_id=JOB, party=PARTY, public_key=KEY.public, max_bytes=100)
    assert refused.value.code == "size"
    with SealedReader(bundle, data_key) as reader:

        def failing(*_: object) -> int:
            raise OSError(errno.EIO, "input/output error")

        monkeypatch.setattr(reader, "_read_at", failing)
        with pytest.raises(DataError, match="input/output"):
            reader.read(0, 1)
    bundle.path.unlink()
    with pytest.raises(DataError, match="cannot read"):
        SealedReader(bundle, data_key)


def test_reads_outside_the_payload(tmp_path: Path) -> None:
    data_key = write(tmp_path / "b", b"x" * 100, KEY)
    with SealedReader(verify(tmp_path / "b", KEY), data_key) as reader:
        assert reader.read(100, 0) == b""
        for offset, length in ((0, 101), (100, 1), (-1, 1)):
            with pytest.raises(ValueError, match="outside"):
                reader.read(offset, length)


def test_reader_decrypts_only_what_covers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_key = write(tmp_path / "b", bytes(10 * CHUNK), KEY)
    with SealedReader(verify(tmp_path / "b", KEY), data_key) as reader:
        read: list[int] = []
        real = reader._read_at

        def counting(buffer: memoryview, offset: int) -> int:
            read.append(offset)
            return real(buffer, offset)

        monkeypatch.setattr(reader, "_read_at", counting)
        reader.read(3 * CHUNK + 1, CHUNK)
        reader.read(4 * CHUNK + 1, 5)  # the chunk that is in the buffer already
    assert read == [reader.bundle.chunk_offset(i) for i in (3, 4)]


def test_reader_without_preadv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv")
    payload = os.urandom(500)
    data_key = write(tmp_path / "b", payload, KEY)
    with SealedReader(verify(tmp_path / "b", KEY), data_key) as reader:
        assert reader.read(100, 300) == payload[100:400]


def test_reader_between_threads(tmp_path: Path) -> None:
    payload = os.urandom(40 * CHUNK)
    data_key = write(tmp_path / "b", payload, KEY)
    wrong: list[int] = []
    with SealedReader(verify(tmp_path / "b", KEY), data_key) as reader:

        def work(seed: int) -> None:
            for i in range(300):
                start = (seed * 7919 + i * 131) % (len(payload) - 100)
                if reader.read(start, 100) != payload[start : start + 100]:
                    wrong.append(start)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_no_thread_keeps_plaintext(tmp_path: Path) -> None:
    """Training reads in threads of its own, which are gone when the reader is closed."""
    data_key, kept = write(tmp_path / "b", b"x" * 500, KEY), []
    views = memoryview

    def watched(buffer: object) -> memoryview:
        kept.append(views(buffer))  # type: ignore[arg-type]
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cloister.crypto.bundle.reader.memoryview", watched, raising=False)
        with SealedReader(verify(tmp_path / "b", KEY), data_key) as reader:
            for _ in range(3):
                thread = threading.Thread(target=reader.read, args=(0, 500))
                thread.start()
                thread.join()
            assert any(b"xxxxxxxx" in bytes(view) for view in kept)
    # What was asked for is the reader's to keep; all else that it wrote plaintext to is wiped.
    assert not any(b"xxxxxxxx" in bytes(view) for view in kept if len(view) in (CHUNK, CHUNK + 16))


def test_a_wrong_key_leaves_no_plaintext(tmp_path: Path) -> None:
    write(tmp_path / "b", b"x" * 100, KEY)
    with SealedReader(verify(tmp_path / "b", KEY), DataKey.generate()) as reader:
        reader._plain[:] = b"p" * CHUNK
        with pytest.raises(VerificationError) as refused:
            reader.read(0, 10)
        assert refused.value.code == "tag"
        assert bytes(reader._plain) == bytes(CHUNK)


def test_commitment_is_over_ciphertext(tmp_path: Path) -> None:
    """SHA-256(header hash, SHA-256 of each chunk): two bundles of the same text differ."""
    write(tmp_path / "a", b"x" * 100, KEY)
    write(tmp_path / "b", b"x" * 100, KEY)
    a, b = verify(tmp_path / "a", KEY), verify(tmp_path / "b", KEY)
    assert a.commitment != b.commitment
    data = (tmp_path / "a").read_bytes()
    chunks = [data[a.chunk_offset(i) :][: a.chunk_length(i) + 16] for i in range(a.num_chunks)]
    leaves = b"".join(hashlib.sha256(c).digest() for c in chunks)
    assert a.leaves == leaves
    assert a.commitment == hashlib.sha256(a.header.hash + leaves).digest()


def test_memory_does_not_grow(tmp_path: Path) -> None:
    """Python's own allocations while writing, verifying and reading 32 MiB in 64 KiB chunks stay below 2 MiB."""
    piece = os.urandom(1 << 20)
    tracemalloc.start()
    try:
        big = header(chunk_bytes=1 << 16, max_payload_bytes=32 << 20)
        with BundleWriter(tmp_path / "b", big, KEY) as writer:
            for _ in range(32):
                writer.write(piece)
        with SealedReader(verify(tmp_path / "b", KEY), writer.data_key) as reader:
            digest = hashlib.sha256()
            for part in reader.stream():
                digest.update(part)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert digest.digest() == hashlib.sha256(piece * 32).digest()
    assert peak < 2 << 20


def test_other_fields_of_a_header_change_its_hash() -> None:
    base = header(bundle_id=bytes(16))
    others = [
        header(bundle_id=bytes(15) + b"x"),
        header(bundle_id=bytes(16), kind="test"),
        header(bundle_id=bytes(16), counts={}),
        header(bundle_id=bytes(16), party=PARTY + "x"),
    ]
    assert len({base.hash} | {h.hash for h in others}) == 5
    assert isinstance(base, BundleHeader)


def test_a_scan_that_is_not_done_gives_no_bundle(tmp_path: Path) -> None:
    scanner = BundleScanner(header(), KEY.public)
    with pytest.raises(RuntimeError, match="not done"):
        VerifiedBundle.from_scan(tmp_path / "b", header(), 0, scanner)


def test_renames_are_not_synced_where_the_system_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    monkeypatch.setattr(writer_module.os, "name", "nt")
    monkeypatch.setattr(writer_module.os, "open", lambda *path: opened.append(path))
    writer_module.sync_folder(tmp_path / "b")
    assert opened == []
