"""Method `slice` at the server: whom it lets in, and what it keeps of them for the receipt."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cloister.agreement.party_enclaves import MAX_SESSIONS, check_party_enclaves
from cloister.attest.policy import AppraisalPolicy
from cloister.channel.handshake import Established, Responder
from cloister.crypto.bundle import BundleHeader
from cloister.crypto.encoding import Fields
from cloister.enclave.server import responder_settings
from cloister.enclave.slice import SliceService
from cloister.enclave.split import SplitService
from cloister.errors import CloisterError, ProtocolError, VerificationError
from cloister.job import EnclaveSection, TransportSection
from tests.unit.channel.peers import JOB, KEY, MEASUREMENT, NOW, PARTY, CountingAttester, appraise, initiator, shake


def opened() -> Any:
    """What the services look at of an opened job."""
    return SimpleNamespace(
        resolved=SimpleNamespace(
            job_id=JOB, job=SimpleNamespace(enclave=EnclaveSection(), transport=TransportSection())
        ),
        parties={PARTY: KEY.public},
        kinds=("train", "validation", "test"),
    )


def service(folder: Path) -> SliceService:
    return SliceService(opened(), folder, insecure_simulated=True)


def shaken(made: SliceService | SplitService, attester: CountingAttester | None) -> Established:
    settings = responder_settings(opened(), CountingAttester(), made, appraise)
    return shake(initiator(attester=attester), Responder(settings))[1]


def test_a_party_without_an_enclave_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VerificationError) as error:
        shaken(service(tmp_path), None)
    assert error.value.code == "evidence-missing"
    with pytest.raises(VerificationError) as error:
        shaken(service(tmp_path), CountingAttester(measurement=b"x" * 32))
    assert error.value.code == "measurement"
    assert shaken(service(tmp_path), CountingAttester()).peer.evidence


def test_in_split_parties_have_none(tmp_path: Path) -> None:
    assert shaken(SplitService(opened(), tmp_path), None).peer.evidence == b""
    with pytest.raises(ProtocolError, match="does not ask"):
        shaken(SplitService(opened(), tmp_path), CountingAttester())


def entries(made: SliceService) -> list[dict[str, Any]]:
    return made._entries({})[PARTY]


def body(made: SliceService, **changes: Any) -> dict[str, Any]:
    times = [entry["time"] for entry in entries(made)] or [NOW]
    found = {"job_id": JOB, "started": min(times), "ended": max(times), "party_enclaves": {PARTY: entries(made)}}
    return found | changes


def check(content: dict[str, Any], policy: AppraisalPolicy | None = None) -> str:
    policy = policy or AppraisalPolicy.insecure_simulated_only(MEASUREMENT)
    return check_party_enclaves(content, parties={PARTY: KEY.public}, policy=policy, allow_simulated=True)[0]


def test_the_receipt_shows_the_enclave_of_each_session_that_delivered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloister.enclave.slice.time.time", lambda: NOW)
    made = service(tmp_path)
    peer = shaken(made, CountingAttester()).peer
    made.met(peer, "task")
    assert entries(made) == [], "who delivered nothing is not shown"
    made.met(peer, "deliver")
    made.met(peer, "deliver")
    assert len(entries(made)) == 1, "once a session"
    assert "all 1 parties' enclaves" in check(body(made))
    for _ in range(MAX_SESSIONS + 3):
        made.met(shaken(made, CountingAttester()).peer, "deliver")
    assert len(entries(made)) == MAX_SESSIONS
    check(body(made))


def test_an_altered_entry_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloister.enclave.slice.time.time", lambda: NOW)
    made = service(tmp_path)
    made.met(shaken(made, CountingAttester()).peer, "deliver")
    (good,) = entries(made)
    other = "00" * 64
    for bad in (
        body(made, job_id="cd" * 32),
        body(made, party_enclaves={PARTY: [good | {"bound_to": other}]}),
        body(made, party_enclaves={PARTY: []}),
        body(made, party_enclaves={}),
        body(made, party_enclaves={PARTY: [good], "stranger": [good]}),
        body(made, party_enclaves={PARTY: [good | {"time": NOW - 1}]}),
    ):
        with pytest.raises(CloisterError):
            check(bad)
    with pytest.raises(VerificationError):
        check(body(made), AppraisalPolicy.insecure_simulated_only(b"x" * 32))


def test_nobody_sends_bundles_or_asks_the_server(tmp_path: Path) -> None:
    made = service(tmp_path)
    header = BundleHeader(
        job_id=JOB,
        party=PARTY,
        kind="train",
        schema={"activation_dtype": "float32", "hidden": 8},
        counts={"packs": 1},
        chunk_bytes=64,
        max_payload_bytes=64,
    )
    with pytest.raises(CloisterError):
        made.incoming(header)
    with pytest.raises(ProtocolError, match="answers no queries"):
        made.query(PARTY, "query.open", Fields({}, "query"))
