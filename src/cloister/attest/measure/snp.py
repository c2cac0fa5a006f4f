"""The launch digest of an SEV-SNP guest, through IBM's `sev-snp-measure` (extra "measure").

QEMU's `kernel-hashes=on` puts the hashes of kernel, initrd and command line into a page that is measured at launch;
OVMF then starts nothing else. HOST_DATA carries the hash of the configuration: the host sets it, the guest refuses to
start with any other configuration, and the report shows it.

Source: AMD SEV-SNP Firmware ABI (56860) 8.17; QEMU docs/system/i386/amd-memory-encryption.
"""

from __future__ import annotations

import hashlib
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cloister.attest.measure.reference import Reference
from cloister.attest.measure.uki import Uki
from cloister.errors import DataError, UsageError

DEFAULT_VCPU_TYPE = "EPYC-v4"
DEFAULT_GUEST_FEATURES = 1
"""SNP active and nothing else: VMSA field SEV_FEATURES."""
MAX_VCPUS = 512


@dataclass(frozen=True, kw_only=True)
class SnpMachine:
    """What the host decides and the launch digest covers."""

    vcpus: int
    vcpu_type: str = DEFAULT_VCPU_TYPE
    guest_features: int = DEFAULT_GUEST_FEATURES


def launch_digest(
    firmware: bytes, machine: SnpMachine, *, kernel: bytes, initrd: bytes, command_line: str, firmware_name: str
) -> bytes:
    """The 48 bytes of the report's MEASUREMENT.

    Raises: DataError: the firmware does not fit. UsageError: the library or the type of processor is not there.
    """
    try:
        from sevsnpmeasure import guest, vcpu_types  # type: ignore[import-untyped]
        from sevsnpmeasure.sev_mode import SevMode  # type: ignore[import-untyped]
    except ImportError as exc:
        hint = 'install the extra: pip install "cloister[measure]"'
        raise UsageError("measuring for SEV-SNP needs the library sev-snp-measure", hint=hint) from exc
    signature = vcpu_types.CPU_SIGS.get(machine.vcpu_type)
    if signature is None:
        known = ", ".join(sorted(vcpu_types.CPU_SIGS))
        raise UsageError(
            f"unknown type of processor {machine.vcpu_type!r}", where="--vcpu-type", hint=f"known: {known}"
        )
    with tempfile.TemporaryDirectory() as folder:  # the library reads files
        paths = {name: Path(folder, name) for name in ("firmware", "kernel", "initrd")}
        for name, data in (("firmware", firmware), ("kernel", kernel), ("initrd", initrd)):
            paths[name].write_bytes(data)
        try:
            digest = guest.calc_launch_digest(
                SevMode.SEV_SNP, machine.vcpus, signature, str(paths["firmware"]), str(paths["kernel"]),
                str(paths["initrd"]) if initrd else "", command_line, machine.guest_features,
            )  # fmt: skip
        except (ValueError, RuntimeError, LookupError, struct.error, AssertionError) as exc:
            hint = "give an OVMF built for SEV-SNP with kernel hashes (edk2 OvmfPkg/AmdSev)"
            raise DataError(f"the firmware cannot be measured: {exc}", where=firmware_name, hint=hint) from exc
    return bytes(digest)


def measure_snp(
    uki: Uki, machine: SnpMachine, *, firmware: bytes, configuration: bytes | None, firmware_name: str
) -> Reference:
    """Reference values of an image whose parts QEMU boots directly.

    Args: configuration: the content of the configuration disk, whose SHA-256 is in HOST_DATA.
    Raises: as `launch_digest`.
    """
    measurement = launch_digest(
        firmware, machine, kernel=uki.kernel, initrd=uki.initrd, command_line=uki.command_line(),
        firmware_name=firmware_name,
    )  # fmt: skip
    registers = {"measurement": measurement}
    missing = {}
    if configuration is None:
        missing["host_data"] = "give --config, the content of the configuration disk"
    else:
        registers["host_data"] = hashlib.sha256(configuration).digest()
    return Reference(
        type="sev-snp",
        registers=registers,
        missing=missing,
        notes=(
            f"measurement: {machine.vcpus} processors of type {machine.vcpu_type},"
            f" guest features {machine.guest_features:#x}",
            f"booted by QEMU with kernel-hashes=on from the parts of the image, with -append {uki.command_line()!r}",
        ),
    )
