"""Write the test vectors of docs/protocol.md into tests/vectors, from keys that everybody can derive.

    python scripts/make_vectors.py            # rewrite
    python scripts/make_vectors.py --check    # say which differ, exit 1

Every key and random value is SHA-256("cloister test vector: NAME"). What encapsulation draws cannot be chosen
(ML-KEM inside pyca/cryptography), so ciphertexts that are there already are kept: run twice, the files are the same.
Change a format on purpose, run this, and say so in CHANGELOG.md; tests/vectors/test_vectors.py finds changes made by
accident, and tests/vectors/second.py reads the files without any of our code.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cloister.agreement import (
    APPROVAL_LABEL,
    KEYS_LABEL,
    MANIFEST_LABEL,
    Manifest,
    approval_message,
    keys_message,
    wrap_info,
)
from cloister.agreement.approval import Approval
from cloister.agreement.checkpoint import (
    CHECKPOINT_LABEL,
    KEPT_LABEL,
    Certificate,
    Position,
    Seal,
    ShareRecord,
    Start,
    checkpoint_message,
    lineage_nonce,
    share_context,
    share_info,
)
from cloister.agreement.receipt import COUNTERSIGN_LABEL, Receipt, countersign_message, make_receipt
from cloister.attest.backends.simulated import InsecureSimulatedAttester
from cloister.attest.binding import device_nonce, instance_report_data, session_report_data
from cloister.attest.evidence import Evidence
from cloister.attest.policy import AppraisalPolicy
from cloister.attest.verify import verify
from cloister.channel import handshake
from cloister.channel.handshake import Established, Initiator, Responder, ResponderSettings
from cloister.channel.records import Opener, Sealer
from cloister.crypto.bundle import BundleHeader, BundleWriter
from cloister.crypto.bundle import writer as bundle_writer
from cloister.crypto.encoding import Value, encode
from cloister.crypto.hpke import HpkeKey, wrap
from cloister.crypto.keys import DataKey, PartyKey, fingerprint
from cloister.crypto.sealing import SealingKey
from cloister.crypto.sharing import commitment
from cloister.errors import VerificationError
from cloister.jobfile.resolve import canonical_json

FOLDER = Path(__file__).parents[1] / "tests" / "vectors"
NOW = 1_800_000_000
PARTIES = ("north", "south")
MEASUREMENT = b"m" * 32
POLICY_TOML = '[policy]\naccept = ["simulated"]\ninsecure_simulated = true\nmax_age_s = 300\n\n[[measurement]]\n' + (
    f'label = "simulated"\ntype = "simulated"\nregisters = {{ source = "{MEASUREMENT.hex()}" }}\n'
)
POLICY = AppraisalPolicy.from_toml(POLICY_TOML)

Vector = dict[str, Any]


def fixed(name: str, size: int = 32) -> bytes:
    """Bytes that everybody can derive."""
    return b"".join(
        hashlib.sha256(f"cloister test vector: {name}{'' if i == 0 else f' {i}'}".encode()).digest()
        for i in range(-(-size // 32))
    )[:size]


def party_key(name: str) -> PartyKey:
    return PartyKey(Ed25519PrivateKey.from_private_bytes(fixed(f"{name} signing")))


def hpke_key() -> HpkeKey:
    mlkem = MLKEM768PrivateKey.from_seed_bytes(fixed("hpke mlkem", 64))
    return HpkeKey(mlkem, X25519PrivateKey.from_private_bytes(fixed("hpke x25519")))


def attester() -> InsecureSimulatedAttester:
    return InsecureSimulatedAttester(measurement=MEASUREMENT, clock=lambda: NOW)


# CBOR, report data ----------------------------------------------------------------------------------------------------


def cbor(old: Vector) -> Vector:
    """Values as JSON (bytes as {"hex": ...}) with their one encoding; encodings that must be refused."""
    values: dict[str, Value] = {
        "null": None, "true": True, "zero": 0, "23": 23, "24": 24, "255": 255, "256": 256, "-1": -1, "-257": -257,
        "largest": 2**64 - 1, "least": -(2**63), "half": 1.5, "single": 100000.0, "double": 1.1,
        "infinite": float("inf"),
        "empty text": "", "text": "ä€", "bytes": b"\0\xff", "list": [1, [2, "3"], []],
        "map": {"b": 1, "a": 2, "aa": 3, "": 4},
    }  # fmt: skip
    refused = {
        "a length that is not shortest": "1817", "an indefinite list": "9f01ff", "a tag": "c001", "undefined": "f7",
        "keys out of order": "a2616201616101", "a key twice": "a2616101616101", "a key that is no text": "a10101",
        "bytes after the end": "0000", "truncated": "62", "text that is not UTF-8": "61ff",
        "a float that is not shortest": "fa3fc00000", "an integer of more than 64 bits": "3b8000000000000000",
        "too deep": "81" * 9 + "00",
    }  # fmt: skip
    accepted = {name: {"value": _plain(value), "encoded": encode(value).hex()} for name, value in values.items()}
    return {"accepted": accepted, "refused": refused}


def _plain(value: Value) -> Any:
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    return "Infinity" if value == float("inf") else value


def report_data(old: Vector) -> Vector:
    job_id, transcript = fixed("job").hex(), fixed("transcript", 64)
    keys = {"signing_key": party_key("instance").public, "hpke_key": hpke_key().public}
    instance = {"job_id": job_id, "instance_id": fixed("instance", 16), **keys, "nonce": fixed("nonce")}
    session = {"job_id": job_id, "transcript": transcript}
    bound = instance_report_data(**instance)
    evidence = attester().collect(bound)
    return {
        "session": [
            {"role": role, **_hex(session), "report_data": session_report_data(role=role, **session).hex()}  # type: ignore[arg-type]  # the two roles
            for role in ("party", "enclave")
        ],
        "instance_keys": {**_hex(instance), "report_data": bound.hex()},
        "device_nonce": {"report_data": bound.hex(), "nonce": device_nonce(bound).hex()},
        "short": {"report_data": bound.hex(), "sha256": hashlib.sha256(bound).hexdigest()},
        "simulated_evidence": evidence.to_bytes().hex(),
        "evidence_with_device": Evidence(
            type="tdx", blob=b"quote", collateral=b"{}", event_log=b"[]",
            devices=(Evidence(type="nvidia-gpu", blob=b"report"),),
        ).to_bytes().hex(),
    }  # fmt: skip


def _hex(fields: Mapping[str, Any]) -> Vector:
    return {name: value.hex() if isinstance(value, bytes) else value for name, value in fields.items()}


# Session --------------------------------------------------------------------------------------------------------------


def session(old: Vector) -> Vector:
    """One handshake with fixed keys, and records in both directions."""
    job_id, key = fixed("job").hex(), party_key("north")
    kem = _Encapsulation(old.get("mlkem_shared_secret"), old.get("mlkem_ciphertext"))
    with _chosen("party"):
        party = Initiator(job_id=job_id, party="north", key=key, verify_evidence=_appraise)
        hello = party.start(NOW)
    enclave = Responder(ResponderSettings(job_id=job_id, public_keys={"north": key.public}, attester=attester()))
    with _chosen("enclave"), patch.object(handshake, "MLKEM768PublicKey", kem):
        reply = enclave.receive(hello, NOW)
    if not isinstance(reply, bytes):
        raise RuntimeError("no reply")
    t1 = _handshake_hash(
        "reply", hello, handshake.Fields.decode(reply[1:], max_bytes=1 << 20, what="reply").blob("share")
    )
    keys, t2 = enclave._keys, enclave._transcript
    finish, at_party = party.receive(reply, NOW)
    at_enclave = enclave.receive(finish, NOW)
    if keys is None or not isinstance(at_enclave, Established) or at_party.transcript != at_enclave.transcript:
        raise RuntimeError("the handshake does not agree with itself")
    t3 = at_party.transcript
    names = {"enclave handshake": t1, "party handshake": t2, "party records": t3, "enclave records": t3}
    return {
        "job_id": job_id,
        "party": "north",
        "now": NOW,
        "party_signing_private": fixed("north signing").hex(),
        "party_x25519_private": fixed("party x25519").hex(),
        "party_mlkem_seed": fixed("party mlkem", 64).hex(),
        "enclave_x25519_private": fixed("enclave x25519").hex(),
        "mlkem_ciphertext": kem.ciphertext,
        "mlkem_shared_secret": kem.secret,
        "hello": hello.hex(),
        "reply": reply.hex(),
        "finish": finish.hex(),
        "t1": t1.hex(),
        "t2": t2.hex(),
        "t3": t3.hex(),
        "master": keys._master.hex(),
        "keys": {name: keys.expand(name, transcript).hex() for name, transcript in names.items()},
        "records": {
            side: _records(keys.expand(f"{side} records", t3), other)
            for side, other in (("party", at_enclave.opener), ("enclave", at_party.opener))
        },
    }


def _records(key: bytes, opener: Opener) -> list[Vector]:
    """Messages and their records; long ones as SHA-256. A long message is 00 01 .. ff 00 01 .., `length` bytes."""
    sealer, found = Sealer(key), []
    for length in (0, 5, (1 << 20) + 1):
        message = (bytes(range(256)) * (length // 256 + 1))[:length]
        records = list(sealer.seal(message))
        if [opener.feed(record) for record in records][-1] != message:
            raise RuntimeError("a record does not open")
        found.append({"length": length, "records": [_short(record) for record in records]})
    return [*found, {"close": sealer.close().hex()}]


def _short(data: bytes) -> Vector:
    return {"hex": data.hex()} if len(data) < 256 else {"sha256": hashlib.sha256(data).hexdigest()}


class _Encapsulation:
    """Stands in for ML-KEM's public key: gives the ciphertext that is in the file, or draws one."""

    def __init__(self, secret: str | None, ciphertext: str | None) -> None:
        public = MLKEM768PrivateKey.from_seed_bytes(fixed("party mlkem", 64)).public_key()
        drawn = public.encapsulate()
        self.secret, self.ciphertext = (
            (secret, ciphertext) if secret and ciphertext else (drawn[0].hex(), drawn[1].hex())
        )

    def from_public_bytes(self, public: bytes) -> _Encapsulation:
        MLKEM768PublicKey.from_public_bytes(public)
        return self

    def encapsulate(self) -> tuple[bytes, bytes]:
        return bytes.fromhex(self.secret), bytes.fromhex(self.ciphertext)


@contextmanager
def _chosen(side: str) -> Iterator[None]:
    """Inside, the handshake draws the fixed keys and randoms of this side."""
    x25519 = SimpleNamespace(generate=lambda: X25519PrivateKey.from_private_bytes(fixed(f"{side} x25519")))
    mlkem = SimpleNamespace(generate=lambda: MLKEM768PrivateKey.from_seed_bytes(fixed(f"{side} mlkem", 64)))
    draw = SimpleNamespace(token_bytes=lambda size: fixed(f"{side} random", size))
    with (
        patch.object(handshake, "X25519PrivateKey", x25519),
        patch.object(handshake, "MLKEM768PrivateKey", mlkem),
        patch.object(handshake, "secrets", draw),
    ):
        yield


def _appraise(evidence: Evidence, expected: bytes, now: float) -> Any:
    return verify(evidence, POLICY, expected, now, allow_simulated=True)


def _handshake_hash(label: str, *fields: bytes) -> bytes:
    return handshake._hash(label, *fields)


# Bundles and keys -----------------------------------------------------------------------------------------------------


def bundles(old: Vector) -> Vector:
    """Whole files: no payload, one chunk that is full, several chunks."""
    return {"party_signing_private": fixed("north signing").hex(), "bundles": [_bundle(size) for size in (0, 64, 200)]}


def _bundle(size: int) -> Vector:
    header = BundleHeader(
        job_id=fixed("job").hex(),
        party="north",
        kind="train",
        schema={"activation_dtype": "bfloat16", "hidden": 16},
        counts={"records": 3, "packs": 2, "tokens": 64},
        chunk_bytes=64,
        max_payload_bytes=4096,
        bundle_id=fixed(f"bundle {size}", 16),
    )
    payload, key = bytes(range(256))[:size], DataKey(fixed(f"data key {size}"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bundle"
        chosen = patch.object(bundle_writer.DataKey, "generate", lambda: key)
        with chosen, BundleWriter(path, header, party_key("north")) as writer:
            writer.write(payload)
        file = path.read_bytes()
    if writer.commitment is None:
        raise RuntimeError("no commitment")
    return {
        "data_key": key.reveal().hex(),
        "payload": payload.hex(),
        "file": file.hex(),
        "commitment": writer.commitment.hex(),
    }


def data_keys(old: Vector) -> Vector:
    """The release of one party's data keys to an instance, and of a share."""
    manifest_sha256, instance_id = _manifest().sha256, fixed("instance", 16)
    wrapped, keys = {}, {}
    for kind in ("train", "test"):
        keys[kind] = fixed(f"{kind} data key")
        info = wrap_info(manifest_sha256=manifest_sha256, instance_id=instance_id, party="north", kind=kind)
        wrapped[kind] = _kept(old.get("wrapped", {}).get(kind), keys[kind], info)
    message = keys_message(manifest_sha256=manifest_sha256, instance_id=instance_id, wrapped=wrapped)
    made_by = fixed("earlier instance", 16)
    share = {"manifest_sha256": manifest_sha256, "instance_id": instance_id, "made_by": made_by, "party": "north"}
    return {
        "mlkem_seed": fixed("hpke mlkem", 64).hex(),
        "x25519_private": fixed("hpke x25519").hex(),
        "hpke_key": hpke_key().public.hex(),
        "manifest_sha256": manifest_sha256.hex(),
        "instance_id": instance_id.hex(),
        "party": "north",
        "data_keys": _hex(keys),
        "wrapped": _hex(wrapped),
        "message": message.hex(),
        "signature": party_key("north").sign(KEYS_LABEL, message).hex(),
        "share": {"made_by": made_by.hex(), "info": share_info(**share).hex()},
    }


def _kept(old: str | None, secret: bytes, info: bytes) -> bytes:
    """The wrapped secret that is in the file, if it still opens, else a new one."""
    if old:
        try:
            if hpke_key().unwrap(bytes.fromhex(old), info) == secret:
                return bytes.fromhex(old)
        except VerificationError:
            pass
    return wrap(hpke_key().public, secret, info)


def sealed_state(old: Vector) -> Vector:
    """State sealed in chunks (here: one), and shares of a key, two of three."""
    key, salt, purpose = fixed("sealing key"), fixed("salt"), b"what it is for"
    sealing = SealingKey(key)
    shares = [bytes.fromhex(share) for share in old.get("shares", [])] or sealing.shares(quorum=2, count=3)
    if SealingKey.from_shares(shares[1:], quorum=2).shares(quorum=1, count=1)[0][2:] != key:
        raise RuntimeError("the shares are of another key")
    context = {"job_id": fixed("job").hex(), "instance_id": fixed("instance", 16), "party": "north"}
    return {
        "sealing_key": key.hex(),
        "salt": salt.hex(),
        "purpose": purpose.hex(),
        "states": [
            {"plain": plain.hex(), "sealed": sealing.seal(plain, salt=salt, purpose=purpose).hex()}
            for plain in (b"", b"state of training")
        ],
        "quorum": 2,
        "shares": [share.hex() for share in shares],
        "commitment": {**_hex(context), "commitment": commitment(shares[0], share_context(**context)).hex()},
    }


# Agreement ------------------------------------------------------------------------------------------------------------


def _job() -> bytes:
    parties = [{"name": name, "public_key": party_key(name).public.hex()} for name in PARTIES]
    fields = {"job": {"name": "vectors"}, "party": parties, "checkpoint": {"quorum": 2}}
    return canonical_json({"job": fields, "policy_sha256": POLICY.sha256})


def _manifest() -> Manifest:
    return Manifest(
        job_id=hashlib.sha256(_job()).hexdigest(),
        policy_sha256=POLICY.sha256,
        attester="simulated",
        registers={"source": MEASUREMENT.hex()},
        bundles={name: {kind: fixed(f"commitment of {name} {kind}") for kind in ("train", "test")} for name in PARTIES},
    )


def agreement(old: Vector) -> Vector:
    """Job, policy, approval, manifest."""
    manifest, job_id = _manifest(), _manifest().job_id
    return {
        "policy": {"toml": POLICY_TOML, "cbor": POLICY.to_bytes().hex(), "sha256": POLICY.sha256},
        "job": {"canonical": _job().decode(), "job_id": job_id},
        "parties": {
            name: {
                "signing_private": fixed(f"{name} signing").hex(),
                "public_key": party_key(name).public.hex(),
                "fingerprint": fingerprint(party_key(name).public),
                "approval": party_key(name).sign(APPROVAL_LABEL, approval_message(job_id)).hex(),
                "approval_file": Approval.sign(job_id, name, party_key(name)).to_bytes().decode(),
                "manifest_signature": party_key(name).sign(MANIFEST_LABEL, manifest.sha256).hex(),
            }
            for name in PARTIES
        },
        "manifest": {"encoded": manifest.to_bytes().hex(), "sha256": manifest.sha256.hex()},
    }


def _ids(instance: str) -> Vector:
    manifest = _manifest()
    return {"job_id": manifest.job_id, "manifest_sha256": manifest.sha256, "instance_id": fixed(instance, 16)}


def _chain() -> tuple[list[ShareRecord], list[Seal], list[dict[str, Start]]]:
    """Two instances: the first makes checkpoints 1 and 2, the second goes on from 2 with checkpoint 3."""
    records, seals, starts = [], [], []
    last = Position(number=0, hash=_manifest().sha256)
    for instance, steps in (("earlier instance", (10, 20)), ("instance", (30,))):
        record = ShareRecord(
            **_ids(instance), quorum=2, commitments={name: fixed(f"share of {name} {instance}") for name in PARTIES}
        ).signed(party_key(instance))
        records.append(record)
        consent = Start(position=last, last=last)
        starts.append({name: consent.signed(party_key(name), **_ids(instance)) for name in PARTIES})
        for step in steps:
            unsigned = Seal(
                **_ids(instance), number=last.number + 1, previous=last.hash, step=step,
                shares_sha256=record.sha256, salt=fixed(f"salt {step}"),
            )  # fmt: skip
            seals.append(unsigned.signed(fixed(f"content {step}", 100), party_key(instance)))
            last = seals[-1].position
    return records, seals, starts


def _signed(seal: Seal) -> dict[str, bytes]:
    return {name: party_key(name).sign(CHECKPOINT_LABEL, checkpoint_message(seal)) for name in PARTIES}


def checkpoints(old: Vector) -> Vector:
    """A chain of three checkpoints by two instances."""
    records, seals, starts = _chain()
    return {
        "instances": [
            {"instance_id": fixed(name, 16).hex(), "signing_key": party_key(name).public.hex()}
            for name in ("earlier instance", "instance")
        ],
        "share_records": [
            {
                "encoded": record.to_bytes().hex(),
                "sha256": record.sha256.hex(),
                "kept": {name: party_key(name).sign(KEPT_LABEL, record.sha256).hex() for name in PARTIES},
            }
            for record in records
        ],
        "starts": [{name: start.to_bytes().hex() for name, start in each.items()} for each in starts],
        "checkpoints": [
            {
                "number": seal.number,
                "content": fixed(f"content {seal.step}", 100).hex(),
                "seal": seal.to_bytes().hex(),
                "purpose": seal.purpose().hex(),
                "hash": seal.hash.hex(),
                "message": checkpoint_message(seal).hex(),
                "certificate": Certificate(seal=seal, signatures=_signed(seal)).to_bytes().hex(),
            }
            for seal in seals
        ],
        "lineage_nonce": lineage_nonce(_manifest().sha256).hex(),
    }


def receipt(old: Vector) -> Vector:
    """A whole receipt of two parties and two instances."""
    made = _receipt()
    return {
        "policy": POLICY_TOML,
        "adapter_sha256": fixed("adapter").hex(),
        "receipt": made.to_bytes().decode(),
        "body_sha256": made.body_sha256.hex(),
        "countersign_messages": {name: countersign_message(made, NOW + i).hex() for i, name in enumerate(PARTIES)},
    }


def _receipt() -> Receipt:
    manifest, (_, seals, starts) = _manifest(), _chain()
    early = _bound("earlier instance", lineage_nonce(manifest.sha256))
    instance = {"id": fixed("earlier instance", 16), "signing_key": party_key("earlier instance").public}
    body: Vector = {
        "job_id": manifest.job_id,
        "job": _job().decode(),
        "approvals": {n: party_key(n).sign(APPROVAL_LABEL, approval_message(manifest.job_id)).hex() for n in PARTIES},
        "manifest": manifest.to_bytes().hex(),
        "manifest_signatures": {n: party_key(n).sign(MANIFEST_LABEL, manifest.sha256).hex() for n in PARTIES},
        "history": {
            "quorum": 2,
            "earlier": [{**_hex(instance), "hpke_key": hpke_key().public.hex(), "evidence": early.hex(), "time": NOW}],
            "starts": [{name: start.to_bytes().hex() for name, start in each.items()} for each in starts],
            "chain": [
                {"seal": seal.to_bytes().hex(), "signatures": {n: s.hex() for n, s in _signed(seal).items()}}
                for seal in seals
            ],
        },
        "adapter_sha256": fixed("adapter").hex(),
        "adapter_files": {"adapter_model.safetensors": fixed("weights").hex()},
        "metrics": {"bits_per_byte": 1.25},
        "training": {"steps": 30},
        "started": NOW - 60,
        "ended": NOW,
    }
    made = make_receipt(
        body,
        instance_id=fixed("instance", 16),
        signing_key=party_key("instance"),
        hpke_key=hpke_key().public,
        evidence=lambda nonce: Evidence.from_bytes(_bound("instance", nonce)),
    )
    for i, name in enumerate(PARTIES):
        signature = party_key(name).sign(COUNTERSIGN_LABEL, countersign_message(made, NOW + i))
        made = made.countersigned(name, NOW + i, signature)
    return made


def _bound(instance: str, nonce: bytes) -> bytes:
    """Evidence of an instance's keys."""
    bound = instance_report_data(
        job_id=_manifest().job_id,
        instance_id=fixed(instance, 16),
        signing_key=party_key(instance).public,
        hpke_key=hpke_key().public,
        nonce=nonce,
    )
    return attester().collect(bound).to_bytes()


MAKERS: Mapping[str, Callable[[Vector], Vector]] = {
    "cbor": cbor,
    "report_data": report_data,
    "session": session,
    "bundles": bundles,
    "data_keys": data_keys,
    "sealed_state": sealed_state,
    "agreement": agreement,
    "checkpoints": checkpoints,
    "receipt": receipt,
}
"""By name of the file; each is given what the file holds now."""


def load(name: str) -> Vector:
    path = FOLDER / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def to_text(vector: Vector) -> str:
    return json.dumps(vector, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    differing = []
    for name, make in MAKERS.items():
        text = to_text(make(load(name)))
        if text != to_text(load(name)):
            differing.append(name)
            if not options.check:
                (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")
    print(f"{'differ' if options.check else 'written'}: {', '.join(differing) or 'none'}", file=sys.stderr)
    return 1 if differing and options.check else 0


if __name__ == "__main__":
    raise SystemExit(main())
