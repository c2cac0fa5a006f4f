"""The handshake as a state machine: it opens, and from every state every wrong input closes it."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.channel.handshake import (
    CLOCK_WINDOW_S,
    FINISH,
    HELLO,
    MAX_HELLO_BYTES,
    REPLY,
    SUITE,
    Established,
    Initiator,
    Responder,
    State,
)
from cloister.channel.replay import ReplayGuard
from cloister.crypto.encoding import encode
from cloister.errors import CapacityError, CloisterError, ProtocolError, TransportError, VerificationError
from tests.unit.channel.peers import JOB, KEY, NOW, PARTY, CountingAttester, appraise, initiator, shake
from tests.unit.channel.peers import settings as responder_settings


def test_established() -> None:
    at_party, at_enclave = shake()
    assert at_party.transcript == at_enclave.transcript
    assert (at_enclave.peer.party, at_enclave.peer.public_key, at_enclave.peer.claims) == (PARTY, KEY.public, None)
    assert at_party.peer.claims is not None
    assert at_party.peer.claims.type == "simulated"
    for sender, receiver in ((at_party, at_enclave), (at_enclave, at_party)):
        (record,) = sender.sealer.seal(b"text")
        assert receiver.opener.feed(record) == b"text"
    assert "sealer" not in repr(at_party)


def test_every_session_is_different() -> None:
    assert len({shake()[0].transcript for _ in range(5)}) == 5


def test_the_two_directions_have_different_keys() -> None:
    at_party, _ = shake()
    (record,) = at_party.sealer.seal(b"text")
    with pytest.raises(VerificationError):  # reflected to its sender
        at_party.opener.feed(record)


def test_mutual() -> None:
    attester = CountingAttester()
    enclave = Responder(responder_settings(verify_evidence=appraise, require_evidence=True))
    _, at_enclave = shake(initiator(attester=attester), enclave)
    assert at_enclave.peer.claims is not None
    assert len(attester.asked) == 1
    with pytest.raises(VerificationError) as refused:
        shake(initiator(), Responder(responder_settings(verify_evidence=appraise, require_evidence=True)))
    assert refused.value.code == "evidence-missing"
    with pytest.raises(ProtocolError, match="does not ask"):
        shake(initiator(attester=CountingAttester()))
    wrong = CountingAttester(measurement=b"x" * 32)
    with pytest.raises(VerificationError) as refused:
        shake(initiator(attester=wrong), Responder(responder_settings(verify_evidence=appraise)))
    assert refused.value.code == "measurement"
    with pytest.raises(ValueError, match="needs verify_evidence"):
        responder_settings(require_evidence=True)


def machines(state: State) -> tuple[Initiator | Responder, dict[str, bytes]]:
    """A machine in `state`, and valid messages of its own session by name."""
    party, enclave = initiator(), Responder(responder_settings())
    messages = {"hello": party.start(NOW)}
    if state is State.START:
        return initiator(), messages
    if state is State.WAIT_HELLO:
        return enclave, messages
    reply = enclave.receive(messages["hello"], NOW)
    assert isinstance(reply, bytes)
    messages["reply"] = reply
    if state is State.WAIT_REPLY:
        return party, messages
    finish, _ = party.receive(reply, NOW)
    messages["finish"] = finish
    if state is State.WAIT_FINISH:
        return enclave, messages
    if state is State.OPEN:
        enclave.receive(finish, NOW)
        return enclave, messages
    enclave.close()
    return enclave, messages


EXPECTED = {
    (State.WAIT_HELLO, "hello"), (State.WAIT_REPLY, "reply"), (State.WAIT_FINISH, "finish")
}  # fmt: skip


@settings(max_examples=250, deadline=None)
@given(
    state=st.sampled_from(list(State)),
    name=st.sampled_from(["hello", "reply", "finish", "start", "random", "other session", "empty"]),
    noise=st.binary(max_size=80),
    kind=st.sampled_from([HELLO, REPLY, FINISH, 0, 0x12]),
)
def test_every_state_and_input(state: State, name: str, noise: bytes, kind: int) -> None:
    """Only the expected message of the own session moves a machine on; anything else closes it for good."""
    machine, messages = machines(state)
    assert machine.state is state
    if name == "start":
        if not isinstance(machine, Initiator) or state is State.START:
            return
        with pytest.raises(ProtocolError):
            machine.start(NOW)
        assert machine.state is State.CLOSED
        return
    if name == "other session":
        other = machines(State.CLOSED)[1]
        wanted = {State.WAIT_HELLO: "reply", State.WAIT_REPLY: "reply", State.WAIT_FINISH: "finish"}.get(state, "hello")
        message = other[wanted]
    elif name == "random":
        message = bytes([kind]) + noise
    elif name == "empty":
        message = b""
    elif name in messages:
        message = messages[name]
    else:
        return
    if (state, name) in EXPECTED:
        machine.receive(message, NOW)
        assert machine.state in (State.WAIT_FINISH, State.OPEN)
        return
    with pytest.raises(CloisterError) as refused:
        machine.receive(message, NOW)
    assert isinstance(refused.value, ProtocolError | VerificationError)
    assert machine.state is State.CLOSED
    with pytest.raises(ProtocolError):  # also for what would have been right before
        machine.receive(messages.get("reply", b""), NOW)


def test_timeouts() -> None:
    party, enclave = initiator(timeout_s=30), Responder(responder_settings(timeout_s=30))
    reply = enclave.receive(party.start(NOW), NOW)
    assert isinstance(reply, bytes)
    with pytest.raises(TransportError, match="30 s"):
        party.receive(reply, NOW + 31)
    with pytest.raises(TransportError, match="30 s"):
        enclave.receive(b"", NOW + 31)
    assert (party.state, enclave.state) == (State.CLOSED, State.CLOSED)
    waiting = Responder(responder_settings(timeout_s=30))
    waiting.check_deadline(NOW)
    with pytest.raises(TransportError):
        waiting.receive(initiator().start(NOW), NOW + 31)


@pytest.mark.parametrize("off_s", [-CLOCK_WINDOW_S - 1, CLOCK_WINDOW_S + 1])
def test_clocks_too_far_apart(off_s: float) -> None:
    attester = CountingAttester()
    with pytest.raises(VerificationError) as refused:
        Responder(responder_settings(attester=attester)).receive(initiator().start(NOW + off_s), NOW)
    assert refused.value.code == "clock"
    assert "clocks" in refused.value.hint
    assert attester.asked == []


def test_clocks_a_little_apart() -> None:
    for off_s in (-CLOCK_WINDOW_S + 1, CLOCK_WINDOW_S - 1):
        assert isinstance(Responder(responder_settings()).receive(initiator().start(NOW + off_s), NOW), bytes)


def hello(**changes: object) -> bytes:
    """A HELLO signed by the party, with some of its fields changed before signing."""
    body: dict[str, object] = {
        "version": 1,
        "suite": SUITE,
        "job_id": JOB,
        "party": PARTY,
        "time": int(NOW),
        "random": b"r" * 32,
        "x25519": b"\x09" + bytes(31),
        "mlkem": bytes(1184),
    }
    encoded = encode(body | changes)  # type: ignore[arg-type]  # any value that encodes
    return bytes([HELLO]) + encode({"body": encoded, "signature": KEY.sign("handshake hello", encoded)})


@pytest.mark.parametrize(
    "changes",
    [
        {"extra": 1},
        {"x25519": b"short"},
        {"x25519": bytes(32)},  # small order: the shared secret would be known to all
        {"mlkem": bytes(1183)},
        {"mlkem": b"\xff" * 1184},
        {"random": b""},
        {"time": -1},
        {"time": "now"},
        {"version": "1"},
    ],
)
def test_a_party_that_sends_malformed_hellos(changes: dict[str, object]) -> None:
    attester = CountingAttester()
    with pytest.raises(ProtocolError):
        Responder(responder_settings(attester=attester)).receive(hello(**changes), NOW)
    assert attester.asked == []


def test_that_hello_is_good_without_changes() -> None:
    assert isinstance(Responder(responder_settings()).receive(hello(), NOW), bytes)


def test_a_long_hello_is_refused_unread() -> None:
    with pytest.raises(ProtocolError, match="allowed"):
        Responder(responder_settings()).receive(bytes([HELLO]) + bytes(MAX_HELLO_BYTES + 1), NOW)


@pytest.mark.parametrize(
    "changes",
    [{"x25519": bytes(32)}, {"x25519": b"short"}, {"mlkem": bytes(1087)}, {"random": b""}, {"extra": 1}],
)
def test_an_enclave_that_sends_malformed_shares(changes: dict[str, object]) -> None:
    share: dict[str, object] = {"x25519": b"\x09" + bytes(31), "mlkem": bytes(1088), "random": bytes(32)}
    party = initiator()
    party.start(NOW)
    encoded = encode(share | changes)  # type: ignore[arg-type]  # any value that encodes
    with pytest.raises(ProtocolError):
        party.receive(bytes([REPLY]) + encode({"share": encoded, "sealed": bytes(100)}), NOW)


def test_good_shares_without_the_secret() -> None:
    """The base of the cases above is well-formed; it fails only because its sender cannot know the keys."""
    share = encode({"x25519": b"\x09" + bytes(31), "mlkem": bytes(1088), "random": bytes(32)})
    party = initiator()
    party.start(NOW)
    with pytest.raises(VerificationError) as refused:
        party.receive(bytes([REPLY]) + encode({"share": share, "sealed": bytes(100)}), NOW)
    assert refused.value.code == "handshake"


def test_an_enclave_without_evidence() -> None:
    """A man in the middle that knows the protocol but has no TEE."""

    class NoEvidence(CountingAttester):
        def collect(self, report_data: bytes):  # type: ignore[no-untyped-def]  # a stand-in
            class Empty:
                def to_bytes(self) -> bytes:
                    return b""

            return Empty()

    with pytest.raises(VerificationError) as refused:
        shake(enclave=Responder(responder_settings(attester=NoEvidence())))
    assert refused.value.code == "evidence-missing"


def test_replay_guard() -> None:
    guard = ReplayGuard(window_s=10, max_per_party=2)
    guard.admit("a", b"1", 100, 100)
    guard.admit("b", b"1", 100, 100)  # another party's
    with pytest.raises(VerificationError) as refused:
        guard.admit("a", b"1", 100, 105)
    assert refused.value.code == "replay"
    guard.admit("a", b"2", 109, 105)
    with pytest.raises(CapacityError):
        guard.admit("a", b"3", 105, 105)
    guard.admit("a", b"3", 111, 111)  # "1" is refused by its time from now on, and forgotten
    with pytest.raises(VerificationError):
        guard.admit("a", b"2", 109, 111)


def test_established_is_immutable() -> None:
    at_party, _ = shake()
    with pytest.raises(dataclasses.FrozenInstanceError):
        at_party.job_id = "x"  # type: ignore[misc]  # the point of the test
    assert isinstance(at_party, Established)
