"""Bytes to and from a TPM, and the ways to one; what a TPM makes of them is in tests/tpm."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import CloisterError, ProtocolError, TransportError, UsageError
from cloister.tpm import templates
from cloister.tpm.commands import Tpm, extended, pcr_policy
from cloister.tpm.device import FileDevice, SocketDevice, is_software, open_device
from cloister.tpm.wire import (
    RC_HANDLE,
    RC_INITIALIZE,
    RC_POLICY_FAIL,
    RH_ENDORSEMENT,
    RH_OWNER,
    Command,
    TpmError,
    build,
    parse,
    pcr_selection,
)

STARTED = bytes.fromhex("8001 0000000a 00000000")
STARTUP_CLEAR = bytes.fromhex("8001 0000000c 00000144 0000")


def test_commands_without_and_with_authorisation() -> None:
    assert build(Command.STARTUP, (), (), b"\0\0") == STARTUP_CLEAR
    # Part 1, section 18: header, handles, size of the authorisations, the password session, parameters.
    expected = bytes.fromhex("8002 00000020 00000182 0000000e 00000009 40000009 0000 01 0000 0102030405")
    assert build(Command.PCR_EXTEND, (14,), (0x40000009,), bytes([1, 2, 3, 4, 5])) == expected


def test_pcr_selection() -> None:
    assert pcr_selection([0, 9, 23]) == bytes.fromhex("00000001 000b 03 010280")
    with pytest.raises(ValueError, match="0 to 23"):
        pcr_selection([24])


def test_responses() -> None:
    handle, rest = parse(bytes.fromhex("8001 00000010 00000000 80000001 abcd"), Command.LOAD, has_handle=True)
    assert (handle, rest.rest()) == (0x80000001, b"\xab\xcd")
    with_session = bytes.fromhex("8002 00000017 00000000 00000004 0002abcd 0000 01 0000")
    _, rest = parse(with_session, Command.UNSEAL)
    assert rest.sized() == b"\xab\xcd"
    rest.end()


@pytest.mark.parametrize(
    ("response_code", "reason"), [(0x100, RC_INITIALIZE), (0x99D, RC_POLICY_FAIL), (0x18B, RC_HANDLE), (0x2DF, 0x9F)]
)
def test_refusals_say_what_without_where(response_code: int, reason: int) -> None:
    data = bytes.fromhex("8001 0000000a") + response_code.to_bytes(4, "big")
    with pytest.raises(TpmError, match="UNSEAL") as refused:
        parse(data, Command.UNSEAL)
    assert (refused.value.reason, refused.value.command, refused.value.exit_code) == (reason, Command.UNSEAL, 1)


def test_a_password_is_hinted_at() -> None:
    with pytest.raises(TpmError) as refused:
        parse(bytes.fromhex("8001 0000000a 000009a2"), Command.CREATE_PRIMARY)
    assert "password" in refused.value.hint


@pytest.mark.parametrize(
    "data",
    [
        b"",
        STARTED[:-1],
        STARTED + b"\0",
        b"\x80\x03" + STARTED[2:],
        bytes.fromhex("8002 0000000e 00000000 00000001"),
        bytes.fromhex("8001 0000000c 00000000 ffff"),
        bytes.fromhex("8001 0000000c 00000000 0001"),
        bytes.fromhex("8001 0000000e 00000000 0001aabb"),
    ],
)
def test_malformed_responses_are_refused(data: bytes) -> None:
    def read() -> None:
        _, response = parse(data, Command.UNSEAL)
        response.sized()
        response.end()

    with pytest.raises(ProtocolError):
        read()


@pytest.mark.parametrize("data", [STARTED + b"\0", STARTED[:5] + b"\x0b" + STARTED[6:], b"\x80\x03" + STARTED[2:]])
def test_a_wrong_header_is_refused_before_anything_is_read(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="tag or length"):
        parse(data, Command.QUOTE)


def test_policies_and_pcrs() -> None:
    """Against values that swtpm gave: tests/tpm proves the same with a TPM."""
    zero = pcr_policy({14: bytes(32)})
    assert zero == pcr_policy({14: bytes(32)}) != pcr_policy({13: bytes(32)})
    assert zero != pcr_policy({14: b"\1" + bytes(31)})
    assert pcr_policy({1: b"a" * 32, 0: b"b" * 32}) == pcr_policy({0: b"b" * 32, 1: b"a" * 32})
    assert extended(bytes(32), bytes(32)).hex() == "f5a5fd42d16a20302798ef6ed309979b43003d2320d9f0e8ea9831a92759fb4b"


# A scripted TPM -------------------------------------------------------------------------------------------------------


class Script:
    """Answers whatever it is asked with prepared bytes."""

    address = "script"

    def __init__(self, *responses: bytes) -> None:
        self.responses = list(responses)
        self.sent: list[bytes] = []

    def transmit(self, command: bytes) -> bytes:
        self.sent.append(command)
        return self.responses.pop(0)

    def close(self) -> None:
        self.responses.clear()


def respond(parameters: bytes, *, session: bool = False) -> bytes:
    body = len(parameters).to_bytes(4, "big") + parameters + b"\0\0\1\0\0" if session else parameters
    return (b"\x80\x02" if session else b"\x80\x01") + (10 + len(body)).to_bytes(4, "big") + bytes(4) + body


def test_startup_refused_for_another_reason() -> None:
    with pytest.raises(TpmError, match="0x101"):
        Tpm(Script(bytes.fromhex("8001 0000000a 00000101"))).startup()


def pcr_response(selection: bytes, *values: bytes) -> bytes:
    listed = b"".join(b"\0" + bytes([len(v)]) + v for v in values)
    return respond(bytes(4) + selection + len(values).to_bytes(4, "big") + listed)


def test_a_tpm_without_the_bank_or_with_short_values() -> None:
    selected = pcr_selection([3])
    assert Tpm(Script(pcr_response(selected, b"v" * 32))).pcr_read([3]) == {3: b"v" * 32}
    for response in (
        pcr_response(pcr_selection([])),
        pcr_response(selected),
        pcr_response(selected, b"v" * 31),
        pcr_response(pcr_selection([4]), b"v" * 32),
    ):
        with pytest.raises(ProtocolError):
            Tpm(Script(response)).pcr_read([3])


def test_endorsement_certificate_is_read_in_pieces() -> None:
    content = bytes(range(256)) * 3
    public = respond(b"\0\x10" + bytes(14) + len(content).to_bytes(2, "big") + b"\0\0")
    pieces = [respond(len(p).to_bytes(2, "big") + p, session=True) for p in (content[:512], content[512:])]
    script = Script(public, *pieces)
    assert Tpm(script).endorsement_certificate() == content
    assert [command[-4:].hex() for command in script.sent[1:]] == ["02000000", "01000200"]
    assert Tpm(Script(bytes.fromhex("8001 0000000a 0000018b"))).endorsement_certificate() is None
    with pytest.raises(TpmError):
        Tpm(Script(bytes.fromhex("8001 0000000a 00000101"))).endorsement_certificate()
    with pytest.raises(ProtocolError, match="65535"):
        Tpm(Script(respond(b"\0\x10" + bytes(14) + b"\xff\xff" + b"\0\0"))).endorsement_certificate()


def calls() -> list[Callable[[Tpm], object]]:
    return [
        lambda tpm: tpm.flush_stale(),
        lambda tpm: tpm.create_primary(RH_ENDORSEMENT, templates.ENDORSEMENT_KEY),
        lambda tpm: tpm.pcr_read(range(24)),
        lambda tpm: tpm.seal(b"x", {14: bytes(32)}),
        lambda tpm: tpm.unseal(b"", b"", [14]),
        lambda tpm: tpm.nv_increment(1),
        lambda tpm: tpm.endorsement_certificate(),
        lambda tpm: tpm.policy_secret(1, RH_OWNER),
    ]


@given(st.lists(st.binary(max_size=80), min_size=40, max_size=40), st.sampled_from(calls()), st.booleans())
def test_whatever_a_tpm_answers_ends_in_our_errors(
    parameters: list[bytes], call: Callable[[Tpm], object], session: bool
) -> None:
    with suppress(CloisterError):
        call(Tpm(Script(*(respond(p, session=session) for p in parameters))))


# Devices --------------------------------------------------------------------------------------------------------------


@contextmanager
def server(response: bytes) -> Iterator[str]:
    """A socket that answers one command."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(response)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"swtpm:127.0.0.1:{listener.getsockname()[1]}"
        finally:
            thread.join()


def test_socket_device() -> None:
    with server(STARTED) as address:
        device = open_device(address)
        assert isinstance(device, SocketDevice)
        assert device.transmit(STARTUP_CLEAR) == STARTED
        device.close()
        device.close()


@pytest.mark.parametrize(
    ("response", "error"),
    [
        (STARTED[:-1], TransportError),
        (b"", TransportError),
        (bytes.fromhex("8001 00000009 00000000"), ProtocolError),
        (bytes.fromhex("8001 ffffffff 00000000"), ProtocolError),
    ],
)
def test_socket_device_refuses_what_is_no_response(response: bytes, error: type[CloisterError]) -> None:
    with server(response) as address:
        device = open_device(address)
        with pytest.raises(error):
            device.transmit(STARTUP_CLEAR)
        device.close()


@pytest.mark.parametrize("address", ["swtpm:", "swtpm:host", "swtpm::1", "swtpm:host:port"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(UsageError, match="address"):
        open_device(address)


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="software TPM"):
        open_device(f"swtpm:{tmp_path}/none")
    with pytest.raises(UsageError, match="cannot open"):
        open_device(str(tmp_path / "none"))


def test_file_device(tmp_path: Path) -> None:
    """Like the kernel's: what is written is the command, what is read then the response."""
    path = tmp_path / "tpm"
    path.write_bytes(bytes(len(STARTUP_CLEAR)) + STARTED)
    device = open_device(str(path))
    assert isinstance(device, FileDevice)
    assert device.transmit(STARTUP_CLEAR) == STARTED
    assert path.read_bytes()[: len(STARTUP_CLEAR)] == STARTUP_CLEAR
    device.close()
    device.close()
    os.mkfifo(tmp_path / "fifo")
    broken = open_device(str(tmp_path / "fifo"))
    broken.close()
    with pytest.raises(TransportError, match="does not answer"):
        broken.transmit(STARTUP_CLEAR)


def test_which_addresses_are_software() -> None:
    assert is_software("swtpm:/socket")
    assert not is_software("/dev/tpmrm0")


def test_a_tpm_that_does_not_start_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(bytes.fromhex("8001 0000000a 00000101"), b"left")
    monkeypatch.setattr("cloister.tpm.commands.open_device", lambda address: script)
    with pytest.raises(TpmError):
        Tpm.open("/dev/tpmrm0")
    assert script.responses == []
    # On a device nothing is flushed: other sessions may be somebody's.
    script.responses = [STARTED]
    with Tpm.open("/dev/tpmrm0"):
        assert len(script.sent) == 2
