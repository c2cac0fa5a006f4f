"""The end of a job in the enclave: declared metrics, the receipt, and what each party may fetch. For both methods."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cloister.adapters.files import adapter_sha256, file_hashes
from cloister.agreement.receipt import make_receipt
from cloister.enclave.core import EnclaveCore
from cloister.enclave.results import Outcome
from cloister.evaluation.rows import results_rows
from cloister.evaluation.scores import Scores
from cloister.jobfile import ResolvedJob

COMMIT_WAIT_S = 20.0
"""How long the receipt waits for the parties' signatures under the last checkpoint; it holds those that are there."""


def close_job(
    core: EnclaveCore,
    resolved: ResolvedJob,
    *,
    scores: Mapping[str, Mapping[str, Scores]],
    declared: Mapping[str, Any],
    adapter: Mapping[str, bytes],
    started: int,
    party_enclaves: Mapping[str, Any] | None = None,
    insecure: Mapping[str, Sequence[str]] | None = None,
) -> Outcome:
    """Sign what has come out.

    Args:
        scores: by system and party. declared: training, curve, timing and more, for every party.
        adapter: its files. started: seconds since 1970.
        party_enclaves: method `slice`: see `agreement.party_enclaves`.
        insecure: by party, what its masking did not protect, in words.

    Raises:
        RunError: see `EnclaveCore.check_clock`.
    """
    core.wait_for_commit(COMMIT_WAIT_S)
    core.check_clock()
    rows = [row for system, by_party in scores.items() for row in results_rows(system, by_party)]  # type: ignore[arg-type]
    results = [row.model_dump(mode="json") for row in rows]
    body = {
        "job_id": core.job_id,
        "job": resolved.canonical.decode(),
        "approvals": {name: s.hex() for name, s in core.approvals().items()},
        "manifest": core.manifest.to_bytes().hex() if core.manifest else "",
        "manifest_signatures": {name: s.hex() for name, s in core.manifest_signatures().items()},
        "history": core.history(),
        "adapter_sha256": adapter_sha256(adapter),
        "adapter_files": file_hashes(adapter),
        "metrics": results,
        "training": declared["training"],
        "started": started,
        "ended": int(time.time()),
    }
    if party_enclaves is not None:
        body |= {
            "party_enclaves": party_enclaves,
            "insecure": {party: list(said) for party, said in (insecure or {}).items()},
        }
    receipt = make_receipt(
        body,
        instance_id=core.instance_id,
        signing_key=core.signing_key,
        hpke_key=core.hpke_key.public,
        evidence=core.evidence,
    )
    shown = {**declared, "results": results, "threads": torch.get_num_threads()}
    shown["checkpoints"] = core.checkpoints_so_far()
    private: dict[str, dict[str, str]] = {}
    for system, by_party in scores.items():
        for party, own in by_party.items():
            private.setdefault(party, {})[system] = own.to_json_lines()
    return Outcome(declared=json.dumps(shown).encode(), private=private, adapter=adapter, receipt=receipt)


class Clock:
    """Seconds per phase."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str, before: float = 0.0) -> None:
        """Time since the last lap, and what earlier instances have spent on the same."""
        now = time.monotonic()
        self.laps[name], self._last = before + now - self._last, now
