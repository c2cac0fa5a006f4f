"""The protocol a second time: plain functions written from docs/protocol.md, with none of Cloister's code.

They read the vectors; what does not hold raises AssertionError, InvalidTag or InvalidSignature. Slow and simple on
purpose. A test makes sure that nothing of cloister is imported here.
"""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

import cbor2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256, SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

# Conventions ----------------------------------------------------------------------------------------------------------


def join(*fields: bytes) -> bytes:
    return b"".join(struct.pack(">Q", len(field)) + field for field in fields)


def sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def check_signature(public: bytes, label: str, message: bytes, signature: bytes) -> None:
    signed = join(b"cloister signature v1", label.encode(), message)
    Ed25519PublicKey.from_public_bytes(public).verify(signature, signed)


def uncbor(data: bytes) -> Any:
    """Canonical CBOR of our kind: whatever a plain encoder would write otherwise is refused."""
    try:
        value = cbor2.loads(data)
    except cbor2.CBORDecodeError as exc:
        raise ValueError("not CBOR") from exc
    assert cbor2.dumps(value, canonical=True) == data
    return value


def fingerprint(public: bytes) -> str:
    digits = sha256(b"cloister key fingerprint v1", public).hex()[:32]
    return " ".join(digits[i : i + 4] for i in range(0, 32, 4))


# Evidence -------------------------------------------------------------------------------------------------------------


def report_data(label: str, *fields: bytes) -> bytes:
    return hashlib.sha512(join(b"cloister report data v1", label.encode(), *fields)).digest()


def session_report_data(role: str, job_id: str, transcript: bytes) -> bytes:
    return report_data("session", role.encode(), job_id.encode(), transcript)


def instance_report_data(job_id: str, instance_id: bytes, signing_key: bytes, hpke_key: bytes, nonce: bytes) -> bytes:
    return report_data("instance-keys", job_id.encode(), instance_id, signing_key, hpke_key, nonce)


def device_nonce(data: bytes) -> bytes:
    return sha256(join(b"cloister device nonce v1", data))


SIMULATED_PUBLIC = bytes.fromhex("41f9795de45e183127df195ab1de88e4853a961f662695f8309272362f42be29")


def open_simulated(evidence: bytes, expected: bytes) -> bytes:
    """The measurement in simulated evidence that is bound to `expected`."""
    envelope = uncbor(evidence)
    assert (envelope["version"], envelope["type"]) == (1, "simulated")
    assert (envelope["collateral"], envelope["event_log"], envelope["devices"]) == (b"", b"", [])
    blob = uncbor(envelope["blob"])
    check_signature(SIMULATED_PUBLIC, "simulated evidence", blob["body"], blob["signature"])
    body = uncbor(blob["body"])
    assert body["report_data"] == expected
    return bytes(body["measurement"])


# Handshake and records ------------------------------------------------------------------------------------------------


def handshake_hash(label: str, *fields: bytes) -> bytes:
    return hashlib.sha512(join(b"cloister handshake v1", label.encode(), *fields)).digest()


def session_key(master: bytes, label: str, transcript: bytes) -> bytes:
    return HKDFExpand(SHA512(), 32, join(b"cloister session v1", label.encode(), transcript)).derive(master)


class Handshake:
    """What the party computes from its private keys and the three messages."""

    def __init__(self, hello: bytes, reply: bytes, finish: bytes, x25519: bytes, mlkem_seed: bytes) -> None:
        assert (hello[0], reply[0], finish[0]) == (1, 2, 3)
        self.hello, outer = uncbor(uncbor(hello[1:])["body"]), uncbor(reply[1:])
        share = uncbor(outer["share"])
        exchanged = X25519PrivateKey.from_private_bytes(x25519).exchange(
            X25519PublicKey.from_public_bytes(share["x25519"])
        )
        secret = MLKEM768PrivateKey.from_seed_bytes(mlkem_seed).decapsulate(share["mlkem"]) + exchanged
        self.t1 = handshake_hash("reply", hello, outer["share"])
        self.master = HKDF(SHA512(), 64, self.t1, b"cloister session v1 master").derive(secret)
        self.evidence = uncbor(self._open("enclave handshake", self.t1, outer["sealed"]))["evidence"]
        self.t2 = handshake_hash("evidence", self.t1, outer["sealed"])
        self.finish = uncbor(self._open("party handshake", self.t2, finish[1:]))
        self.t3 = handshake_hash("finish", self.t2, finish)
        self.record_keys = {side: session_key(self.master, f"{side} records", self.t3) for side in ("party", "enclave")}
        body = uncbor(hello[1:])
        self.hello_body, self.hello_signature = body["body"], body["signature"]

    def _open(self, label: str, transcript: bytes, sealed: bytes) -> bytes:
        return AESGCM(session_key(self.master, label, transcript)).decrypt(bytes(12), sealed, transcript)


def seal_records(key: bytes, message: bytes, counter: int) -> list[bytes]:
    pieces = [message[i : i + (1 << 20)] for i in range(0, len(message), 1 << 20)] or [b""]
    return [
        seal_record(key, 0x12 if i == len(pieces) - 1 else 0x11, piece, counter + i) for i, piece in enumerate(pieces)
    ]


def seal_record(key: bytes, kind: int, plain: bytes, counter: int) -> bytes:
    return bytes([kind]) + AESGCM(key).encrypt(counter.to_bytes(12, "big"), plain, bytes([kind]))


# Bundles --------------------------------------------------------------------------------------------------------------


def open_bundle(data: bytes, public: bytes, data_key: bytes) -> tuple[dict[str, Any], bytes, bytes]:
    """(header, payload, commitment)"""
    assert data[:8] == b"CLSTRBN1"
    at = 12 + int.from_bytes(data[8:12], "big")
    header_hash, header = sha256(data[12:at]), uncbor(data[12:at])
    check_signature(public, "bundle header", header_hash, data[at : at + 64])
    at, payload, leaves, last = at + 64, b"", [], False
    while not last:
        (word,) = struct.unpack(">I", data[at : at + 4])
        last, length = word >> 31 == 1, word & 0x7FFFFFFF
        chunk = data[at + 4 : at + 4 + length]
        assert len(chunk) == length
        assert last or length == header["chunk_bytes"] + 16
        bound = header_hash + struct.pack(">QB", len(leaves), last)
        payload += AESGCM(data_key).decrypt(len(leaves).to_bytes(12, "big"), chunk, bound)
        leaves.append(sha256(chunk))
        at += 4 + length
    trailer = uncbor(data[at + 4 :])
    assert int.from_bytes(data[at : at + 4], "big") == len(data) - at - 4
    commitment = sha256(header_hash, *leaves)
    assert (trailer["commitment"], trailer["payload_bytes"]) == (commitment, len(payload))
    signed = {"header": header_hash, "payload_bytes": len(payload), "commitment": commitment}
    check_signature(public, "bundle trailer", cbor2.dumps(signed, canonical=True), trailer["signature"])
    return header, payload, commitment


# Keys and sealed state ------------------------------------------------------------------------------------------------


def wrap_info(manifest_sha256: bytes, instance_id: bytes, party: str, kind: str) -> bytes:
    return join(b"cloister data key v1", manifest_sha256, instance_id, party.encode(), kind.encode())


def keys_message(manifest_sha256: bytes, instance_id: bytes, wrapped: dict[str, bytes]) -> bytes:
    fields = [part for kind in sorted(wrapped) for part in (kind.encode(), wrapped[kind])]
    return join(manifest_sha256, instance_id, *fields)


def share_info(manifest_sha256: bytes, instance_id: bytes, made_by: bytes, party: str) -> bytes:
    return join(b"cloister share v1", manifest_sha256, instance_id, made_by, party.encode())


def share_commitment(share: bytes, job_id: str, instance_id: bytes, party: str) -> bytes:
    return sha256(join(b"cloister share v1", join(bytes.fromhex(job_id), instance_id, party.encode()), share))


def combine_shares(shares: list[bytes]) -> bytes:
    """Shamir's scheme in GF(2^128), each half of the secret alone; as pycryptodome describes it."""
    points = [(int.from_bytes(s[:2], "big"), s[2:18], s[18:34]) for s in shares]
    return _combine_half([(x, a) for x, a, _ in points]) + _combine_half([(x, b) for x, _, b in points])


def _combine_half(points: list[tuple[int, bytes]]) -> bytes:
    total = 0
    for j, (x_j, y_j) in enumerate(points):
        product = int.from_bytes(y_j, "big")
        for m, (x_m, _) in enumerate(points):
            if m != j:
                product = _multiply(product, _multiply(x_m, _invert(x_j ^ x_m)))
        total ^= product
    return total.to_bytes(16, "big")


def _multiply(a: int, b: int) -> int:
    """In GF(2^128) with x^128 + x^7 + x^2 + x + 1."""
    result = 0
    while b:
        if b & 1:
            result ^= a
        a, b = a << 1, b >> 1
        if a >> 128:
            a ^= (1 << 128) | 0x87
    return result


def _invert(a: int) -> int:
    """a^(2^128 - 2)"""
    result = 1
    for _ in range(127):
        a = _multiply(a, a)
        result = _multiply(result, a)
    return result


def open_state(key: bytes, salt: bytes, purpose: bytes, sealed: bytes) -> bytes:
    """State of one chunk."""
    derived = HKDF(SHA256(), 32, salt, join(b"cloister sealed state v1", purpose)).derive(key)
    return AESGCM(derived).decrypt(bytes(12), sealed, sha256(purpose) + bytes(8) + b"\x01")


# Checkpoints ----------------------------------------------------------------------------------------------------------


def seal_hash(purpose: bytes, content_sha256: bytes) -> bytes:
    return sha256(join(b"cloister checkpoint v1", purpose, content_sha256))


def check_seal(encoded: bytes, signing_key: bytes) -> tuple[dict[str, Any], bytes]:
    """(purpose, hash) of a seal that its instance signed."""
    outer = uncbor(encoded)
    found = seal_hash(outer["purpose"], outer["content"])
    check_signature(signing_key, "checkpoint seal", found, outer["signature"])
    return uncbor(outer["purpose"]), found


def checkpoint_message(purpose: dict[str, Any], found: bytes) -> bytes:
    fixed = (bytes.fromhex(purpose["job_id"]), purpose["manifest_sha256"], purpose["instance_id"])
    return join(*fixed, struct.pack(">Q", purpose["number"]), purpose["previous"], found)


def start_message(start: dict[str, Any], job_id: str, manifest_sha256: bytes, instance_id: bytes) -> bytes:
    places = []
    for prefix in ("", "last_"):
        places += [struct.pack(">Q", start[f"{prefix}number"]), start[f"{prefix}hash"]]
    return join(bytes.fromhex(job_id), manifest_sha256, instance_id, *places, bytes([start["authorised"]]))


def lineage_nonce(manifest_sha256: bytes) -> bytes:
    return sha256(join(b"cloister instance v1", manifest_sha256))


# Receipt --------------------------------------------------------------------------------------------------------------


def check_receipt(text: str) -> dict[str, Any]:
    """Check every signature of a receipt with simulated evidence, and that its checkpoints are one chain."""
    receipt = json.loads(text)
    body, instance = receipt["body"], receipt["instance"]
    assert json.dumps(receipt, indent=1, sort_keys=True, ensure_ascii=False) + "\n" == text
    encoded = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert sha256(body["job"].encode()).hex() == body["job_id"]
    job = json.loads(body["job"])
    parties = {p["name"]: bytes.fromhex(p["public_key"]) for p in job["job"]["party"]}
    manifest_sha256 = sha256(bytes.fromhex(body["manifest"]))
    manifest = uncbor(bytes.fromhex(body["manifest"]))
    assert (manifest["job_id"], manifest["policy_sha256"]) == (body["job_id"], job["policy_sha256"])
    assert set(manifest["bundles"]) == set(parties)
    _all_sign(parties, "job approval", bytes.fromhex(body["job_id"]), body["approvals"])
    _all_sign(parties, "manifest", manifest_sha256, body["manifest_signatures"])
    ids = {name: bytes.fromhex(instance[name]) for name in ("id", "signing_key", "hpke_key", "evidence")}
    check_signature(ids["signing_key"], "receipt", encoded, bytes.fromhex(receipt["signature"]))
    earlier = [{n: bytes.fromhex(e[n]) for n in ids} for e in body["history"]["earlier"]]
    for each, nonce in [*((e, lineage_nonce(manifest_sha256)) for e in earlier), (ids, sha256(encoded))]:
        bound = instance_report_data(body["job_id"], each["id"], each["signing_key"], each["hpke_key"], nonce)
        measured = open_simulated(each["evidence"], bound)
        assert manifest["registers"] == {"source": measured.hex()}
    check_history(body, [*earlier, ids], parties, manifest_sha256)
    for name, entry in receipt["countersignatures"].items():
        at = struct.pack(">Q", entry["time"])
        message = join(sha256(encoded), ids["id"], ids["signing_key"], sha256(ids["evidence"]), at)
        check_signature(parties[name], "receipt countersignature", message, bytes.fromhex(entry["signature"]))
    assert set(receipt["countersignatures"]) == set(parties)
    return dict(body)


def check_history(
    body: dict[str, Any], instances: list[dict[str, bytes]], parties: dict[str, bytes], manifest_sha256: bytes
) -> None:
    """One chain from the manifest on, each checkpoint by the instance whose turn it was."""
    history, last, number = body["history"], manifest_sha256, 0
    links = list(history["chain"])
    for instance, starts in zip(instances, history["starts"], strict=True):
        for name, encoded in starts.items():
            start = uncbor(bytes.fromhex(encoded))
            message = start_message(start, body["job_id"], manifest_sha256, instance["id"])
            check_signature(parties[name], "start", message, start["signature"])
            assert (start["number"], start["hash"]) == (number, last)
        assert set(starts) == set(parties)
        while links and uncbor(uncbor(bytes.fromhex(links[0]["seal"]))["purpose"])["instance_id"] == instance["id"]:
            link = links.pop(0)
            purpose, found = check_seal(bytes.fromhex(link["seal"]), instance["signing_key"])
            assert (purpose["number"], purpose["previous"]) == (number + 1, last)
            assert (purpose["job_id"], purpose["manifest_sha256"]) == (body["job_id"], manifest_sha256)
            for name, signature in link["signatures"].items():
                message = checkpoint_message(purpose, found)
                check_signature(parties[name], "checkpoint", message, bytes.fromhex(signature))
            number, last = number + 1, found
    assert links == []


def _all_sign(parties: dict[str, bytes], label: str, message: bytes, signatures: dict[str, str]) -> None:
    assert set(signatures) == set(parties)
    for name, signature in signatures.items():
        check_signature(parties[name], label, message, bytes.fromhex(signature))
