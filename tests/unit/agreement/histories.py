"""The history of a run that was never interrupted and made no checkpoint, as its receipt shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloister.agreement import Manifest
from cloister.agreement.checkpoint import Position, Start
from cloister.crypto.keys import PartyKey


def uninterrupted(manifest: Manifest, instance_id: bytes, keys: Mapping[str, PartyKey]) -> dict[str, Any]:
    """Every party lets the instance begin at the manifest."""
    beginning = Position(number=0, hash=manifest.sha256)
    start = Start(position=beginning, last=beginning)
    consents = {
        name: start.signed(key, job_id=manifest.job_id, manifest_sha256=manifest.sha256, instance_id=instance_id)
        for name, key in keys.items()
    }
    starts = [{name: consent.to_bytes().hex() for name, consent in consents.items()}]
    return {"quorum": len(keys), "earlier": [], "starts": starts, "chain": []}
