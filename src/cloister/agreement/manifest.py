"""The manifest: which bundles a job is trained on, by which measured program, under which policy.

Every party signs it before any data key is released, and a new instance gets keys only for the same one: nobody can
run the job again with other bundles and learn from the difference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from cloister.attest.claims import Claims
from cloister.crypto.encoding import Fields, encode
from cloister.errors import ProtocolError, VerificationError

_MAX_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Immutable; `to_bytes` is canonical, so that equal manifests have equal hashes."""

    job_id: str
    policy_sha256: str
    attester: str
    """Type of the enclave's evidence."""
    registers: Mapping[str, str]
    """The enclave's measurements, hex."""
    bundles: Mapping[str, Mapping[str, bytes]]
    """Commitments (32 bytes) by party and kind."""

    def to_bytes(self) -> bytes:
        return encode(
            {
                "version": 1,
                "job_id": self.job_id,
                "policy_sha256": self.policy_sha256,
                "attester": self.attester,
                "registers": dict(self.registers),
                "bundles": {party: dict(kinds) for party, kinds in self.bundles.items()},
            }
        )

    @property
    def sha256(self) -> bytes:
        return hashlib.sha256(self.to_bytes()).digest()

    @classmethod
    def from_bytes(cls, unverified: bytes) -> Manifest:
        """Parse what an enclave or a receipt says is the manifest.

        Raises:
            ProtocolError: it is malformed.
        """
        fields = Fields.decode(unverified, max_bytes=_MAX_BYTES, what="manifest")
        fields.integer("version", low=1, high=1)
        manifest = cls(
            job_id=fields.text("job_id"),
            policy_sha256=fields.text("policy_sha256"),
            attester=fields.text("attester"),
            registers=fields.table("registers"),
            bundles={party: _commitments(kinds) for party, kinds in fields.table("bundles").items()},
        )
        fields.end()
        if not all(isinstance(value, str) for value in manifest.registers.values()):
            raise ProtocolError("manifest: a register is not text")
        return manifest

    def check(
        self, *, job_id: str, claims: Claims, party: str, own: Mapping[str, bytes], parties: Mapping[str, bytes]
    ) -> None:
        """What a party checks before it signs.

        Args:
            claims: of this enclave, verified by this party.
            own: the commitments of the party's own bundles by kind.
            parties: public keys of the job's parties by name.

        Raises:
            VerificationError: the manifest is of another job, program or policy, or lists other bundles.
        """
        if self.job_id != job_id:
            raise VerificationError("manifest-job", "the manifest is of another job", where="manifest")
        if (self.attester, dict(self.registers)) != (claims.type, dict(claims.registers)):
            raise VerificationError("manifest-measurement", "the manifest names another measurement", where="manifest")
        if self.policy_sha256 != claims.policy_sha256:
            raise VerificationError("manifest-policy", "the manifest names another policy", where="manifest")
        if set(self.bundles) != set(parties):
            raise VerificationError("manifest-parties", "the manifest lists other parties", where="manifest")
        if dict(self.bundles[party]) != dict(own):
            raise VerificationError(
                "manifest-bundles", "the manifest lists other bundles than this party sent", where="manifest"
            )


def _commitments(kinds: object) -> dict[str, bytes]:
    if not isinstance(kinds, dict) or not kinds:
        raise ProtocolError("manifest: a party has no bundles")
    for value in kinds.values():
        if not isinstance(value, bytes) or len(value) != 32:
            raise ProtocolError("manifest: a commitment is not 32 bytes")
    return dict(kinds)
