"""What runs here, as one digest: Cloister's source, the Python that runs it, and every installed package.

A machine's boot measures what it starts: firmware, kernel, root file system. This is the next link, measured by the
program itself into a register that only grows. It counts only together with the links before it: who controls the
kernel can extend any digest, so a policy names the boot's registers as well.

For a TPM that is PCR 14. It cannot be reset before the next boot, as PCR 16 and 23 can by any program; and of the PCRs
that cannot, nobody else uses it where the firmware starts a unified kernel image directly: 0-7 are the firmware's, 8-10
those of boot loaders and IMA, 11-13 systemd-stub's, 15 systemd's (the UAPI group's "Linux TPM PCR Registry"). Under
a boot loader with shim choose another one. `cloister attest measure --type tpm` prints the value for a policy.
"""

from __future__ import annotations

import hashlib
import platform
import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distributions

from cloister.attest.backends.simulated import measure_source
from cloister.crypto.encoding import encode
from cloister.errors import RunError
from cloister.tpm.commands import Tpm, extended

PCR = 14
PCRS_THAT_ONLY_GROW = range(8, 16)
"""Those that an operating system extends and that only a boot resets ("PC Client Platform TPM Profile", table 9)."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The closed workload of this process."""

    source: bytes
    """SHA-256 over Cloister's Python files: 32 bytes."""
    python: str
    packages: tuple[str, ...]
    """Every installed distribution as "name==version", sorted."""

    @property
    def event(self) -> bytes:
        """What is measured: canonical CBOR."""
        return encode({"source": self.source, "python": self.python, "packages": list(self.packages)})

    @property
    def digest(self) -> bytes:
        """SHA-256 of `event`: 32 bytes."""
        return hashlib.sha256(self.event).digest()


@cache
def this_workload() -> Workload:
    """Describe this process's workload; read once."""
    packages = {f"{_normal(d.name)}=={d.version}" for d in distributions()}
    python = f"{platform.python_implementation()} {platform.python_version()} {platform.machine()}"
    return Workload(source=measure_source(), python=python, packages=tuple(sorted(packages)))


def workload_register(workload: Workload | None = None, *, pcr: int = PCR) -> tuple[str, bytes]:
    """The reference value for a policy: the register's name, and SHA-256(zeros || digest)."""
    return f"pcr{pcr}", extended(bytes(32), (workload or this_workload()).digest)


def measure_workload(tpm: Tpm, workload: Workload | None = None, *, pcr: int = PCR) -> None:
    """Extend the workload's digest into a PCR, once per boot: again does nothing, other software is refused.

    Raises: RunError if something else was measured there since the boot.
    """
    if pcr not in PCRS_THAT_ONLY_GROW:
        raise ValueError(f"PCR {pcr} can be reset without a boot, or is the firmware's")
    workload = workload or this_workload()
    now, (_, expected) = tpm.pcr_read([pcr])[pcr], workload_register(workload, pcr=pcr)
    if now == bytes(32):
        tpm.pcr_extend(pcr, workload.digest)
        now = tpm.pcr_read([pcr])[pcr]
    if now != expected:
        hint = "other software, or another version of it, was measured since this machine started: restart the machine"
        raise RunError(f"PCR {pcr} of the TPM does not measure this program", where=tpm.device.address, hint=hint)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
