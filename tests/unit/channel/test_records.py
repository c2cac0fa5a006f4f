"""The record layer: round trips, and every kind of interference."""

import os

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.channel.records import CLOSE, END, MAX_RECORD_BYTES, MAX_RECORD_PLAINTEXT, MORE, Opener, Sealer
from cloister.errors import CapacityError, ProtocolError, TransportError, VerificationError

KEY = os.urandom(32)


def pair(**limits: int) -> tuple[Sealer, Opener]:
    return Sealer(KEY), Opener(KEY, **limits)


@pytest.mark.parametrize("size", [0, 1, MAX_RECORD_PLAINTEXT, MAX_RECORD_PLAINTEXT + 1, 3 * MAX_RECORD_PLAINTEXT + 5])
def test_round_trip(size: int) -> None:
    sealer, opener = pair()
    message = os.urandom(size)
    records = list(sealer.seal(message))
    assert len(records) == max(1, -(-size // MAX_RECORD_PLAINTEXT))
    opened = [opener.feed(r) for r in records]
    assert opened[-1] == message
    assert opened[:-1] == [None] * (len(records) - 1)


def test_the_format_is_the_documented_one() -> None:
    sealer, _ = pair()
    for counter, message in enumerate((b"first", b"second")):
        (record,) = sealer.seal(message)
        assert record[:1] == bytes([END])
        assert AESGCM(KEY).decrypt(counter.to_bytes(12, "big"), record[1:], bytes([END])) == message


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=100), max_size=10))
def test_many_messages(messages: list[bytes]) -> None:
    sealer, opener = pair()
    assert [opener.feed(r) for m in messages for r in sealer.seal(m)] == messages
    assert opener.feed(sealer.close()) is None
    assert opener.closed
    opener.end_of_stream()


def test_every_altered_byte_and_cut() -> None:
    (record,) = Sealer(KEY).seal(b"some text")
    for at in range(len(record)):
        altered = record[:at] + bytes([record[at] ^ 1]) + record[at + 1 :]
        with pytest.raises((VerificationError, ProtocolError)):
            Opener(KEY).feed(altered)
        with pytest.raises((VerificationError, ProtocolError)):
            Opener(KEY).feed(record[:at])
    with pytest.raises(VerificationError):
        Opener(KEY).feed(record + b"x")


@pytest.mark.parametrize("attack", ["replay", "reorder", "drop", "reflect", "kind"])
def test_interference(attack: str) -> None:
    sealer, opener = pair()
    first, second, third = (next(iter(sealer.seal(m))) for m in (b"1", b"2", b"3"))
    assert opener.feed(first) == b"1"
    wrong = {
        "replay": first,
        "reorder": third,
        "drop": third,
        "reflect": next(iter(Sealer(os.urandom(32)).seal(b"2"))),
        "kind": bytes([MORE]) + second[1:],
    }[attack]
    with pytest.raises(VerificationError) as refused:
        opener.feed(wrong)
    assert refused.value.code == "record"
    # After a failure the direction is closed for good: even the right record is refused.
    with pytest.raises(ProtocolError, match="closed"):
        opener.feed(second)
    with pytest.raises(TransportError):
        opener.end_of_stream()


def test_truncation_is_seen() -> None:
    sealer, opener = pair()
    opener.feed(next(iter(sealer.seal(b"1"))))
    with pytest.raises(TransportError, match="cut"):
        opener.end_of_stream()


def test_nothing_after_close() -> None:
    sealer, opener = pair()
    close = sealer.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(iter(sealer.seal(b"x")))
    opener.feed(close)
    with pytest.raises(ProtocolError, match="after"):
        opener.feed(close)


def raw(kind: int, plain: bytes, counter: int = 0) -> bytes:
    return bytes([kind]) + AESGCM(KEY).encrypt(counter.to_bytes(12, "big"), plain, bytes([kind]))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([raw(CLOSE, b"x")], "inside a message"),
        ([raw(MORE, bytes(MAX_RECORD_PLAINTEXT)), raw(CLOSE, b"", 1)], "inside a message"),
        ([raw(MORE, b"short")], "must be full"),
        ([raw(0x20, b"x")], "malformed"),
        ([bytes(MAX_RECORD_BYTES + 1)], "malformed"),
        ([b""], "malformed"),
    ],
)
def test_a_peer_that_holds_the_key_and_misbehaves(records: list[bytes], message: str) -> None:
    opener = Opener(KEY)
    for record in records[:-1]:
        opener.feed(record)
    with pytest.raises(ProtocolError, match=message):
        opener.feed(records[-1])


def test_a_message_beyond_the_limit() -> None:
    sealer, opener = pair(max_message_bytes=MAX_RECORD_PLAINTEXT + 10)
    first, second = sealer.seal(bytes(MAX_RECORD_PLAINTEXT + 11))
    opener.feed(first)
    with pytest.raises(ProtocolError, match="longer than"):
        opener.feed(second)


def test_nonces_run_out() -> None:
    sealer = Sealer(KEY, max_records=2)
    for _ in range(2):
        next(iter(sealer.seal(b"x")))
    with pytest.raises(CapacityError, match="nonces"):
        next(iter(sealer.seal(b"x")))
    assert sealer.closed


def test_no_plaintext_is_left_after_a_failed_tag() -> None:
    (record,) = Sealer(KEY).seal(b"secret" * 100)
    opener = Opener(KEY)
    with pytest.raises(VerificationError):
        opener.feed(record[:-1] + bytes([record[-1] ^ 1]))
    assert bytes(opener._buffer) == bytes(600)
