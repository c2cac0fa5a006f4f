"""Choosing what attests this machine. Real hardware only, unless the caller explicitly allows the simulation.

"auto" takes the first backend of `BACKENDS` that finds its device here, and says which; it never falls back to the
simulation. Backends are imported only when they are asked, so that a machine without a TEE loads none of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from cloister.attest.backends.simulated import InsecureSimulatedAttester
from cloister.attest.evidence import MAX_COLLATERAL_BYTES, Evidence
from cloister.errors import UsageError

AttesterKind = Literal["auto", "simulated", "tdx", "sev-snp", "sgx", "nitro", "dstack", "tpm"]
"""Values of `[enclave] attester` in a job file."""


class Attester(Protocol):
    """What a backend provides on the machine that it attests."""

    @property
    def type(self) -> str:
        """The type of its evidence."""

    def collect(self, report_data: bytes) -> Evidence:
        """Return fresh evidence bound to 64 bytes of report data (see `attest.binding`)."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to get evidence. Its class has `found(root) -> str | None`, which says what it found, and `type`."""

    kinds: tuple[AttesterKind, ...]
    """What a job file may call it."""
    name: str
    looks_for: str
    module: str
    attester: str
    """Name of the class in the module."""

    def load(self) -> Any:  # Any: a class whose constructor is its own
        return getattr(import_module(f"cloister.attest.backends.{self.module}"), self.attester)


BACKENDS = (
    Backend(
        kinds=("tdx", "sev-snp"),
        name="Intel TDX or AMD SEV-SNP guest",
        looks_for="/sys/kernel/config/tsm/report",
        module="tsm",
        attester="TsmAttester",
    ),
    Backend(
        kinds=("sgx",),
        name="Intel SGX under Gramine",
        looks_for="/dev/attestation",
        module="gramine",
        attester="GramineAttester",
    ),
    Backend(
        kinds=("nitro",), name="AWS Nitro enclave", looks_for="/dev/nsm", module="nsm", attester="NitroAttester"
    ),
    Backend(
        kinds=("dstack",), name="dstack", looks_for="/var/run/dstack.sock", module="dstack", attester="DstackAttester"
    ),
    Backend(kinds=("tpm",), name="TPM 2.0", looks_for="/dev/tpmrm0", module="tpm", attester="TpmAttester"),
)  # fmt: skip
"""What "auto" looks for, in this order: what hides memory before what only measures."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """An attester, and what made us take it."""

    attester: Attester
    how: str
    """For people: "Intel TDX or AMD SEV-SNP guest (/sys/kernel/config/tsm/report)"."""


class WithCollateral:
    """Adds endorsements that were fetched beforehand to evidence that has none.

    The file is read for each evidence: its operator may renew it while a job runs.
    """

    def __init__(self, attester: Attester, path: Path) -> None:
        self._attester = attester
        self._path = path

    @property
    def type(self) -> str:
        return self._attester.type

    def collect(self, report_data: bytes) -> Evidence:
        """See `Attester`. Raises: UsageError if the file cannot be read."""
        evidence = self._attester.collect(report_data)
        if evidence.collateral:
            return evidence
        try:
            with self._path.open("rb") as file:
                return replace(evidence, collateral=file.read(MAX_COLLATERAL_BYTES + 1))
        except (OSError, ValueError) as exc:
            hint = "`cloister attest fetch` writes it"
            raise UsageError(f"cannot use the collateral: {exc}", where=str(self._path), hint=hint) from exc


def find_attester(
    kind: AttesterKind,
    *,
    allow_simulated: bool = False,
    clock: Callable[[], float] = time.time,
    root: Path = Path("/"),
    tpm: str | None = None,
    collateral: Path | None = None,
    gpus: bool = False,
) -> Found:
    """Find what attests this machine.

    Args:
        allow_simulated: permission for kind "simulated"; "auto" never falls back to it.
        root: where to look for devices (tests).
        tpm: which TPM, for kind "tpm": a device, or "swtpm:PATH" for the socket of a software TPM.
        collateral: a file of endorsements to add to evidence that has none.
        gpus: whether this machine's GPUs attest with it.
    Raises: UsageError that says what was looked for or which permission is missing.
    """
    found = _find(kind, allow_simulated, clock, root, tpm)
    if collateral is not None:
        found = replace(found, attester=WithCollateral(found.attester, collateral))
    if gpus:
        with_gpus = import_module("cloister.attest.backends.nvml").WithGpus(found.attester)
        found = replace(found, attester=with_gpus, how=f"{found.how}, with its GPUs")
    return found


def _find(kind: AttesterKind, allow_simulated: bool, clock: Callable[[], float], root: Path, tpm: str | None) -> Found:
    if kind == "simulated":
        if not allow_simulated:
            hint = "it protects nothing; for a test on one machine, pass --insecure-simulated"
            raise UsageError("the simulated attester is not allowed", where="enclave.attester", hint=hint)
        return Found(attester=InsecureSimulatedAttester(clock=clock), how="the simulation, which protects nothing")
    candidates = [backend for backend in BACKENDS if kind in ("auto", *backend.kinds)]
    if not candidates:
        raise ValueError(f"unknown attester {kind!r}")
    if kind == "tpm" and tpm is not None:
        return Found(attester=candidates[0].load().open(tpm), how=f"TPM 2.0 ({tpm})")
    for backend in candidates:
        attester_class = backend.load()
        where = attester_class.found(root)
        if where is not None:
            attester = attester_class(root)
            _check_kind(kind, attester)
            return Found(attester=attester, how=f"{backend.name} ({where})")
    looked = ", ".join(f"{backend.name} ({backend.looks_for})" for backend in candidates)
    hint = 'run inside a TEE; `--insecure-simulated` with attester = "simulated" is for tests only'
    raise UsageError(f"no TEE found; looked for {looked}", where="enclave.attester", hint=hint)


def _check_kind(kind: AttesterKind, attester: Attester) -> None:
    """One interface of Linux serves TDX and SEV-SNP: a job that names one of them means it."""
    if kind in ("tdx", "sev-snp") and attester.type != kind:
        hint = f'write attester = "{attester.type}" or "auto", if the policy accepts that'
        raise UsageError(
            f"this machine gives {attester.type} evidence, not {kind}", where="enclave.attester", hint=hint
        )
