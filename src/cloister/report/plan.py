"""The outputs of `cloister plan` and `cloister pads`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cloister.report.model import (
    Count,
    Part,
    Party,
    Seconds,
    Sha256,
    Versioned,
)


class PadsReport(Versioned):
    """`cloister pads`: a store of pads is complete."""

    job_id: Sha256
    party: str
    path: str
    kept_by: str
    """What seals the store and counts its uses: "tpm", or "simulated"."""
    insecure: bool
    """Whoever copies the disk can use pads twice."""
    rows: Count
    """Of all streams."""
    streams: Count
    """Groups of layers times directions."""
    disk_bytes: Count
    multiply_adds: Count
    continued: bool
    """A run that was cut was continued, or the store was complete already."""
    given_up: str
    """Why pads that were here were given up; empty if there were none."""
    seconds: Seconds
    warnings: list[str] = Field(default_factory=list)


class RolePlan(Part):
    """What one process will need."""

    role: Literal["party", "accelerator", "enclave"]
    """With method `slice` "party" is the party's enclave, and an accelerator serves all parties."""
    name: str
    memory_bytes: Count
    disk_bytes: Count
    bytes_up: Count
    bytes_down: Count
    seconds: Seconds | None
    """null where nothing was measured to estimate it from."""


class PartyPads(Part):
    """What one party's enclave asks of accelerators in a job that nothing interrupts."""

    party: str
    steps: Count
    tokens: Count
    """Trained on, over all epochs."""
    rows: Count
    """Of pads, over all layers and both directions."""
    disk_bytes: Count
    """Of their sealed products, one round's more included; 0 unless they are precomputed."""
    pad_seconds: Seconds
    """To compute them on this machine; 0 unless they are precomputed."""
    bytes_up: Count
    """Masked values to an accelerator, scoring included."""
    bytes_down: Count
    """Products, from each accelerator."""


class MaskingPlan(Part):
    """Method `slice`: rounds, pads, and what they do not protect."""

    rounds: Annotated[int, Field(ge=1)]
    pads: Literal["precomputed", "dual", "none"]
    bits: Literal[8, 16]
    checked: bool
    parties: list[PartyPads]
    bytes_per_token: dict[Literal["up", "down"], Count]
    """Between a party's enclave and its accelerators for each trained token, scoring included."""
    insecure: list[str]
    """What the masking does not protect, in words."""


class PlanReport(Versioned):
    """`cloister plan`: a dry run."""

    job_id: Sha256
    job_name: str
    method: str
    architecture: str
    parameters: Count
    trainable_parameters: Count
    layers: Count
    former_layers: Count
    hidden_size: Count
    activation_dtype: str
    steps: Count
    tokens_per_step: Count
    parties: list[Party]
    roles: list[RolePlan]
    timing: dict[str, Seconds] = Field(default_factory=dict)
    masking: MaskingPlan | None = None
    """Method `slice`."""
    warnings: list[str] = Field(default_factory=list)
