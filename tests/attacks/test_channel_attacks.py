"""Attack stories on the handshake: each ends in a refusal with its own code, and a stranger gets no evidence."""

from __future__ import annotations

import dataclasses

import pytest

from cloister.attest.evidence import Evidence
from cloister.channel.handshake import HELLO, SUITE, Responder, State
from cloister.crypto.encoding import Fields, encode
from cloister.crypto.keys import PartyKey
from cloister.errors import CloisterError, ProtocolError, VerificationError
from tests.unit.channel.peers import JOB, KEY, MEASUREMENT, NOW, PARTY, CountingAttester, initiator, settings, shake


def refused_hello(hello: bytes, **changes: object) -> tuple[str, int]:
    """(code, evidence made) when an enclave is sent this hello."""
    attester = CountingAttester()
    responder = Responder(settings(attester=attester, **changes))
    with pytest.raises(CloisterError) as refused:
        responder.receive(hello, NOW)
    assert responder.state is State.CLOSED
    return refused.value.code, len(attester.asked)


def test_a_stranger_gets_no_evidence() -> None:
    stranger = PartyKey.generate()
    assert refused_hello(initiator(key=stranger).start(NOW)) == ("signature", 0)
    assert refused_hello(initiator(party="stranger", key=stranger).start(NOW)) == ("party", 0)


def test_an_unsigned_hello_gets_no_evidence() -> None:
    fields = Fields.decode(initiator().start(NOW)[1:], max_bytes=4096, what="hello")
    body = fields.blob("body")
    unsigned = bytes([HELLO]) + encode({"body": body, "signature": bytes(64)})
    assert refused_hello(unsigned) == ("signature", 0)
    assert refused_hello(bytes([HELLO]) + encode({"body": body})) == ("protocol", 0)
    assert refused_hello(bytes([HELLO]) + body) == ("protocol", 0)


def test_another_party_of_the_job_under_a_false_name() -> None:
    other = PartyKey.generate()
    keys = {PARTY: KEY.public, "hospital-b": other.public}
    assert refused_hello(initiator(party="hospital-b").start(NOW), public_keys=keys) == ("signature", 0)


def test_another_job() -> None:
    assert refused_hello(initiator(job_id="cd" * 32).start(NOW)) == ("job", 0)


def test_every_altered_byte_of_hello() -> None:
    hello = initiator().start(NOW)
    for at in range(len(hello)):
        _, made = refused_hello(hello[:at] + bytes([hello[at] ^ 1]) + hello[at + 1 :])
        assert made == 0


def test_a_downgraded_suite() -> None:
    """A man in the middle offers a suite without ML-KEM: the signature does not hold, whatever he writes."""
    hello = initiator().start(NOW)
    weaker = hello.replace(SUITE.encode(), SUITE.replace("ML-KEM-768", "ML-KEM-512").encode())
    assert weaker != hello
    assert refused_hello(weaker)[1] == 0
    # A party that asks for it itself is refused by name.
    weak: dict[str, str | int] = {
        "version": 1,
        "suite": "X25519/HKDF-SHA-256/AES-128-GCM",
        "job_id": JOB,
        "party": PARTY,
    }
    encoded = encode(weak)
    signed = bytes([HELLO]) + encode({"body": encoded, "signature": KEY.sign("handshake hello", encoded)})
    assert refused_hello(signed) == ("suite", 0)


def test_a_recorded_hello_buys_no_second_evidence() -> None:
    shared = settings()
    hello = initiator().start(NOW)
    Responder(shared).receive(hello, NOW)
    with pytest.raises(VerificationError) as refused:
        Responder(shared).receive(hello, NOW + 10)
    assert refused.value.code == "replay"
    assert isinstance(shared.attester, CountingAttester)
    assert len(shared.attester.asked) == 1


def test_every_altered_byte_of_reply() -> None:
    """The party sends nothing secret and nothing signed in answer to a reply with any byte changed."""
    party, enclave = initiator(), Responder(settings())
    reply = enclave.receive(party.start(NOW), NOW)
    assert isinstance(reply, bytes)
    hello = party._hello
    codes = set()
    for at in range(len(reply)):
        party.state = State.WAIT_REPLY
        with pytest.raises((VerificationError, ProtocolError)) as refused:
            party.receive(reply[:at] + bytes([reply[at] ^ 1]) + reply[at + 1 :], NOW)
        codes.add(refused.value.code)
        assert party.state is State.CLOSED
    assert codes == {"handshake", "protocol"}
    assert party._hello == hello
    party.state = State.WAIT_REPLY
    party.receive(reply, NOW)  # unchanged, it is good


def test_every_altered_byte_of_finish() -> None:
    party, enclave = initiator(), Responder(settings())
    reply = enclave.receive(party.start(NOW), NOW)
    assert isinstance(reply, bytes)
    finish, _ = party.receive(reply, NOW)
    for at in range(len(finish)):
        enclave.state = State.WAIT_FINISH
        with pytest.raises((VerificationError, ProtocolError)):
            enclave.receive(finish[:at] + bytes([finish[at] ^ 1]) + finish[at + 1 :], NOW)
        assert enclave.state is State.CLOSED


class Relay(CountingAttester):
    """A man in the middle without a TEE: it presents evidence that a real enclave made for another handshake."""

    def __init__(self, evidence: Evidence) -> None:
        super().__init__()
        self._evidence = evidence

    def collect(self, report_data: bytes) -> Evidence:
        return self._evidence


def test_relayed_evidence() -> None:
    """The attacker opens a session of his own with the real enclave and passes its evidence on."""
    real = CountingAttester()
    shake(enclave=Responder(settings(attester=real)))
    with pytest.raises(VerificationError) as refused:
        shake(enclave=Responder(settings(attester=Relay(real.collected[0]))))
    assert refused.value.code == "binding"


def test_reflected_evidence() -> None:
    """A party's own evidence is no enclave's, even over the same job."""
    own = CountingAttester()
    party = initiator(attester=own)
    with pytest.raises(ProtocolError):
        shake(party)  # the enclave does not ask for it, but it has been made
    with pytest.raises(VerificationError) as refused:
        shake(enclave=Responder(settings(attester=Relay(own.collected[0]))))
    assert refused.value.code == "binding"


def test_an_enclave_that_runs_something_else() -> None:
    with pytest.raises(VerificationError) as refused:
        shake(enclave=Responder(settings(attester=CountingAttester(measurement=b"x" * 32))))
    assert refused.value.code == "measurement"
    assert MEASUREMENT != b"x" * 32


def test_evidence_of_another_type() -> None:
    real = CountingAttester()
    shake(enclave=Responder(settings(attester=real)))
    relabelled = dataclasses.replace(real.collected[0], type="tdx")
    with pytest.raises(VerificationError) as refused:
        shake(enclave=Responder(settings(attester=Relay(relabelled))))
    assert refused.value.code == "type"


def test_a_man_in_the_middle_with_his_own_shares() -> None:
    """He answers the party himself and forwards its hello: he cannot finish towards the enclave."""
    party, enclave = initiator(), Responder(settings())
    hello = party.start(NOW)
    enclave.receive(hello, NOW)
    evil = Responder(settings(attester=CountingAttester()))
    reply = evil.receive(hello, NOW)
    assert isinstance(reply, bytes)
    finish, _ = party.receive(reply, NOW)  # only because simulated evidence can be made by anyone
    with pytest.raises(VerificationError) as refused:
        enclave.receive(finish, NOW)
    assert refused.value.code == "handshake"


def test_a_stolen_hello_does_not_finish() -> None:
    """Someone got the party to sign one hello with his own key shares; he still lacks the party's key at the end."""
    party, enclave = initiator(), Responder(settings())
    reply = enclave.receive(party.start(NOW), NOW)
    assert isinstance(reply, bytes)
    party._key = PartyKey.generate()
    finish, _ = party.receive(reply, NOW)
    with pytest.raises(VerificationError) as refused:
        enclave.receive(finish, NOW)
    assert refused.value.code == "signature"


def test_messages_of_two_sessions_do_not_mix() -> None:
    shared = settings()
    first, second = initiator(), initiator()
    enclave_1, enclave_2 = Responder(shared), Responder(shared)
    reply_1 = enclave_1.receive(first.start(NOW), NOW)
    reply_2 = enclave_2.receive(second.start(NOW), NOW)
    assert isinstance(reply_1, bytes)
    assert isinstance(reply_2, bytes)
    finish_1, _ = first.receive(reply_1, NOW)
    with pytest.raises(VerificationError) as refused:
        second.receive(reply_1, NOW)
    assert refused.value.code == "handshake"
    with pytest.raises(VerificationError):
        enclave_2.receive(finish_1, NOW)


def test_records_of_another_session() -> None:
    (party_1, _), (_, enclave_2) = shake(), shake()
    (record,) = party_1.sealer.seal(b"text")
    with pytest.raises(VerificationError) as refused:
        enclave_2.opener.feed(record)
    assert refused.value.code == "record"
