"""Helpers: small bundles, and a slow reader written from the format's description alone (the oracle)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import cbor2
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister.crypto.bundle import BundleHeader, BundleWriter, VerifiedBundle, verify_bundle
from cloister.crypto.keys import DataKey, PartyKey

JOB = "ab" * 32
PARTY = "hospital-a"
CHUNK = 64


def header(**changes: Any) -> BundleHeader:
    values: dict[str, Any] = {
        "job_id": JOB,
        "party": PARTY,
        "kind": "train",
        "schema": {"activation_dtype": "float32", "hidden_size": 8},
        "counts": {"packs": 3},
        "chunk_bytes": CHUNK,
        "max_payload_bytes": 4096,
    }
    return BundleHeader(**(values | changes))


def write(path: Path, payload: bytes, key: PartyKey, **changes: Any) -> DataKey:
    with BundleWriter(path, header(**changes), key) as writer:
        writer.write(payload)
    return writer.data_key


def verify(path: Path, key: PartyKey, *, job_id: str = JOB, party: str = PARTY) -> VerifiedBundle:
    return verify_bundle(path, job_id=job_id, party=party, public_key=key.public)


def slow_read(data: bytes, data_key: DataKey) -> tuple[bytes, bytes]:
    """(payload, commitment) of a bundle's bytes, by the book and without any check but the tags."""

    def take(count: int) -> bytes:
        nonlocal data
        taken, data = data[:count], data[count:]
        return taken

    assert take(8) == b"CLSTRBN1"
    header_hash = hashlib.sha256(take(int.from_bytes(take(4), "big"))).digest()
    take(64)
    aead, payload, leaves, index, last = AESGCM(data_key.reveal()), b"", b"", 0, False
    while not last:
        word = int.from_bytes(take(4), "big")
        last = word >= 1 << 31
        chunk = take(word % (1 << 31))
        aad = header_hash + index.to_bytes(8, "big") + (b"\x01" if last else b"\x00")
        payload += aead.decrypt(index.to_bytes(12, "big"), chunk, aad)
        leaves += hashlib.sha256(chunk).digest()
        index += 1
    trailer = cbor2.loads(take(int.from_bytes(take(4), "big")))
    commitment = hashlib.sha256(header_hash + leaves).digest()
    assert data == b""
    assert (trailer["payload_bytes"], trailer["commitment"]) == (len(payload), commitment)
    return payload, commitment
