"""What a policy may say about one type of evidence beyond its measurement; each table is optional.

Defaults are strict where a looser value costs security (TCB status, debug, migration), and open where they only
describe the machine (simultaneous multithreading, several sockets). Debug is never allowed and has no key.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, le=2**32)]
Svn = Annotated[int, Field(ge=0, le=255)]

TcbStatus = Literal[
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
]
"""Intel's TCB statuses, worst last. "Revoked" cannot be allowed."""


class Rules(BaseModel):
    """Base: immutable, unknown keys are errors, no conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class DcapRules(Rules):
    """[tdx] and [sgx]: quotes verified with Intel's collateral."""

    statuses: tuple[TcbStatus, ...] = ("UpToDate",)
    """TCB statuses that are accepted."""
    advisories: tuple[str, ...] = ()
    """Intel advisories (INTEL-SA-...) that are accepted; any other one that the TCB level names is refused."""
    min_tcb_evaluation: Count = 0
    """Least tcbEvaluationDataNumber of the collateral: refuses collateral from before a TCB recovery."""
    dynamic_platform: bool = True
    """Whether platforms to which packages can be added are accepted."""
    cached_keys: bool = True
    """Whether platforms whose root keys Intel's registration service caches are accepted."""
    smt: bool = True
    """Whether simultaneous multithreading may be on."""


class SgxRules(DcapRules):
    """[sgx]."""

    min_isv_svn: Annotated[int, Field(ge=0, le=65535)] = 0
    """Least security version of the enclave: matters where a measurement names mr_signer, not mr_enclave."""


class SnpTcb(Rules):
    """Least security versions of AMD firmware components."""

    bootloader: Svn = 0
    tee: Svn = 0
    snp: Svn = 0
    microcode: Svn = 0
    fmc: Svn = 0
    """Turin and later only."""


class SnpRules(Rules):
    """[sev-snp]; also the SNP report inside azure-vtpm evidence. That no migration agent is allowed is always required,
    and VMPL 0 wherever the policy lists measurements.
    """

    min_tcb: SnpTcb = SnpTcb()
    min_guest_svn: Count = 0
    smt: bool = True
    """Whether simultaneous multithreading may be on."""
    single_socket: bool = False
    """Whether the guest must be bound to one socket."""
    vlek: bool = True
    """Whether reports signed with a cloud provider's key (VLEK) are accepted, not only a chip's own (VCEK)."""


class TpmRules(Rules):
    """[tpm]."""

    attestation_keys: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{68}$")], ...] = ()
    """TPM names (nameAlg and SHA-256, hex) of attestation keys that have completed credential activation, as
    `cloister attest enrol` prints them. No other key is accepted."""
    endorsed: bool = False
    """Whether a TPM manufacturer's certificate vouched for each of these keys' TPMs when it was enrolled. Only then do
    claims say `hardware`: without it the TPM may be a program."""
    min_reset_count: Count = 0
    """Least reset counter: it grows with every boot, so a lower one means that an older state was restored."""
    max_reset_count: Count | None = None
    """Greatest reset counter: equal to the least one, it accepts one boot of the machine and no later one."""


class GpuRules(Rules):
    """[nvidia-gpu]."""

    count: Annotated[int, Field(ge=0, le=16)] = 0
    """How many different GPUs must attest together with the CPU evidence; 0: evidence of GPUs is refused."""
    architectures: tuple[Literal["hopper", "blackwell"], ...] = ("hopper", "blackwell")


class RuleTables(Rules):
    """The rules of every type; a table that a policy does not name has its defaults."""

    model_config = ConfigDict(alias_generator=lambda name: name.replace("_", "-"), populate_by_name=True)

    tdx: DcapRules = DcapRules()
    sgx: SgxRules = SgxRules()
    sev_snp: SnpRules = SnpRules()
    """Also for the SNP report inside azure-vtpm evidence."""
    tpm: TpmRules = TpmRules()
    nvidia_gpu: GpuRules = GpuRules()


RULE_TABLES = tuple(field.alias or name for name, field in RuleTables.model_fields.items())
"""Names of the tables in a policy file."""
