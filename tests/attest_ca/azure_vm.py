"""An Azure confidential virtual machine in software: its SNP chip is the test CA's, its paravisor and TPM are ours.

What it makes has Azure's formats, so it goes through the production verifier with `roots=vm.ca.roots`. It can also do
what the paravisor never does. Never in the package.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric import rsa

from cloister.attest.evidence import Evidence
from cloister.crypto.encoding import encode
from tests.attest_ca.snp_ca import Leaf, SnpCa
from tests.attest_ca.tpm_ca import RSA_AK, attest, sign

PCRS = {n: hashlib.sha256(bytes([n])).digest() for n in range(24)}
REPORT_DATA = bytes(range(64))


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def jwk(key: rsa.RSAPrivateKey, **changes: Any) -> dict[str, Any]:
    """The attestation key as the paravisor writes it."""
    modulus = key.public_key().public_numbers().n.to_bytes(key.key_size // 8, "big")
    return {"kid": "HCLAkPub", "key_ops": ["sign"], "kty": "RSA", "e": "AQAB", "n": b64(modulus)} | changes


class AzureVm:
    """One machine. Methods take what to make otherwise than it should be."""

    def __init__(self, ca: SnpCa | None = None, key: rsa.RSAPrivateKey = RSA_AK) -> None:
        self.ca, self.key = ca or SnpCa("Milan"), key

    def claims(self, keys: list[Any] | None = None) -> bytes:
        """Runtime claims."""
        encryption = {"kid": "HCLEkPub", "key_ops": ["encrypt"], "kty": "RSA", "e": "AQAB", "n": "AQAB"}
        machine = {"secure-boot": True, "console-enabled": False, "vmUniqueId": "test"}
        value = {"keys": [jwk(self.key), encryption] if keys is None else keys, "vm-configuration": machine}
        return json.dumps(value).encode()

    def snp(self, claims: bytes, leaf: Leaf | None = None, **body: Any) -> bytes:
        """The SNP report that vouches for the claims."""
        patches = {0x50: hashlib.sha256(claims).digest() + bytes(32)} | body.pop("patches", {})
        return (leaf or self.ca.vcek).sign(self.ca.body(patches=patches, **body))

    def hcl(
        self,
        claims: bytes,
        snp: bytes,
        *,
        header: Mapping[int, bytes] | None = None,
        kind: int = 2,
        hash_type: int = 1,
        version: int = 1,
        tail: bytes = bytes(10),
    ) -> bytes:
        """The paravisor's report. `header`: bytes by offset, put over the header."""
        head = bytearray(b"HCLA" + struct.pack("<IIII", 2, 32 + 1184 + 20 + len(claims), 2, 0)).ljust(32, b"\0")
        for at, value in (header or {}).items():
            head[at : at + len(value)] = value
        data = struct.pack("<IIIII", 20 + len(claims), version, kind, hash_type, len(claims))
        return bytes(head) + snp + data + claims + tail

    def document(self, *, hcl: bytes | None = None, leaf: Leaf | None = None, **quote: Any) -> dict[str, Any]:
        """The evidence before it becomes text. `quote`: changes of `tpm_ca.attest`."""
        if hcl is None:
            claims = self.claims()
            hcl = self.hcl(claims, self.snp(claims, leaf))
        message = attest(quote.pop("quoted", PCRS), **({"extra_data": REPORT_DATA} | quote))
        signature = sign(message, self.key)[6:]
        return {
            "version": 2,
            "tpm_quote": {
                "signature": signature.hex(),
                "message": message.hex(),
                "pcrs": [PCRS[n].hex() for n in sorted(PCRS)],
            },
            "hcl_report": b64(hcl),
            "vcek": b64((leaf or self.ca.vcek).der),
        }

    def evidence(self, *, crl: bytes = b"", **changes: Any) -> Evidence:
        """Evidence; `changes` are those of `document`."""
        return pack(self.document(**changes), crl=crl)


def pack(document: object, *, crl: bytes = b"") -> Evidence:
    """Evidence from a document."""
    collateral = encode({"crl": crl}) if crl else b""
    return Evidence(type="azure-vtpm", blob=json.dumps(document).encode(), collateral=collateral)
