"""Runtime measurement registers of a TDX guest that its firmware (TDVF) boots from a unified kernel image.

    RTMR1   what UEFI measures into PCR 2 to 6: the image itself, so kernel, initrd and command line (with the
            dm-verity root hash, and through it the whole file system)
    RTMR2   what goes into PCR 8 to 15: systemd-stub's sections, then the kernel's own stub: command line and initrd.
            A command line or credential that the host adds shows here.
    RTMR3   free for the guest: the hash of the configuration disk, extended before the enclave starts

Source: UEFI 2.10, 38.4.1 (PCR to RTMR); edk2 `OvmfPkg/Tcg/TdTcg2Dxe` (order at ReadyToBoot and ExitBootServices);
Linux `drivers/firmware/efi/libstub` (tagged events). RTMR0 (memory map, ACPI tables, variables) depends on the host.
"""

from __future__ import annotations

import hashlib

from cloister.attest.measure.pe import parse_pe
from cloister.attest.measure.reference import FROM_FIRST_BOOT, Reference, replay
from cloister.attest.measure.tdvf import mrtd
from cloister.attest.measure.tpm import CALLING_EFI_APPLICATION, SEPARATOR, kernel_is_measured_again
from cloister.attest.measure.uki import CALLS_KERNEL_DIRECTLY, Uki

EXIT_BOOT_SERVICES = (b"Exit Boot Services Invocation", b"Exit Boot Services Returned with Success")
_ALGORITHM = "sha384"
_ADDED_TO_INITRD = (".ucode", ".osrel", ".pcrsig", ".pcrpkey", ".profile")
"""Sections from which the stub makes further archives before or behind the initrd."""


def rtmr1(uki: Uki) -> bytes:
    """RTMR1: the image as the only EFI program, started from a disk without partition table."""
    digests = [_sha384(CALLING_EFI_APPLICATION), _sha384(SEPARATOR), uki.pe.authenticode(_ALGORITHM)]
    if kernel_is_measured_again(uki):
        digests.append(parse_pe(uki.kernel, what=".linux").authenticode(_ALGORITHM))
    return replay(digests + [_sha384(event) for event in EXIT_BOOT_SERVICES], algorithm=_ALGORITHM)


def rtmr2(uki: Uki) -> bytes:
    """RTMR2, for images for which `rtmr2_unknown` is None: sections, command line (UTF-16, with its NUL), initrd."""
    events = [event for name, data in uki.measured() for event in (name.encode() + b"\0", data)]
    events += [uki.command_line().encode("utf-16-le") + b"\0\0", uki.initrd]
    return replay([_sha384(event) for event in events], algorithm=_ALGORITHM)


def rtmr2_unknown(uki: Uki) -> str | None:
    """Why RTMR2 cannot be computed; None where it can."""
    if uki.stub_version is None or uki.stub_version < CALLS_KERNEL_DIRECTLY:
        return f"computed only for systemd-stub {CALLS_KERNEL_DIRECTLY} or later"
    added = [name for name in _ADDED_TO_INITRD if name in uki.sections]
    return f"the stub adds archives made from {', '.join(added)} to the initrd" if added else None


def rtmr3(configuration_sha384: bytes) -> bytes:
    """RTMR3 after the configuration's SHA-384, and nothing else, was extended into it."""
    return replay([configuration_sha384], algorithm=_ALGORITHM)


def measure_tdx(uki: Uki, *, firmware: bytes | None, configuration: bytes | None) -> Reference:
    """Reference values of an image.

    Args: firmware: the TDVF file. configuration: the content of the configuration disk.
    Raises: DataError.
    """
    registers = {"rtmr1": rtmr1(uki)}
    missing = {}
    notes = [
        "rtmr1: the firmware starts the image itself from a disk without partition table, Secure Boot off",
        "rtmr0 holds what the host decides (memory map, ACPI tables, variables): compare it on the machine that you"
        f" use and add it; {FROM_FIRST_BOOT}",
        "predicted from specifications and source code; no TDX machine has confirmed these values yet",
    ]
    if firmware is None:
        missing["mr_td"] = f"give --firmware, or {FROM_FIRST_BOOT}"
    else:
        registers["mr_td"] = mrtd(firmware, what="firmware")
        other = mrtd(firmware, what="firmware", pages_first=True).hex()
        notes.append(f"mr_td: for hosts with Linux 6.16 or later; hosts with Intel's early patches (QEMU 8):\n{other}")
    reason = rtmr2_unknown(uki)
    if reason is None:
        registers["rtmr2"] = rtmr2(uki)
        notes.append("rtmr2: nothing added from outside the image, kernel 6.9 or later")
    else:
        missing["rtmr2"] = f"{reason}; {FROM_FIRST_BOOT}"
    if configuration is None:
        missing["rtmr3"] = "give --config, the content of the configuration disk"
    else:
        registers["rtmr3"] = rtmr3(_sha384(configuration))
    return Reference(type="tdx", registers=registers, missing=missing, notes=tuple(notes))


def _sha384(data: bytes) -> bytes:
    return hashlib.sha384(data).digest()
