"""What evidence is bound to: 64 bytes of report_data = SHA-512 over a label and every field, each behind its length.

Binding to a handshake's transcript, not to a long-lived key, is what stops evidence from being relayed into another
session; the role stops reflection; the job and the verifier's nonce stop replay.
"""

from __future__ import annotations

import hashlib
from hmac import compare_digest
from typing import Literal

from cloister.crypto.encoding import join

Role = Literal["party", "enclave"]


def session_report_data(*, role: Role, job_id: str, transcript: bytes) -> bytes:
    """For one session: who speaks, in which job, over which handshake (a hash of all of it so far)."""
    return _bind("session", role.encode(), job_id.encode(), transcript)


def instance_report_data(
    *, job_id: str, instance_id: bytes, signing_key: bytes, hpke_key: bytes, nonce: bytes
) -> bytes:
    """For the keys of one enclave instance: they were made inside it, for this job, after `nonce` was drawn.

    Args:
        signing_key: Ed25519, 32 bytes. hpke_key: see `crypto.hpke`. nonce: the verifier's, random, at least 16 bytes.
    """
    if len(nonce) < 16:
        raise ValueError("the verifier's nonce must have at least 16 bytes")
    return _bind("instance-keys", job_id.encode(), instance_id, signing_key, hpke_key, nonce)


def device_nonce(report_data: bytes) -> bytes:
    """What a device's evidence is bound to: 32 bytes from the report data of the CPU evidence that it comes with."""
    return hashlib.sha256(join(b"cloister device nonce v1", report_data)).digest()


def is_bound(found: bytes, expected: bytes) -> bool:
    """Whether what an attester signed is the expected report data, or its SHA-256 where 64 bytes do not fit (TPM)."""
    return compare_digest(found, expected) or compare_digest(found, hashlib.sha256(expected).digest())


def _bind(label: str, *fields: bytes) -> bytes:
    return hashlib.sha512(join(b"cloister report data v1", label.encode(), *fields)).digest()
