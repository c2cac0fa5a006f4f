"""What the plans of both methods consist of."""

from __future__ import annotations

from dataclasses import dataclass, field

from cloister.crypto.keys import fingerprint
from cloister.job import Job
from cloister.report.model import Party, Records, Truncated
from cloister.report.plan import MaskingPlan, RolePlan


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """The part of a plan that depends on the job's method, see `PlanReport`."""

    trainable: int
    steps: int
    parties: list[Party]
    roles: list[RolePlan]
    timing: dict[str, float]
    masking: MaskingPlan | None = None
    warnings: list[str] = field(default_factory=list)


def describe_party(job: Job, name: str, records: Records, truncated: Truncated) -> Party:
    """A party's line of a plan."""
    key = next(p.public_key for p in job.party if p.name == name)
    return Party(
        name=name,
        public_key_fingerprint=fingerprint(bytes.fromhex(key)) if key else "",
        records=records,
        truncated=truncated,
    )
