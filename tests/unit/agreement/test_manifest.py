"""The manifest's encoding: canonical, and refused in any other form. What parties check is in tests/attacks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cbor2
import pytest

from cloister.agreement import Manifest
from cloister.crypto.encoding import encode
from cloister.errors import ProtocolError

MANIFEST = Manifest(
    job_id="ab" * 32,
    policy_sha256="cd" * 32,
    attester="simulated",
    registers={"source": "00" * 32},
    bundles={"north": {"train": b"1" * 32, "test": b"2" * 32}, "south": {"train": b"3" * 32, "test": b"4" * 32}},
)


def test_round_trip() -> None:
    assert Manifest.from_bytes(MANIFEST.to_bytes()) == MANIFEST


def test_the_order_of_parties_and_kinds_does_not_matter() -> None:
    turned = {party: dict(reversed(kinds.items())) for party, kinds in reversed(MANIFEST.bundles.items())}
    assert replace(MANIFEST, bundles=turned).sha256 == MANIFEST.sha256


@pytest.mark.parametrize(
    "change",
    [
        {"job_id": "00" * 32},
        {"policy_sha256": "00" * 32},
        {"attester": "tdx"},
        {"registers": {"source": "11" * 32}},
        {"registers": {"source": "00" * 32, "more": "00" * 32}},
        {"bundles": {**MANIFEST.bundles, "south": {"train": b"3" * 32, "test": b"5" * 32}}},
        {"bundles": {"north": MANIFEST.bundles["south"], "south": MANIFEST.bundles["north"]}},
        {"bundles": {"north": MANIFEST.bundles["north"]}},
    ],
)
def test_every_field_is_in_the_hash(change: dict[str, Any]) -> None:
    assert replace(MANIFEST, **change).sha256 != MANIFEST.sha256


def test_every_altered_byte_gives_another_manifest_or_none() -> None:
    data = MANIFEST.to_bytes()
    for at in range(len(data)):
        altered = data[:at] + bytes([data[at] ^ 0x01]) + data[at + 1 :]
        try:
            assert Manifest.from_bytes(altered).sha256 != MANIFEST.sha256
        except ProtocolError:
            continue


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", 2),
        ("version", True),
        ("job_id", 7),
        ("registers", {"source": 7}),
        ("registers", []),
        ("bundles", []),
        ("bundles", {"north": {}}),
        ("bundles", {"north": []}),
        ("bundles", {"north": {"train": b"short"}}),
        ("bundles", {"north": {"train": "1" * 32}}),
        ("more", 1),
    ],
)
def test_wrong_values(name: str, value: Any) -> None:
    content = cbor2.loads(MANIFEST.to_bytes())
    with pytest.raises(ProtocolError):
        Manifest.from_bytes(encode({**content, name: value}))


def test_missing_fields_and_surplus_bytes() -> None:
    content = cbor2.loads(MANIFEST.to_bytes())
    for name in content:
        with pytest.raises(ProtocolError):
            Manifest.from_bytes(encode({k: v for k, v in content.items() if k != name}))
    for data in (b"", MANIFEST.to_bytes() + b"\x00", MANIFEST.to_bytes()[:-1]):
        with pytest.raises(ProtocolError):
            Manifest.from_bytes(data)
