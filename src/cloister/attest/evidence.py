"""The tagged envelope that carries evidence of any kind: bounded canonical CBOR, nothing behind it.

Evidence is what a machine says about itself; until `attest.verify.verify` has returned Claims for it, nothing in it
is known to be true. Never use its hash as an identity: several vendors' formats have bytes that are not signed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cloister.crypto.encoding import Fields, Value, encode
from cloister.errors import ProtocolError, VerificationError

VERSION = 1
MAX_EVIDENCE_BYTES = 1 << 20
MAX_BLOB_BYTES = 1 << 18
MAX_COLLATERAL_BYTES = 1 << 19
MAX_EVENT_LOG_BYTES = 1 << 19
MAX_DEVICES = 16
REPORT_DATA_BYTES = 64

_TYPE = re.compile(r"[a-z][a-z0-9-]{0,31}")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Unverified evidence of one attester. Raises ValueError for values out of bounds."""

    type: str
    """Which backend made it ("simulated", "tdx", ...): which verifier reads it."""
    blob: bytes
    """The quote or report, in its vendor's format."""
    collateral: bytes = b""
    """Certificates, CRLs and TCB information that the verifier needs, in the vendor's format."""
    event_log: bytes = b""
    """What was measured, to be replayed against the quoted registers."""
    devices: tuple[Evidence, ...] = ()
    """Evidence of accelerators bound to this one; they have no devices themselves."""

    def __post_init__(self) -> None:
        if not _TYPE.fullmatch(self.type):
            raise ValueError("the type of evidence must be a short lower-case word")
        for name, limit in (
            ("blob", MAX_BLOB_BYTES), ("collateral", MAX_COLLATERAL_BYTES), ("event_log", MAX_EVENT_LOG_BYTES)
        ):  # fmt: skip
            if len(getattr(self, name)) > limit:
                raise ValueError(f"{name} is longer than {limit} bytes")
        if len(self.devices) > MAX_DEVICES or any(d.devices for d in self.devices):
            raise ValueError(f"evidence has more than {MAX_DEVICES} devices, or devices of devices")

    def to_bytes(self) -> bytes:
        """Canonical CBOR. Raises: ValueError if it is longer than MAX_EVIDENCE_BYTES."""
        data = encode(self._to_map())
        if len(data) > MAX_EVIDENCE_BYTES:
            raise ValueError(f"the evidence has {len(data)} bytes, allowed are {MAX_EVIDENCE_BYTES}")
        return data

    def _to_map(self) -> dict[str, Value]:
        return {
            "version": VERSION,
            "type": self.type,
            "blob": self.blob,
            "collateral": self.collateral,
            "event_log": self.event_log,
            "devices": [d._to_map() for d in self.devices],
        }

    @classmethod
    def from_bytes(cls, data: bytes) -> Evidence:
        """Parse what a peer or a file gave us.

        Raises: VerificationError("evidence-format"), whatever is wrong with it.
        """
        try:
            return cls._from_fields(Fields.decode(data, max_bytes=MAX_EVIDENCE_BYTES, max_items=512, what="evidence"))
        except (ProtocolError, ValueError) as exc:
            raise VerificationError("evidence-format", f"the evidence is malformed: {exc}") from exc

    @classmethod
    def _from_fields(cls, fields: Fields, *, of_device: bool = False) -> Evidence:
        fields.integer("version", low=VERSION, high=VERSION)
        devices = fields.items("devices", max_items=0 if of_device else MAX_DEVICES)
        evidence = cls(
            type=fields.text("type"),
            blob=fields.blob("blob", max_size=MAX_BLOB_BYTES),
            collateral=fields.blob("collateral", max_size=MAX_COLLATERAL_BYTES),
            event_log=fields.blob("event_log", max_size=MAX_EVENT_LOG_BYTES),
            devices=tuple(cls._from_fields(Fields(d, "device evidence"), of_device=True) for d in devices),
        )
        fields.end()
        return evidence
