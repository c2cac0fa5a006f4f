"""docs/protocol.cddl is CDDL, describes the test vectors, and says the same as docs/protocol.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import cbor2
import pycddl
import pytest

from cloister.crypto.encoding import encode
from tests.vectors import second

ROOT = Path(__file__).parents[2]
CDDL = (ROOT / "docs" / "protocol.cddl").read_text(encoding="utf-8")
_RULE = re.compile(r"^([a-z][a-z0-9-]*) = ", re.MULTILINE)


def read(name: str) -> Any:
    return json.loads((ROOT / "tests" / "vectors" / f"{name}.json").read_text(encoding="utf-8"))


def check(rule: str, data: bytes) -> None:
    """Raises: pycddl.ValidationError."""
    pycddl.Schema(f"root = {rule}\n{CDDL}").validate_cbor(data)


def messages() -> dict[str, list[bytes]]:
    """Everything in the vectors that is CBOR, by rule."""
    session, bundles, report_data = read("session"), read("bundles"), read("report_data")
    checkpoints, agreement = read("checkpoints"), read("agreement")
    hello, reply = (bytes.fromhex(session[name])[1:] for name in ("hello", "reply"))
    keys = (bytes.fromhex(session[name]) for name in ("party_x25519_private", "party_mlkem_seed"))
    shaken = second.Handshake(b"\x01" + hello, b"\x02" + reply, bytes.fromhex(session["finish"]), *keys)
    files = [bytes.fromhex(each["file"]) for each in bundles["bundles"]]
    envelopes = [bytes.fromhex(report_data[name]) for name in ("simulated_evidence", "evidence_with_device")]
    blob = cbor2.loads(envelopes[0])["blob"]
    seals = [bytes.fromhex(each["seal"]) for each in checkpoints["checkpoints"]]
    records = [bytes.fromhex(each["encoded"]) for each in checkpoints["share_records"]]
    return {
        "evidence": envelopes,
        "simulated-blob": [blob],
        "simulated-body": [cbor2.loads(blob)["body"]],
        "policy": [bytes.fromhex(agreement["policy"]["cbor"])],
        "hello-message": [hello],
        "hello": [cbor2.loads(hello)["body"]],
        "reply-message": [reply],
        "share": [cbor2.loads(reply)["share"]],
        "reply-body": [encode({"evidence": shaken.evidence})],
        "finish-body": [encode(shaken.finish), encode({**shaken.finish, "evidence": shaken.evidence})],
        "bundle-header": [file[12 : 12 + int.from_bytes(file[8:12], "big")] for file in files],
        "bundle-trailer": [_trailer(file) for file in files],
        "manifest": [bytes.fromhex(agreement["manifest"]["encoded"])],
        "seal": seals,
        "purpose": [cbor2.loads(seal)["purpose"] for seal in seals],
        "certificate": [bytes.fromhex(each["certificate"]) for each in checkpoints["checkpoints"]],
        "share-record": records,
        "share-commitments": [cbor2.loads(record)["content"] for record in records],
        "start": [bytes.fromhex(start) for each in checkpoints["starts"] for start in each.values()],
        "checkpoint-head": [encode({"seal": seals[0], "shares": records[0]})],
    }


def _trailer(file: bytes) -> bytes:
    """What is left when the length before it fits."""
    (at,) = [
        i for i in range(len(file) - 256, len(file)) if int.from_bytes(file[i : i + 4], "big") == len(file) - i - 4
    ]
    return file[at + 4 :]


MESSAGES = messages()


@pytest.mark.parametrize("rule", MESSAGES)
def test_vectors_are_what_the_rules_say(rule: str) -> None:
    assert MESSAGES[rule]
    for data in MESSAGES[rule]:
        check(rule, data)


@pytest.mark.parametrize("rule", MESSAGES)
def test_rules_refuse_other_messages(rule: str) -> None:
    """Each field is needed and has its type, and there is no other."""
    value = cbor2.loads(MESSAGES[rule][0])
    for changed in (
        *({k: v for k, v in value.items() if k != left_out} for left_out in value),
        *(
            {**value, name: {"of": "no such type"}}
            for name in value
            if name not in ("signatures", "rules", "registers")
        ),
        {**value, "unknown": 1},
    ):
        with pytest.raises(pycddl.ValidationError):
            check(rule, encode(changed))


def test_bounds_of_rules() -> None:
    header = cbor2.loads(MESSAGES["bundle-header"][0])
    for change in ({"chunk_bytes": 63}, {"job_id": "AB" * 32}, {"kind": "other"}, {"version": 2}):
        with pytest.raises(pycddl.ValidationError):
            check("bundle-header", encode(header | change))


# Requests, as the enclave takes and answers them; the bodies here are checked against the code by the job's tests.
_S, _H = bytes(64), bytes(32)
REQUESTS: dict[str, Any] = {
    "instance-request": {"nonce": _H},
    "approve-request": {"signature": _S},
    "manifest-request": {"wait_ms": 20000},
    "start-request": {"certificate": b""},
    "keys-request": {
        "manifest_signature": _S, "wrapped": {"train": bytes(1168), "test": bytes(1168)}, "signature": _S,
        "start": cbor2.dumps(
            {"number": 0, "hash": _H, "last_number": 0, "last_hash": _H, "authorised": False, "signature": _S}
        ),
        "share_from": bytes(16), "share": bytes(1170),
    },
    "share-request": {"wait_ms": 0},
    "kept-request": {"signature": _S},
    "checkpoint-request": {"number": 1, "signature": _S},
    "watch-request": {"after": 0, "committed": 0, "wait_ms": 1},
    "adapter-request": {"name": "adapter_config.json", "offset": 0},
    "countersign-request": {"time": 1, "signature": _S},
    "receipt-request": {"wait_ms": 1},
    "countersignatures-request": {"body_sha256": _H},
    "request": {"id": 1, "method": "watch", "body": {}},
    "error-report": {"kind": "VerificationError", "code": "job", "message": "m", "where": "", "hint": ""},
}  # fmt: skip


@pytest.mark.parametrize("rule", REQUESTS)
def test_requests(rule: str) -> None:
    check(rule, encode(REQUESTS[rule]))
    with pytest.raises(pycddl.ValidationError):
        check(rule, encode({**REQUESTS[rule], "unknown": 1}))


_NEVER_ALONE = {"hex32", "name", "kind", "evidence-type", "phase", "wait", "signature"}


def test_the_document_names_every_rule() -> None:
    document = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    rules = set(_RULE.findall(CDDL))
    assert len(rules) > 60
    assert {rule for rule in rules - _NEVER_ALONE if f"`{rule}`" not in document} == set()
