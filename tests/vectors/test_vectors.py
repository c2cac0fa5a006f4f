"""The vectors: our code makes them again byte for byte, and a second implementation reads them and agrees."""

from __future__ import annotations

import ast
import hashlib
import json
import struct
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, Suite

from cloister.agreement.receipt import verify_receipt
from cloister.attest.policy import AppraisalPolicy
from cloister.crypto.encoding import decode
from cloister.errors import ProtocolError
from tests.vectors import second

ROOT = Path(__file__).parents[2]


def generator() -> Any:
    spec = spec_from_file_location("make_vectors", ROOT / "scripts" / "make_vectors.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKE = generator()


def read(name: str) -> Any:
    return json.loads((ROOT / "tests" / "vectors" / f"{name}.json").read_text(encoding="utf-8"))


def unhex(text: str) -> bytes:
    return bytes.fromhex(text)


def public(private: str) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(unhex(private)).public_key().public_bytes_raw()


@pytest.mark.parametrize("name", MAKE.MAKERS)
def test_our_code_makes_the_vectors(name: str) -> None:
    """If a format was changed on purpose: run scripts/make_vectors.py, and change docs/protocol.* and `second`."""
    assert json.loads(MAKE.to_text(MAKE.MAKERS[name](read(name)))) == read(name)


def test_the_second_implementation_is_one() -> None:
    tree = ast.parse((ROOT / "tests" / "vectors" / "second.py").read_text(encoding="utf-8"))
    froms = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    plain = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert {name.split(".")[0] for name in (*froms, *plain)} == {
        "__future__", "cbor2", "cryptography", "hashlib", "json", "struct", "typing",
    }  # fmt: skip


def test_cbor() -> None:
    vectors = read("cbor")
    for name, each in vectors["accepted"].items():
        value, encoded = each["value"], unhex(each["encoded"])
        if isinstance(value, dict) and set(value) == {"hex"}:
            value = unhex(value["hex"])
        value = float("inf") if value == "Infinity" else value
        assert second.uncbor(encoded) == value, name
        assert decode(encoded, max_bytes=64, what=name) == value, name
    for name, encoded in vectors["refused"].items():
        with pytest.raises(ProtocolError):
            decode(unhex(encoded), max_bytes=64, what=name)


def test_report_data() -> None:
    vectors = read("report_data")
    for each in vectors["session"]:
        found = second.session_report_data(each["role"], each["job_id"], unhex(each["transcript"]))
        assert found.hex() == each["report_data"]
    instance = vectors["instance_keys"]
    keys = [unhex(instance[name]) for name in ("instance_id", "signing_key", "hpke_key", "nonce")]
    bound = second.instance_report_data(instance["job_id"], *keys)
    assert bound.hex() == instance["report_data"]
    assert second.device_nonce(bound).hex() == vectors["device_nonce"]["nonce"]
    assert second.sha256(bound).hex() == vectors["short"]["sha256"]
    assert second.open_simulated(unhex(vectors["simulated_evidence"]), bound) == b"m" * 32


# Session --------------------------------------------------------------------------------------------------------------


def shaken(vectors: dict[str, Any], **changes: bytes) -> second.Handshake:
    messages = {name: unhex(vectors[name]) for name in ("hello", "reply", "finish")} | changes
    keys = (unhex(vectors["party_x25519_private"]), unhex(vectors["party_mlkem_seed"]))
    return second.Handshake(messages["hello"], messages["reply"], messages["finish"], *keys)


def test_key_schedule() -> None:
    vectors = read("session")
    found = shaken(vectors)
    for name in ("t1", "t2", "t3", "master"):
        assert getattr(found, name).hex() == vectors[name]
    for label, transcript in (("enclave handshake", found.t1), ("party handshake", found.t2)):
        assert second.session_key(found.master, label, transcript).hex() == vectors["keys"][label]
    for side, key in found.record_keys.items():
        assert key.hex() == vectors["keys"][f"{side} records"]
    # Who signed what, and what the evidence is bound to.
    party = public(vectors["party_signing_private"])
    second.check_signature(party, "handshake hello", found.hello_body, found.hello_signature)
    second.check_signature(party, "handshake finish", found.t2, found.finish["signature"])
    assert found.finish["evidence"] == b""
    bound = second.session_report_data("enclave", vectors["job_id"], found.t1)
    assert second.open_simulated(found.evidence, bound) == b"m" * 32
    # The other end's share gives the same secret.
    share = second.uncbor(second.uncbor(unhex(vectors["reply"])[1:])["share"])
    enclave = X25519PrivateKey.from_private_bytes(unhex(vectors["enclave_x25519_private"]))
    assert enclave.public_key().public_bytes_raw() == share["x25519"]
    mlkem = MLKEM768PrivateKey.from_seed_bytes(unhex(vectors["party_mlkem_seed"]))
    assert mlkem.decapsulate(share["mlkem"]).hex() == vectors["mlkem_shared_secret"]


@pytest.mark.parametrize("message", ["hello", "reply", "finish"])
def test_a_changed_handshake_does_not_open(message: str) -> None:
    vectors = read("session")
    changed = bytearray(unhex(vectors[message]))
    changed[-1] ^= 1
    with pytest.raises((InvalidTag, ValueError)):
        shaken(vectors, **{message: bytes(changed)})


def test_records() -> None:
    vectors = read("session")
    for side, key in shaken(vectors).record_keys.items():
        counter, (*messages, close) = 0, vectors["records"][side]
        for each in messages:
            message = (bytes(range(256)) * (each["length"] // 256 + 1))[: each["length"]]
            records = second.seal_records(key, message, counter)
            assert [MAKE._short(record) for record in records] == each["records"]
            counter += len(records)
        assert second.seal_record(key, 0x13, b"", counter).hex() == close["close"]


# Bundles and keys -----------------------------------------------------------------------------------------------------


def test_bundles() -> None:
    vectors = read("bundles")
    party = public(vectors["party_signing_private"])
    assert [len(unhex(each["payload"])) for each in vectors["bundles"]] == [0, 64, 200]
    for each in vectors["bundles"]:
        file, data_key = unhex(each["file"]), unhex(each["data_key"])
        header, payload, commitment = second.open_bundle(file, party, data_key)
        assert (payload.hex(), commitment.hex()) == (each["payload"], each["commitment"])
        assert (header["version"], header["party"], header["kind"]) == (1, "north", "train")
        for at in range(8, len(file), 7):
            changed = file[:at] + bytes([file[at] ^ 1]) + file[at + 1 :]
            with pytest.raises((AssertionError, InvalidTag, InvalidSignature, ValueError, KeyError, struct.error)):
                second.open_bundle(changed, party, data_key)


def test_data_keys() -> None:
    vectors = read("data_keys")
    manifest_sha256, instance_id = unhex(vectors["manifest_sha256"]), unhex(vectors["instance_id"])
    private = MLKEM768X25519PrivateKey(
        MLKEM768PrivateKey.from_seed_bytes(unhex(vectors["mlkem_seed"])),
        X25519PrivateKey.from_private_bytes(unhex(vectors["x25519_private"])),
    )
    suite = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
    for kind, wrapped in vectors["wrapped"].items():
        info = second.wrap_info(manifest_sha256, instance_id, vectors["party"], kind)
        assert suite.decrypt(unhex(wrapped), private, info).hex() == vectors["data_keys"][kind]
    wrapped = {kind: unhex(text) for kind, text in vectors["wrapped"].items()}
    message = second.keys_message(manifest_sha256, instance_id, wrapped)
    assert message.hex() == vectors["message"]
    party = unhex(read("agreement")["parties"]["north"]["public_key"])
    second.check_signature(party, "data keys", message, unhex(vectors["signature"]))
    share = vectors["share"]
    info = second.share_info(manifest_sha256, instance_id, unhex(share["made_by"]), vectors["party"])
    assert info.hex() == share["info"]


def test_sealed_state_and_shares() -> None:
    vectors = read("sealed_state")
    key, salt, purpose = (unhex(vectors[name]) for name in ("sealing_key", "salt", "purpose"))
    for each in vectors["states"]:
        assert second.open_state(key, salt, purpose, unhex(each["sealed"])).hex() == each["plain"]
    shares = [unhex(share) for share in vectors["shares"]]
    for left_out in range(3):
        assert second.combine_shares(shares[:left_out] + shares[left_out + 1 :]) == key
    about = vectors["commitment"]
    found = second.share_commitment(shares[0], about["job_id"], unhex(about["instance_id"]), about["party"])
    assert found.hex() == about["commitment"]


# Agreement ------------------------------------------------------------------------------------------------------------


def test_agreement() -> None:
    vectors = read("agreement")
    job, manifest = vectors["job"], unhex(vectors["manifest"]["encoded"])
    assert second.sha256(job["canonical"].encode()).hex() == job["job_id"]
    assert second.sha256(unhex(vectors["policy"]["cbor"])).hex() == vectors["policy"]["sha256"]
    assert second.sha256(manifest).hex() == vectors["manifest"]["sha256"]
    for name, party in vectors["parties"].items():
        key = public(party["signing_private"])
        assert (key.hex(), second.fingerprint(key)) == (party["public_key"], party["fingerprint"])
        second.check_signature(key, "job approval", unhex(job["job_id"]), unhex(party["approval"]))
        second.check_signature(key, "manifest", second.sha256(manifest), unhex(party["manifest_signature"]))
        file = json.loads(party["approval_file"])
        assert file == {
            "version": 1, "job_id": job["job_id"], "party": name, "public_key": key.hex(),
            "signature": party["approval"],
        }  # fmt: skip


def test_checkpoints() -> None:
    vectors, parties = read("checkpoints"), read("agreement")["parties"]
    keys = {unhex(each["instance_id"]): unhex(each["signing_key"]) for each in vectors["instances"]}
    records = {}
    for each in vectors["share_records"]:
        outer = second.uncbor(unhex(each["encoded"]))
        content = second.uncbor(outer["content"])
        second.check_signature(keys[content["instance_id"]], "checkpoint shares", outer["content"], outer["signature"])
        records[content["instance_id"]] = second.sha256(outer["content"])
        assert records[content["instance_id"]].hex() == each["sha256"]
        for name, signature in each["kept"].items():
            key = unhex(parties[name]["public_key"])
            second.check_signature(key, "checkpoint share kept", unhex(each["sha256"]), unhex(signature))
    for each in vectors["checkpoints"]:
        instance_id = second.uncbor(unhex(each["purpose"]))["instance_id"]
        purpose, found = second.check_seal(unhex(each["seal"]), keys[instance_id])
        assert (found.hex(), purpose["number"]) == (each["hash"], each["number"])
        assert purpose["shares_sha256"] == records[instance_id]
        assert second.uncbor(unhex(each["seal"]))["content"] == second.sha256(unhex(each["content"]))
        message = second.checkpoint_message(purpose, found)
        assert message.hex() == each["message"]
        certificate = second.uncbor(unhex(each["certificate"]))
        assert certificate["seal"].hex() == each["seal"]
        for name, signature in certificate["signatures"].items():
            second.check_signature(unhex(parties[name]["public_key"]), "checkpoint", message, signature)
        assert set(certificate["signatures"]) == set(parties)
    nonce = second.lineage_nonce(unhex(read("agreement")["manifest"]["sha256"]))
    assert nonce.hex() == vectors["lineage_nonce"]


def test_receipt() -> None:
    vectors = read("receipt")
    body = second.check_receipt(vectors["receipt"])
    assert body["adapter_sha256"] == vectors["adapter_sha256"]
    # Our own verifier finds the same.
    policy = AppraisalPolicy.from_toml(vectors["policy"])
    data, adapter = vectors["receipt"].encode(), vectors["adapter_sha256"]
    verdict = verify_receipt(data, policy=policy, adapter_sha256=adapter, allow_simulated=True)
    assert [check.reason for check in verdict.checks if not check.passed] == []
    assert (
        hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        == (vectors["body_sha256"])
    )


def test_the_second_implementation_refuses_a_changed_receipt() -> None:
    receipt = json.loads(read("receipt")["receipt"])
    for change in (
        lambda r: r["body"].update(ended=r["body"]["ended"] + 1),
        lambda r: r["countersignatures"]["north"].update(time=1),
        lambda r: r["body"]["history"]["chain"].pop(0),
        lambda r: r["body"]["approvals"].pop("south"),
    ):
        changed = json.loads(json.dumps(receipt))
        change(changed)
        text = json.dumps(changed, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        with pytest.raises((AssertionError, InvalidSignature)):
            second.check_receipt(text)
