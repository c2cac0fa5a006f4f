"""A party's approval of a job as a file: made with `cloister sign` where the key lies, used by `cloister join`.

JSON: {"version": 1, "job_id", "party", "public_key", "signature"}, bytes as hex. The signature is over the job id,
which is the hash of everything that the parties agree to.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from cloister.agreement.signing import APPROVAL_LABEL, approval_message
from cloister.crypto.keys import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, PartyKey, verify_signature
from cloister.errors import UsageError, VerificationError

VERSION = 1
_MAX_BYTES = 4096
_KEYS = {"version", "job_id", "party", "public_key", "signature"}


@dataclass(frozen=True, kw_only=True)
class Approval:
    """A signed approval. Nothing about it is known until `check` has returned."""

    job_id: str
    party: str
    public_key: bytes
    signature: bytes

    @classmethod
    def sign(cls, job_id: str, party: str, key: PartyKey) -> Approval:
        signature = key.sign(APPROVAL_LABEL, approval_message(job_id))
        return cls(job_id=job_id, party=party, public_key=key.public, signature=signature)

    def to_bytes(self) -> bytes:
        content = {
            "version": VERSION,
            "job_id": self.job_id,
            "party": self.party,
            "public_key": self.public_key.hex(),
            "signature": self.signature.hex(),
        }
        return (json.dumps(content, indent=1) + "\n").encode()

    @classmethod
    def load(cls, path: Path) -> Approval:
        """Read an approval file. Raises: UsageError if it cannot be read or is none."""
        try:
            with path.open("rb") as file:
                content = json.loads(file.read(_MAX_BYTES))
            if set(content) != _KEYS or content["version"] != VERSION:
                raise ValueError("missing or unknown fields")
            approval = cls(
                job_id=str(content["job_id"]),
                party=str(content["party"]),
                public_key=bytes.fromhex(content["public_key"]),
                signature=bytes.fromhex(content["signature"]),
            )
            if (len(approval.public_key), len(approval.signature)) != (PUBLIC_KEY_BYTES, SIGNATURE_BYTES):
                raise ValueError("a key or a signature has a wrong length")
        except OSError as exc:
            raise UsageError(f"cannot read the approval: {exc.strerror}", where=str(path)) from exc
        except (ValueError, TypeError, RecursionError) as exc:
            hint = "`cloister sign` writes one"
            raise UsageError(f"this is no approval: {exc}", where=str(path), hint=hint) from exc
        return approval

    def check(self, *, job_id: str, party: str, public_key: bytes) -> None:
        """It is this party's approval of this very job.

        Raises: VerificationError("approval") or ("signature").
        """
        if self.job_id != job_id:
            hint = "compare the job files, and sign again if you agree with what has changed"
            raise VerificationError("approval", "the approval is of another job", where=self.party, hint=hint)
        if (self.party, self.public_key) != (party, public_key):
            raise VerificationError("approval", "the approval is another party's", where=self.party)
        verify_signature(public_key, APPROVAL_LABEL, approval_message(job_id), self.signature, where=party)
