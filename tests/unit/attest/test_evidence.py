"""The evidence envelope: canonical, bounded, and nothing but VerificationError for what is malformed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.attest.evidence import MAX_BLOB_BYTES, MAX_EVIDENCE_BYTES, Evidence
from cloister.crypto.encoding import encode
from cloister.errors import VerificationError

FULL = Evidence(
    type="tdx",
    blob=b"quote",
    collateral=b"collateral",
    event_log=b"log",
    devices=(Evidence(type="nvidia-gpu", blob=b"report"),),
)


def test_round_trip() -> None:
    assert Evidence.from_bytes(FULL.to_bytes()) == FULL


def test_every_cut_and_altered_byte() -> None:
    """A change is refused or gives other evidence with other bytes: there is one encoding for each."""
    data = FULL.to_bytes()
    for length in range(len(data)):
        with pytest.raises(VerificationError) as refused:
            Evidence.from_bytes(data[:length])
        assert refused.value.code == "evidence-format"
    for at in range(len(data)):
        altered = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        try:
            other = Evidence.from_bytes(altered)
        except VerificationError:
            continue
        assert other != FULL
        assert other.to_bytes() == altered


@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    with pytest.raises(VerificationError):
        Evidence.from_bytes(data)


def fields(**changes: object) -> bytes:
    base: dict[str, object] = {
        "version": 1, "type": "tdx", "blob": b"q", "collateral": b"", "event_log": b"", "devices": []
    }  # fmt: skip
    return encode(base | changes)  # type: ignore[arg-type]  # any value that encodes


@pytest.mark.parametrize(
    "data",
    [
        fields() + b"\x00",
        fields(version=2),
        fields(extra=1),
        fields(type="TDX"),
        fields(type=""),
        fields(type="a/b"),
        fields(blob="text"),
        fields(blob=bytes(MAX_BLOB_BYTES + 1)),
        fields(devices=[1]),
        fields(devices=[{}]),
        fields(devices=[{"version": 1, "type": "x", "blob": b"", "collateral": b"", "event_log": b"", "devices": [0]}]),
        fields(devices=[0] * 17),
        bytes(MAX_EVIDENCE_BYTES + 1),
        encode([1]),
    ],
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(VerificationError, match="malformed"):
        Evidence.from_bytes(data)


def test_well_formed_base() -> None:
    """The base of the cases above is good, so each of them fails for its own reason."""
    assert Evidence.from_bytes(fields()).blob == b"q"


def test_own_mistakes() -> None:
    with pytest.raises(ValueError, match="short lower-case word"):
        Evidence(type="Not a word", blob=b"")
    with pytest.raises(ValueError, match="blob is longer"):
        Evidence(type="x", blob=bytes(MAX_BLOB_BYTES + 1))
    with pytest.raises(ValueError, match="devices of devices"):
        Evidence(type="x", blob=b"", devices=(FULL,))
    too_long = Evidence(type="x", blob=bytes(1 << 18), collateral=bytes(1 << 19), event_log=bytes(1 << 19))
    with pytest.raises(ValueError, match="allowed"):
        too_long.to_bytes()
