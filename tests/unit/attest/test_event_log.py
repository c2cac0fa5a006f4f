"""Event logs: the genuine one replays to its quote, and nothing else does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.attest.backends import dcap_quote
from cloister.attest.backends.dcap import TDX_REGISTERS
from cloister.attest.backends.event_log import (
    RUNTIME_EVENT,
    Event,
    check,
    parse,
    replay,
    runtime_digest,
)
from cloister.attest.evidence import MAX_EVENT_LOG_BYTES
from cloister.errors import VerificationError
from tests.evidence import needs_evidence, sample


def entry(**changes: Any) -> dict[str, Any]:
    """A runtime event."""
    given = {"imr": 3, "event_type": RUNTIME_EVENT, "event": "app", "event_payload": "31"} | changes
    name, payload = str(given["event"]), str(given["event_payload"])
    good = {"digest": runtime_digest(name, bytes.fromhex(payload)).hex()} if changes.keys() <= {"event", "imr"} else {}
    return {"digest": runtime_digest("app", b"1").hex()} | good | given


def refused(log: Any) -> VerificationError:
    with pytest.raises(VerificationError) as error:
        parse(log if isinstance(log, bytes) else json.dumps(log).encode())
    assert error.value.code == "event-log"
    return error.value


def genuine() -> tuple[bytes, list[bytes]]:
    """dstack's log and the RTMRs of the quote that came with it."""
    table = json.loads(sample("tdx/tdx_quote_with_eventlog.json"))
    body = dcap_quote.parse(bytes.fromhex(table["quote"])).body
    return table["event_log"].encode(), [body[TDX_REGISTERS[f"rtmr{i}"]] for i in range(4)]


@needs_evidence
def test_the_genuine_log_gives_the_quoted_registers() -> None:
    log, rtmrs = genuine()
    events = check(log, rtmrs)
    assert len(events) == 28
    assert list(replay(events)) == rtmrs
    named = {event.name: event.payload.hex() for event in events if event.type == RUNTIME_EVENT}
    assert named["compose-hash"] == "3763bc34552cf3a27ff71ad5f7a90471562a1a2df552dfc1998cba2d60da27e7"


@needs_evidence
def test_a_genuine_log_with_one_event_less_more_changed_or_moved() -> None:
    log, rtmrs = genuine()
    events: list[dict[str, Any]] = json.loads(log)
    for at, event in enumerate(events):
        changed = event | {"digest": f"{int(event['digest'][0], 16) ^ 1:x}{event['digest'][1:]}"}
        moved = event | {"imr": (event["imr"] + 1) % 4}
        for forged in (
            events[:at] + events[at + 1 :],
            [*events[: at + 1], *events[at:]],
            [*events[:at], changed, *events[at + 1 :]],
            [*events[:at], moved, *events[at + 1 :]],
        ):
            with pytest.raises(VerificationError) as error:
                check(json.dumps(forged).encode(), rtmrs)
            assert error.value.code == "event-log"
    last_two = [i for i, event in enumerate(events) if event["imr"] == 3][-2:]
    events[last_two[0]], events[last_two[1]] = events[last_two[1]], events[last_two[0]]
    with pytest.raises(VerificationError, match=r"does not give rtmr3 of the quote"):
        check(json.dumps(events).encode(), rtmrs)


@needs_evidence
def test_a_genuine_log_of_another_boot() -> None:
    log, rtmrs = genuine()
    with pytest.raises(VerificationError, match="does not give rtmr0, rtmr1, rtmr2, rtmr3"):
        check(log, [bytes(48)] * 4)
    with pytest.raises(VerificationError, match="does not give rtmr1 of"):
        check(log, [rtmrs[0], bytes(48), *rtmrs[2:]])


def test_replay_by_hand() -> None:
    assert replay([]) == (bytes(48),) * 4
    digest = hashlib.sha384(b"x").digest()
    events = [Event(register=i, type=1, digest=digest, name="", payload=b"") for i in (2, 0, 2)]
    once = hashlib.sha384(bytes(48) + digest).digest()
    assert replay(events) == (once, bytes(48), hashlib.sha384(once + digest).digest(), bytes(48))


def test_a_runtime_event_is_what_its_digest_says() -> None:
    assert runtime_digest("app", b"1") == hashlib.sha384(b"\x01\x00\x00\x08:app:1").digest()
    (event,) = parse(json.dumps([entry()]).encode())
    assert (event.register, event.name, event.payload) == (3, "app", b"1")
    assert "not what its digest" in refused([entry(event_payload="32")]).message
    assert "not what its digest" in refused([entry(), entry(digest=bytes(48).hex())]).message
    # The digest of a firmware event is of something else: name and payload are only hints.
    assert parse(json.dumps([entry(event_type=4, event_payload="32")]).encode())[0].payload == b"2"


@pytest.mark.parametrize(
    "log",
    [
        b"",
        b"\xff",
        b"{}",
        b"null",
        b"[",
        b"[1]",
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b"[" + b"9" * 10_000 + b"]",
        b"[NaN]",
        [[]],
        [{}],
        [entry() | {"more": 1}],
        [{k: v for k, v in entry().items() if k != "event"}],
        *([entry(imr=imr)] for imr in (-1, 4, "3", 3.0, True, None, 2**70)),
        *([entry(event_type=kind)] for kind in (-1, 2**32, "4", 4.0, False, None)),
        *([entry(event_type=4, event=name)] for name in (None, 7, ["app"], "\ud800")),
        *([entry(event_type=4, event_payload=payload)] for payload in ("3", "zz", None, 31, "\u0663\u0661")),
        *([entry(event_type=4, digest=digest)] for digest in ("", "00" * 47, "00" * 49, "zz" * 48, None, 0)),
        b"[]" + b" " * (MAX_EVENT_LOG_BYTES - 1),
        json.dumps([entry()]).replace('"imr"', '"imr": 0, "imr"').encode(),
        json.dumps([entry()]).encode() + b"x",
    ],
    ids=lambda log: f"{log!r}"[:60],
)
def test_malformed(log: Any) -> None:
    assert len(refused(log).message) < 400


def test_a_name_from_outside_cannot_write_to_the_terminal() -> None:
    assert refused([entry(event="\x1b[31m", digest=bytes(48).hex())]).message.isprintable()


def outcome(log: bytes, rtmrs: Sequence[bytes]) -> tuple[Event, ...] | str:
    """The events, or the code of the refusal."""
    try:
        return check(log, rtmrs)
    except VerificationError as error:
        return error.code


@given(st.binary(max_size=400))
def test_any_bytes(data: bytes) -> None:
    assert outcome(data, [bytes(48)] * 4) in ((), "event-log")


@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=4))
def test_any_change_is_refused_or_means_the_same(at: int, junk: bytes) -> None:
    """A changed byte of JSON is malformed, changes a register, or changes nothing that anybody may rely on."""
    log = json.dumps([entry(), entry(event="b"), entry(event_type=4)]).encode()
    events = parse(log)
    at %= len(log)
    found = outcome(log[:at] + junk + log[at + len(junk) :], replay(events))
    if isinstance(found, str):
        assert found == "event-log"
    else:
        assert [event.digest for event in found] == [event.digest for event in events]
        assert {event for event in found if event.type == RUNTIME_EVENT} <= set(events)
