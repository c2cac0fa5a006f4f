"""What exactly a party signs, and what its data keys are bound to."""

from __future__ import annotations

from collections.abc import Mapping

from cloister.crypto.encoding import join

APPROVAL_LABEL = "job approval"
MANIFEST_LABEL = "manifest"
KEYS_LABEL = "data keys"

HASH_BYTES = 32
INSTANCE_ID_BYTES = 16


def approval_message(job_id: str) -> bytes:
    """Signed once the party has read the resolved job: it wants this job to run."""
    return bytes.fromhex(job_id)


def wrap_info(*, manifest_sha256: bytes, instance_id: bytes, party: str, kind: str) -> bytes:
    """HPKE `info` of a data key: it opens for this manifest, this instance, this bundle, nothing else."""
    return join(b"cloister data key v1", manifest_sha256, instance_id, party.encode(), kind.encode())


def keys_message(*, manifest_sha256: bytes, instance_id: bytes, wrapped: Mapping[str, bytes]) -> bytes:
    """Signed with the wrapped keys: HPKE's base mode does not say who wrapped."""
    parts = [part for kind in sorted(wrapped) for part in (kind.encode(), wrapped[kind])]
    return join(manifest_sha256, instance_id, *parts)
