"""Attacks on receipts: every altered byte, everything left out, exchanged or taken from elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cloister.adapters.files import adapter_sha256
from cloister.agreement import APPROVAL_LABEL, MANIFEST_LABEL, Manifest, approval_message
from cloister.agreement.receipt import COUNTERSIGN_LABEL, Receipt, body_bytes, countersign_message, verify_receipt
from cloister.attest.binding import instance_report_data
from cloister.attest.policy import AppraisalPolicy
from cloister.crypto.keys import PartyKey
from cloister.errors import ProtocolError
from cloister.party.client import Results
from tests.unit.agreement.histories import uninterrupted
from tests.unit.enclave.stage import ADAPTER, NOW, POLICY, Stage, attester, canonical_job

ADAPTER_SHA256 = adapter_sha256(ADAPTER)


def run(folder: Path, names: tuple[str, ...] = ("north", "south")) -> tuple[Stage, Receipt]:
    folder.mkdir(exist_ok=True)
    stage = Stage(folder, names=names)
    results = stage.perform(stage.enclave())[names[0]]
    assert isinstance(results, Results)
    return stage, results.receipt


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stage, Receipt]:
    return run(tmp_path_factory.mktemp("honest"))


def failed(
    receipt: Receipt | bytes,
    *,
    policy: AppraisalPolicy | None = POLICY,
    adapter: str | None = ADAPTER_SHA256,
    allow_simulated: bool = True,
) -> list[str]:
    """Names of the checks that fail."""
    data = receipt.to_bytes() if isinstance(receipt, Receipt) else receipt
    verdict = verify_receipt(data, policy=policy, adapter_sha256=adapter, allow_simulated=allow_simulated)
    assert verdict.passed == all(check.passed for check in verdict.checks)
    return [check.name for check in verdict.checks if not check.passed]


def test_an_honest_receipt(honest: tuple[Stage, Receipt]) -> None:
    stage, receipt = honest
    verdict = verify_receipt(receipt.to_bytes(), policy=POLICY, adapter_sha256=ADAPTER_SHA256, allow_simulated=True)
    assert verdict.passed
    assert [check.n for check in verdict.checks] == list(range(1, 12))
    assert verdict.signers == sorted(stage.names)
    assert verdict.claims is not None
    assert not verdict.claims.hardware


def test_every_altered_byte_is_found(tmp_path: Path) -> None:
    _, receipt = run(tmp_path / "one", names=("n",))
    data = receipt.to_bytes()
    assert failed(data) == []
    reached = set()
    for at in range(len(data)):
        altered = data[:at] + bytes([data[at] ^ 0x01]) + data[at + 1 :]
        try:
            checks = failed(altered)
        except ProtocolError:
            continue
        assert checks, f"byte {at} ({data[max(0, at - 20) : at + 20]!r}) may be altered"
        reached |= set(checks)
    # Each of these was the one that found something that is well-formed.
    assert {"job", "approvals", "manifest", "instance", "evidence", "countersignatures", "adapter"} <= reached


def test_every_cut_and_anything_behind_the_end(honest: tuple[Stage, Receipt]) -> None:
    data = honest[1].to_bytes()
    for end in [*range(0, len(data), 97), len(data) - 1]:
        with pytest.raises(ProtocolError):
            failed(data[:end])
    for surplus in (b" ", b"\n", b"{}", b"\x00"):
        with pytest.raises(ProtocolError):
            failed(data + surplus)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'"receipt"',
        b"\xff\xfe",
        b"[" * 100_000,
        b"9" * 10_000,
        b'{"version": 1, "body": {}, "instance": {}, "signature": "", "countersignatures": {}}',
        b'{"version": 1, "body": [], "instance": [], "signature": 1, "countersignatures": []}',
    ],
)
def test_things_that_are_no_receipt(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        failed(data)


@pytest.mark.parametrize("time", [-1, 2**63, 2**70, 1e400, float("nan"), 1.5, True, None, "1", [], {}])
def test_times_that_are_none(honest: tuple[Stage, Receipt], time: object) -> None:
    content = json.loads(honest[1].to_bytes())
    content["countersignatures"]["north"]["time"] = time
    with pytest.raises(ProtocolError):
        failed((json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def test_any_value_of_the_body_may_be_of_any_type(honest: tuple[Stage, Receipt]) -> None:
    """Whoever holds a signing key may sign nonsense: a check fails, the verifier does not."""
    _, receipt = honest
    body = json.loads(receipt.body)
    for name in body:
        for value in (None, [], {}, "", "zz", 0, -1, True, [[]], {"north": 1}, {"north": None, "south": None}):
            forged = replace(receipt, body=body_bytes({**body, name: value}))
            assert "instance" in failed(forged)
        assert "instance" in failed(replace(receipt, body=body_bytes({k: v for k, v in body.items() if k != name})))
    for value in ([], "", 0, None):
        assert "job" in failed(replace(receipt, body=body_bytes(value)))  # type: ignore[arg-type]


def forge(stage: Stage, receipt: Receipt, change: Callable[[dict[str, Any]], object]) -> Receipt:
    """The strongest forgery: an operator who has an instance key of their own signs a changed body, with fresh
    evidence for it, and the old countersignatures."""
    body = json.loads(receipt.body)
    change(body)
    key, encoded = PartyKey.generate(), body_bytes(body)
    report_data = instance_report_data(
        job_id=body["job_id"],
        instance_id=receipt.instance.id,
        signing_key=key.public,
        hpke_key=receipt.instance.hpke_key,
        nonce=hashlib.sha256(encoded).digest(),
    )
    evidence = attester().collect(report_data).to_bytes()
    instance = replace(receipt.instance, signing_key=key.public, evidence=evidence)
    return replace(receipt, body=encoded, instance=instance, signature=key.sign("receipt", encoded))


def test_a_swapped_adapter(honest: tuple[Stage, Receipt]) -> None:
    stage, receipt = honest
    assert failed(receipt, adapter="00" * 32) == ["adapter"]
    forged = forge(stage, receipt, lambda body: body.update(adapter_sha256="00" * 32))
    assert failed(forged, adapter="00" * 32) == ["countersignatures"]
    assert failed(forged) == ["countersignatures", "adapter"]


def test_changed_metrics(honest: tuple[Stage, Receipt]) -> None:
    stage, receipt = honest
    forged = forge(stage, receipt, lambda body: body["metrics"][0].update(bits_per_byte=0.1))
    assert failed(forged) == ["countersignatures"]


def test_a_job_with_other_recipients(honest: tuple[Stage, Receipt]) -> None:
    stage, receipt = honest

    def release(body: dict[str, Any]) -> None:
        job = json.loads(body["job"])
        job["job"]["release"] = {"to": ["south"]}
        body["job"] = json.dumps(job, sort_keys=True, separators=(",", ":"))

    assert failed(forge(stage, receipt, release)) == ["job", "approvals", "manifest", "countersignatures"]

    def consistently(body: dict[str, Any]) -> None:
        release(body)
        body["job_id"] = hashlib.sha256(body["job"].encode()).hexdigest()

    assert failed(forge(stage, receipt, consistently)) == ["approvals", "manifest", "countersignatures"]


def test_a_job_with_the_forgers_keys(honest: tuple[Stage, Receipt]) -> None:
    """Somebody makes up a whole job with parties of the same names. All is consistent but for its id, which is what
    a relying party knows the job by."""
    stage, receipt = honest
    keys = {name: PartyKey.generate() for name in stage.names}
    manifest = Manifest.from_bytes(bytes.fromhex(json.loads(receipt.body)["manifest"]))

    def replaced(body: dict[str, Any]) -> None:
        body["job"] = canonical_job(keys).decode()
        body["job_id"] = hashlib.sha256(body["job"].encode()).hexdigest()
        own = replace(manifest, job_id=body["job_id"])
        body["manifest"] = own.to_bytes().hex()
        approval = approval_message(body["job_id"])
        body["approvals"] = {n: key.sign(APPROVAL_LABEL, approval).hex() for n, key in keys.items()}
        body["manifest_signatures"] = {n: key.sign(MANIFEST_LABEL, own.sha256).hex() for n, key in keys.items()}
        body["history"] = uninterrupted(own, receipt.instance.id, keys)

    forged = forge(stage, receipt, replaced)
    assert failed(forged) == ["countersignatures"]
    message = countersign_message(forged, NOW)
    signatures = {n: (NOW, key.sign(COUNTERSIGN_LABEL, message)) for n, key in keys.items()}
    complete = replace(forged, countersignatures=signatures)
    assert failed(complete) == []
    assert json.loads(complete.body)["job_id"] != stage.job_id


def test_signatures_left_out_or_exchanged(honest: tuple[Stage, Receipt]) -> None:
    stage, receipt = honest
    for kind, check in (("approvals", "approvals"), ("manifest_signatures", "manifest")):
        for change in (
            lambda body, kind=kind: body[kind].pop("south"),
            lambda body, kind=kind: body[kind].update(south=body[kind]["north"]),
            lambda body, kind=kind: body[kind].update(stranger=body[kind]["north"]),
            lambda body, kind=kind: body[kind].clear(),
        ):
            assert failed(forge(stage, receipt, change)) == [check, "countersignatures"]


def test_countersignatures_left_out_or_exchanged(honest: tuple[Stage, Receipt]) -> None:
    _, receipt = honest
    both = dict(receipt.countersignatures)
    for wrong in (
        {},
        {"north": both["north"]},
        {**both, "stranger": both["north"]},
        {**both, "south": both["north"]},
        {**both, "south": (both["south"][0] + 1, both["south"][1])},
    ):
        assert "countersignatures" in failed(replace(receipt, countersignatures=wrong))


def test_an_empty_job_has_no_parties_that_could_have_signed(honest: tuple[Stage, Receipt]) -> None:
    stage, receipt = honest

    def empty(body: dict[str, Any]) -> None:
        body["job"] = canonical_job({}).decode()
        body["job_id"] = hashlib.sha256(body["job"].encode()).hexdigest()
        body["approvals"], body["manifest_signatures"] = {}, {}

    forged = replace(forge(stage, receipt, empty), countersignatures={})
    assert {"approvals", "manifest", "countersignatures"} <= set(failed(forged))


def test_evidence_of_another_instance(honest: tuple[Stage, Receipt], tmp_path: Path) -> None:
    _, receipt = honest
    _, other = run(tmp_path / "other")
    assert failed(replace(receipt, instance=replace(receipt.instance, evidence=other.instance.evidence))) == [
        "evidence",
        "countersignatures",
    ]
    assert failed(replace(receipt, instance=other.instance)) == [
        "instance",
        "evidence",
        "checkpoints",
        "countersignatures",
    ]
    assert failed(replace(receipt, signature=other.signature)) == ["instance"]


def test_a_receipt_of_another_run_is_another_receipt(honest: tuple[Stage, Receipt], tmp_path: Path) -> None:
    """The body of one run with instance, signature and countersignatures of another."""
    _, receipt = honest
    _, other = run(tmp_path / "other")
    assert failed(replace(other, body=receipt.body)) == [
        "instance",
        "evidence",
        "checkpoints",
        "countersignatures",
    ]


def test_simulated_evidence_needs_both_permissions(honest: tuple[Stage, Receipt]) -> None:
    _, receipt = honest
    assert failed(receipt, allow_simulated=False) == ["evidence"]
    assert failed(receipt, policy=AppraisalPolicy(accept=("tdx",))) == ["evidence"]
    assert failed(receipt, policy=AppraisalPolicy()) == ["evidence"]


def test_the_policy_is_the_verifiers_own(honest: tuple[Stage, Receipt]) -> None:
    _, receipt = honest
    assert failed(receipt, policy=AppraisalPolicy.insecure_simulated_only(b"other program".ljust(32))) == ["evidence"]
    verdict = verify_receipt(receipt.to_bytes(), policy=None, adapter_sha256=None, allow_simulated=True)
    assert verdict.claims is None
    assert "evidence" not in [check.name for check in verdict.checks]


def test_a_policy_from_elsewhere(honest: tuple[Stage, Receipt]) -> None:
    """The manifest names a policy that is not the one the job states."""
    stage, receipt = honest

    def other_policy(body: dict[str, Any]) -> None:
        manifest = replace(Manifest.from_bytes(bytes.fromhex(body["manifest"])), policy_sha256="00" * 32)
        body["manifest"] = manifest.to_bytes().hex()
        signatures = {n: key.sign(MANIFEST_LABEL, manifest.sha256).hex() for n, key in stage.keys.items()}
        body["manifest_signatures"] = signatures

    assert failed(forge(stage, receipt, other_policy)) == ["manifest", "countersignatures"]


def test_a_manifest_of_another_measurement(honest: tuple[Stage, Receipt]) -> None:
    stage, receipt = honest

    def other_program(body: dict[str, Any]) -> None:
        manifest = Manifest.from_bytes(bytes.fromhex(body["manifest"]))
        manifest = replace(manifest, registers={"source": "00" * 32})
        body["manifest"] = manifest.to_bytes().hex()
        signatures = {n: key.sign(MANIFEST_LABEL, manifest.sha256).hex() for n, key in stage.keys.items()}
        body["manifest_signatures"] = signatures

    assert failed(forge(stage, receipt, other_program)) == ["measurement", "checkpoints", "countersignatures"]


def test_evidence_is_appraised_at_the_time_of_the_countersignatures(honest: tuple[Stage, Receipt]) -> None:
    """Years later the verdict is the same; a countersignature that came too late for the evidence does not help."""
    stage, receipt = honest
    late = NOW + 301
    message = countersign_message(receipt, late)
    signatures = {n: (late, key.sign(COUNTERSIGN_LABEL, message)) for n, key in stage.keys.items()}
    assert failed(replace(receipt, countersignatures=signatures)) == ["evidence"]
