"""`cloister attest measure`: the reference values of an image, as a table for a policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cloister
from cloister.attest.measure.nitro import measure_nitro
from cloister.attest.measure.reference import Reference
from cloister.attest.measure.sgx import measure_sgx
from cloister.attest.measure.snp import DEFAULT_GUEST_FEATURES, DEFAULT_VCPU_TYPE, MAX_VCPUS, SnpMachine, measure_snp
from cloister.attest.measure.tdx import measure_tdx
from cloister.attest.measure.tpm import BOOT_PHASES, measure_tpm
from cloister.attest.measure.uki import Uki, parse_uki
from cloister.attest.workload import workload_register
from cloister.errors import UsageError
from cloister.report.attest import MeasureReport

MAX_IMAGE_BYTES = 8 << 30
MAX_CONFIG_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """What to measure, and what the machine that will run it looks like."""

    image: Path | None
    """None: this installation, as the enclave process measures it into a TPM."""
    config: Path | None = None
    """The content of the configuration disk: the folder with job and policy, packed."""
    firmware: Path | None = None
    vcpus: int | None = None
    vcpu_type: str = DEFAULT_VCPU_TYPE
    guest_features: int = DEFAULT_GUEST_FEATURES
    phases: tuple[str, ...] = BOOT_PHASES
    label: str = ""
    """Name of the measurement in the policy; the image's file name where empty."""

    @property
    def file(self) -> Path:
        """The image.

        Raises: UsageError if there is none.
        """
        if self.image is None:
            raise UsageError("give the IMAGE to measure", hint="only tpm has something to measure without one")
        return self.image


def measure_image(kind: str, options: MeasureOptions) -> MeasureReport:
    """Compute what can be computed, and say what cannot.

    Args: kind: a key of `MEASURERS`.
    Raises: UsageError: options are missing or do not fit the kind. DataError: a file is malformed.
    """
    reference = MEASURERS[kind](options)
    label = options.label or (options.image.name if options.image else f"cloister {cloister.__version__}")
    return MeasureReport(
        image=str(options.image or ""),
        type=kind,
        label=label,
        registers={name: value.hex() for name, value in reference.registers.items()},
        missing=dict(reference.missing),
        notes=list(reference.notes),
        table=reference.to_toml(label),
        policy=reference.to_policy(label),
    )


def write_policy(report: MeasureReport, path: Path) -> None:
    """Write a whole policy; an existing file is never overwritten.

    Raises: UsageError.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(report.policy)
    except FileExistsError as exc:
        hint = "a policy is never overwritten; choose another path, or add the printed table to it"
        raise UsageError("the file exists already", where=str(path), hint=hint) from exc
    except OSError as exc:
        raise UsageError(f"cannot write the policy: {exc.strerror}", where=str(path)) from exc


def _tpm(options: MeasureOptions) -> Reference:
    _refuse(options, "tpm", "firmware", "vcpus")
    if options.image is None:
        _refuse(options, "tpm without an image", "config")
        name, value = workload_register()
        note = "this installation only: a policy should name the boot's registers too (pcr0, pcr4, pcr11, pcr12)"
        return Reference(type="tpm", registers={name: value}, notes=(note,))
    return measure_tpm(_uki(options), phases=options.phases, configuration=_configuration(options))


def _tdx(options: MeasureOptions) -> Reference:
    _refuse(options, "tdx", "vcpus")
    firmware = _read(options.firmware, MAX_IMAGE_BYTES) if options.firmware else None
    return measure_tdx(_uki(options), firmware=firmware, configuration=_configuration(options))


def _snp(options: MeasureOptions) -> Reference:
    if options.firmware is None or options.vcpus is None:
        hint = "the launch digest of SEV-SNP covers the firmware and every virtual processor"
        raise UsageError("sev-snp needs --firmware and --vcpus", hint=hint)
    if not 1 <= options.vcpus <= MAX_VCPUS:
        raise UsageError(f"must be from 1 to {MAX_VCPUS}", where="--vcpus")
    machine = SnpMachine(vcpus=options.vcpus, vcpu_type=options.vcpu_type, guest_features=options.guest_features)
    return measure_snp(
        _uki(options),
        machine,
        firmware=_read(options.firmware, MAX_IMAGE_BYTES),
        configuration=_configuration(options),
        firmware_name=str(options.firmware),
    )


def _nitro(options: MeasureOptions) -> Reference:
    _refuse(options, "nitro", "firmware", "vcpus", "config")
    return measure_nitro(_read(options.file, MAX_IMAGE_BYTES), what=str(options.file))


def _sgx(options: MeasureOptions) -> Reference:
    _refuse(options, "sgx", "firmware", "vcpus", "config")
    return measure_sgx(_read(options.file, MAX_IMAGE_BYTES), what=str(options.file))


MEASURERS: dict[str, Callable[[MeasureOptions], Reference]] = {
    "tpm": _tpm,
    "tdx": _tdx,
    "sev-snp": _snp,
    "nitro": _nitro,
    "sgx": _sgx,
}
"""By type of evidence."""

_WHY_NOT = {
    "firmware": "what its firmware measures is not computed for this type",
    "vcpus": "the number of processors is not measured there",
    "config": "there the configuration is part of the image itself, see docs/deploy.md",
}


def _refuse(options: MeasureOptions, kind: str, *names: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise UsageError(f"--{name} does not apply to {kind}", where=f"--{name}", hint=_WHY_NOT[name])


def _uki(options: MeasureOptions) -> Uki:
    return parse_uki(_read(options.file, MAX_IMAGE_BYTES), what=str(options.file))


def _configuration(options: MeasureOptions) -> bytes | None:
    return None if options.config is None else _read(options.config, MAX_CONFIG_BYTES)


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        if path.stat().st_size > max_bytes:
            raise UsageError(f"the file is larger than {max_bytes} bytes", where=str(path))
        return path.read_bytes()
    except OSError as exc:
        raise UsageError(f"cannot read the file: {exc.strerror}", where=str(path)) from exc
