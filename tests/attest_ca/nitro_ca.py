"""A test CA in AWS's place, with a Nitro security module that signs documents in the NSM's own form.

The document's CBOR is written here by hand, as the NSM does it, not with what production reads. Never in the package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import cbor2

from cloister.attest.evidence import Evidence
from cloister.attest.roots import TrustRoots, vendor_roots
from tests.attest_ca.ec_ca import Certified, certify

NOW = 1_790_000_000
"""When everything here is valid unless a test says otherwise (September 2026), seconds since 1970."""

REPORT_DATA = bytes(range(64))
PCRS = {0: b"\xa0" * 48, 1: b"\xa1" * 48, 2: b"\xa2" * 48, 3: bytes(48), 8: b"\xa8" * 48}
HOUR = 3600


class NitroCa:
    """AWS, with one region, one zone, one machine and one enclave."""

    def __init__(self, *, now: float = NOW) -> None:
        self.now = now
        self.root = certify("aws.nitro-enclaves", None, now=now, seconds=(-(10**8), 10**8))
        self.region = certify("test.region", self.root, now=now, seconds=(-(10**6), 10**6), path_length=2)
        self.zone = certify("test.zone", self.region, now=now, seconds=(-(10**5), 10**5), path_length=1)
        self.machine = certify("test.machine", self.zone, now=now, seconds=(-8 * HOUR, 8 * HOUR), path_length=0)
        self.enclave = self.issue()

    @property
    def roots(self) -> TrustRoots:
        """The vendors' roots with this one in AWS's place."""
        return dataclasses.replace(vendor_roots(), aws=self.root.certificate)

    def issue(self, **options: Any) -> Certified:
        """A leaf, as `certify` makes it."""
        given: dict[str, Any] = {"now": self.now, "ca": False, "seconds": (-HOUR, 2 * HOUR)} | options
        return certify("test.enclave", self.machine, **given)

    def payload(self, **changes: Any) -> dict[str, Any]:
        """A document's fields in the NSM's order; a change to ... leaves the field out."""
        fields = {
            "module_id": "i-test-enc1",
            "digest": "SHA384",
            "timestamp": int(self.now * 1000) + 250,
            "pcrs": dict(PCRS),
            "certificate": self.enclave.der,
            "cabundle": [c.der for c in (self.root, self.region, self.zone, self.machine)],
            "public_key": None,
            "user_data": REPORT_DATA,
            "nonce": None,
        }
        return {name: value for name, value in {**fields, **changes}.items() if value is not ...}

    def sign(self, payload: bytes, signer: Certified | None = None) -> bytes:
        """COSE_Sign1 as the NSM writes it."""
        protected = cbor2.dumps({1: -35})
        signature = (signer or self.enclave).sign(cbor2.dumps(["Signature1", protected, b"", payload]))
        return cbor2.dumps([protected, {}, payload, signature])

    def evidence(self, signer: Certified | None = None, **changes: Any) -> Evidence:
        return Evidence(type="nitro", blob=self.sign(indefinite(self.payload(**changes)), signer))

    def with_leaf(self, leaf: Certified, bundle: Sequence[Certified] | None = None) -> Evidence:
        """Evidence signed by another leaf, or with another bundle (root first)."""
        changes: dict[str, Any] = {"certificate": leaf.der}
        if bundle is not None:
            changes["cabundle"] = [c.der for c in bundle]
        return self.evidence(signer=leaf, **changes)


def indefinite(fields: Mapping[str, Any]) -> bytes:
    """CBOR of a map of indefinite length."""
    return b"\xbf" + b"".join(cbor2.dumps(k) + cbor2.dumps(v) for k, v in fields.items()) + b"\xff"
