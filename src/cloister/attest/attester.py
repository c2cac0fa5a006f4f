"""Choosing what attests this machine. Real hardware only, unless the caller explicitly allows the simulation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Protocol

from cloister.attest.backends.simulated import InsecureSimulatedAttester
from cloister.attest.evidence import Evidence
from cloister.errors import UsageError

AttesterKind = Literal["auto", "simulated"]


class Attester(Protocol):
    """What a backend provides on the machine that it attests."""

    type: str
    """The type of its evidence."""

    def collect(self, report_data: bytes) -> Evidence:
        """Return fresh evidence bound to 64 bytes of report data (see `attest.binding`)."""


HARDWARE: Mapping[str, tuple[str, Callable[[], Attester] | None]] = MappingProxyType(
    {
        "Intel TDX or AMD SEV-SNP guest": ("/sys/kernel/config/tsm/report", None),
        "Intel SGX under Gramine": ("/dev/attestation/quote", None),
        "AWS Nitro enclave": ("/dev/nsm", None),
        "TPM 2.0": ("/dev/tpmrm0", None),
    }
)
"""What "auto" looks for, in this order: name, path, and the backend's constructor (None: no backend yet)."""


def make_attester(
    kind: AttesterKind,
    *,
    allow_simulated: bool = False,
    clock: Callable[[], float] = time.time,
    root: Path = Path("/"),
) -> Attester:
    """Return this machine's attester.

    Args:
        allow_simulated: permission for kind "simulated"; "auto" never falls back to it.
        root: where to look for devices (tests).
    Raises: UsageError that says what was looked for or which permission is missing.
    """
    if kind == "simulated":
        if not allow_simulated:
            hint = "it protects nothing; for a test on one machine, pass --insecure-simulated"
            raise UsageError("the simulated attester is not allowed", where="enclave.attester", hint=hint)
        return InsecureSimulatedAttester(clock=clock)
    if kind != "auto":
        raise ValueError(f"unknown attester {kind!r}")
    found = []
    for name, (path, constructor) in HARDWARE.items():
        if (root / path.lstrip("/")).exists():
            if constructor is not None:
                return constructor()
            found.append(name)
    hint = 'run inside a TEE; `--insecure-simulated` with attester = "simulated" is for tests only'
    if found:
        message = f"found {', '.join(found)}, which this version cannot use as an attester"
    else:
        message = "no TEE found; looked for " + ", ".join(f"{n} ({p})" for n, (p, _) in HARDWARE.items())
    raise UsageError(message, where="enclave.attester", hint=hint)
