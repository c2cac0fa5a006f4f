"""Attacks on bundles: every altered byte, cut, swap, substitution; each ends in a VerificationError of its own."""

import dataclasses
import itertools
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister.crypto.bundle import SealedReader, UnverifiedHeader
from cloister.crypto.bundle.header import TRAILER_LABEL, chunk_aad, chunk_nonce, trailer_message
from cloister.crypto.encoding import encode
from cloister.crypto.keys import PartyKey
from cloister.errors import VerificationError
from tests.unit.crypto.bundles import CHUNK, JOB, PARTY, verify, write

KEY = PartyKey.generate()
PAYLOAD = os.urandom(4 * CHUNK + 10)


def refusal(path: Path, data: bytes, **identity: str) -> str:
    """The code with which `data` is refused as this party's bundle for this job."""
    path.write_bytes(data)
    with pytest.raises(VerificationError) as refused:
        verify(path, KEY, **identity)
    assert refused.value.where
    return refused.value.code


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write(tmp_path / "b", PAYLOAD, KEY)
    return tmp_path / "b"


def test_every_altered_byte_is_found(bundle: Path) -> None:
    data = bundle.read_bytes()
    codes = set()
    for at in range(len(data)):
        for bit in (0x01, 0x80):
            codes.add(refusal(bundle, data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]))
    assert {"magic", "header", "job", "party", "signature", "frame", "commitment", "trailer"} <= codes


def test_every_cut_is_found(bundle: Path) -> None:
    data = bundle.read_bytes()
    assert {refusal(bundle, data[:length]) for length in range(len(data))} == {"truncated"}


def test_bytes_after_the_end(bundle: Path) -> None:
    data = bundle.read_bytes()
    assert refusal(bundle, data + b"\x00") == "trailing"
    assert refusal(bundle, data + bytes(1 << 20)) == "size"  # not even read


def test_another_job_party_or_key(bundle: Path, tmp_path: Path) -> None:
    data = bundle.read_bytes()
    assert refusal(bundle, data, job_id="cd" * 32) == "job"
    assert refusal(bundle, data, party="hospital-b") == "party"
    write(tmp_path / "other", PAYLOAD, PartyKey.generate())
    assert refusal(bundle, (tmp_path / "other").read_bytes()) == "signature"


def frames(path: Path) -> tuple[bytes, list[bytes], bytes]:
    """(everything before, frames, everything after) of a bundle."""
    found = verify(path, KEY)
    data = path.read_bytes()
    starts = [found.chunk_offset(i) - 4 for i in range(found.num_chunks)]
    end = starts[-1] + 4 + found.chunk_length(found.num_chunks - 1) + 16
    cuts = [*starts, end]
    return data[: starts[0]], [data[a:b] for a, b in itertools.pairwise(cuts)], data[end:]


def test_chunks_swapped_dropped_repeated(bundle: Path) -> None:
    head, chunks, tail = frames(bundle)
    swapped = [chunks[1], chunks[0], *chunks[2:]]
    assert refusal(bundle, head + b"".join(swapped) + tail) == "commitment"
    assert refusal(bundle, head + b"".join(chunks[1:]) + tail) == "commitment"
    assert refusal(bundle, head + b"".join([chunks[0], *chunks]) + tail) == "commitment"
    assert refusal(bundle, head + b"".join(chunks[:-1]) + tail) in ("frame", "truncated")


def test_an_early_last_flag(bundle: Path) -> None:
    """The host cuts the bundle behind chunk 1 and marks that chunk as the last."""
    head, chunks, tail = frames(bundle)
    last = (int.from_bytes(chunks[1][:4], "big") | 1 << 31).to_bytes(4, "big") + chunks[1][4:]
    assert refusal(bundle, head + chunks[0] + last + tail) == "commitment"


def test_mixing_two_bundles_of_one_party(bundle: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", os.urandom(len(PAYLOAD)), KEY)
    head, chunks, tail = frames(bundle)
    other_head, other_chunks, other_tail = frames(tmp_path / "other")
    assert refusal(bundle, head + b"".join([*chunks[:-1], other_chunks[-1]]) + tail) == "commitment"
    assert refusal(bundle, head + b"".join(other_chunks) + other_tail) == "signature"
    assert refusal(bundle, other_head + b"".join(chunks) + tail) == "signature"


def test_a_huge_header_length_allocates_nothing(bundle: Path) -> None:
    data = bundle.read_bytes()
    assert refusal(bundle, data[:8] + b"\xff\xff\xff\xff" + data[12:]) == "header"


def test_the_disk_changes_after_verification(tmp_path: Path) -> None:
    """Whoever holds the data key makes another chunk with a valid tag, after the commitment was signed."""
    path = tmp_path / "b"
    data_key = write(path, PAYLOAD, KEY)
    found = verify(path, KEY)
    nonce, aad = chunk_nonce(0), chunk_aad(found.header.hash, 0, last=False)
    forged = AESGCM(data_key.reveal()).encrypt(nonce, b"z" * CHUNK, aad)
    data = bytearray(path.read_bytes())
    data[found.chunk_offset(0) : found.chunk_offset(0) + len(forged)] = forged
    with SealedReader(found, data_key) as reader:
        path.write_bytes(data)
        with pytest.raises(VerificationError) as refused:
            reader.read(0, 10)
        assert refused.value.code == "chunk"
        assert reader.read(CHUNK, 10) == PAYLOAD[CHUNK : CHUNK + 10]
        os.truncate(path, found.chunk_offset(2))
        with pytest.raises(VerificationError) as refused:
            reader.read(2 * CHUNK, 10)
        assert refused.value.code == "chunk"


def test_a_trailer_that_lies_about_the_length(bundle: Path) -> None:
    """Even the party itself cannot sign a payload length that its chunks do not have."""
    found = verify(bundle, KEY)
    head, chunks, _ = frames(bundle)
    lie = found.payload_bytes - 1
    signature = KEY.sign(TRAILER_LABEL, trailer_message(found.header.hash, lie, found.commitment))
    trailer = encode({"payload_bytes": lie, "commitment": found.commitment, "signature": signature})
    assert refusal(bundle, head + b"".join(chunks) + len(trailer).to_bytes(4, "big") + trailer) == "commitment"


def test_a_signature_of_something_else_is_no_trailer(bundle: Path) -> None:
    found = verify(bundle, KEY)
    head, chunks, _ = frames(bundle)
    message = trailer_message(found.header.hash, found.payload_bytes, found.commitment)
    trailer = encode(
        {
            "payload_bytes": found.payload_bytes,
            "commitment": found.commitment,
            "signature": KEY.sign("bundle header", message),
        }
    )
    assert refusal(bundle, head + b"".join(chunks) + len(trailer).to_bytes(4, "big") + trailer) == "signature"
    assert (found.header.job_id, found.header.party) == (JOB, PARTY)


def test_chunks_beyond_the_signed_limit(tmp_path: Path) -> None:
    """A party signs a small limit and sends more: refused at the chunk that goes beyond it."""
    path = tmp_path / "b"
    write(path, bytes(CHUNK + 1), KEY, max_payload_bytes=CHUNK + 1)
    head, chunks, tail = frames(path)
    small = UnverifiedHeader.sign(dataclasses.replace(verify(path, KEY).header, max_payload_bytes=CHUNK), KEY)
    assert len(head) == len(small.prefix)
    assert refusal(path, small.prefix + b"".join(chunks) + tail) == "size"
