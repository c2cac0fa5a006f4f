"""Collecting Nitro documents, with a security module made of paper."""

from __future__ import annotations

import ctypes
import fcntl
import struct
from pathlib import Path
from typing import Any

import cbor2
import pytest

from cloister.attest.backends.nsm import NSM_IOCTL_RAW, NitroAttester, exchange_with_device
from cloister.attest.evidence import Evidence
from cloister.attest.policy import AppraisalPolicy
from cloister.attest.verify import verify
from cloister.errors import RunError
from tests.attest_ca.nitro_ca import NOW, REPORT_DATA, NitroCa

ANY = AppraisalPolicy(accept=("nitro",), any_measurement=True)


@pytest.fixture(scope="module")
def ca() -> NitroCa:
    return NitroCa()


class Module:
    """Signs what it is asked to, as the NSM does."""

    def __init__(self, ca: NitroCa, **changes: Any) -> None:
        self._ca, self._changes = ca, changes

    def __call__(self, device: Path, request: bytes) -> bytes:
        assert device == Path("/dev/nsm")
        asked = cbor2.loads(request)["Attestation"]
        assert set(asked) == {"user_data", "nonce", "public_key"}
        evidence = self._ca.evidence(**{**asked, **self._changes})
        return cbor2.dumps({"Attestation": {"document": evidence.blob}})


def test_collected_documents_verify(ca: NitroCa) -> None:
    evidence = NitroAttester(exchange=Module(ca)).collect(REPORT_DATA)
    assert verify(evidence, ANY, REPORT_DATA, NOW, roots=ca.roots).report_data == REPORT_DATA.hex()
    assert evidence == Evidence(type=NitroAttester.type, blob=evidence.blob)


def test_found(tmp_path: Path) -> None:
    assert NitroAttester.found(tmp_path) is None
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nsm").touch()
    assert NitroAttester.found(tmp_path) == str(tmp_path / "dev/nsm")


def test_report_data_has_64_bytes() -> None:
    with pytest.raises(ValueError, match="64"):
        NitroAttester().collect(b"short")


def test_a_document_for_somebody_else_is_noticed(ca: NitroCa) -> None:
    with pytest.raises(RunError, match="not for our"):
        NitroAttester(exchange=Module(ca, user_data=b"x" * 64)).collect(REPORT_DATA)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "malformed"),
        (cbor2.dumps({"Error": "InvalidArgument"}), "InvalidArgument"),
        (cbor2.dumps({"Error": "x" * 65}), "unknown"),
        (cbor2.dumps({"Error": 1}), "unknown"),
        (cbor2.dumps(["Error"]), "unknown"),
        (cbor2.dumps({"Attestation": 1}), "no document"),
        (cbor2.dumps({"Attestation": {"document": "text"}}), "no document"),
        (cbor2.dumps({"Attestation": {"document": b"no COSE"}}), "COSE_Sign1"),
    ],
)
def test_unusable_answers(answer: bytes, message: str) -> None:
    with pytest.raises(RunError, match=message):
        NitroAttester(exchange=lambda device, request: answer).collect(REPORT_DATA)


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="No such file") as caught:
        NitroAttester(tmp_path).collect(REPORT_DATA)
    assert caught.value.where == str(tmp_path / "dev/nsm")


def test_the_device_gets_two_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel does with struct nsm_raw: address and length of request and response, 8 bytes each."""

    def ioctl(descriptor: int, number: int, raw: ctypes.Structure) -> int:
        assert number == NSM_IOCTL_RAW == 0xC0200A00
        request, size, response, capacity = struct.unpack("=QQQQ", bytes(raw))
        assert (ctypes.string_at(request, size), capacity) == (b"question", 0x3000)
        ctypes.memmove(response, b"the answer", 10)
        ctypes.memmove(ctypes.addressof(raw) + 24, struct.pack("=Q", 10), 8)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    (tmp_path / "nsm").touch()
    assert exchange_with_device(tmp_path / "nsm", b"question") == b"the answer"
    with pytest.raises(ValueError, match="4096"):
        exchange_with_device(tmp_path / "nsm", bytes(4097))


def test_an_ordinary_file_is_no_device(tmp_path: Path) -> None:
    (tmp_path / "nsm").touch()
    with pytest.raises(OSError, match="ioctl"):
        exchange_with_device(tmp_path / "nsm", b"question")
