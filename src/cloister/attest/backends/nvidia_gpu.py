"""Verifying the evidence of NVIDIA GPUs with confidential computing, as devices of an attested machine.

Guarantees, against everybody but NVIDIA: a GPU of an accepted architecture made the report for this nonce, with these
versions and measurements, and its signing firmware is the one that its hardware certified. Left to `attest.verify`:
that the nonce derives from the machine's evidence, how many GPUs there are, that they differ, reference values.

What no report states in words is whether developer tools are on: then the measurements are others. So list the
measurements of your driver and VBIOS as reference values, or rely on the machine's measured program, whose collector
(`attest.backends.nvml`) refuses such a GPU.

Source: DMTF DSP0274 1.1.0, section 10.11; NVIDIA nvtrust, "local GPU verifier".
"""

from __future__ import annotations

import hashlib
import re

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from cloister.attest.appraisal import Appraisal
from cloister.attest.backends import ec_chain, nvidia_report
from cloister.attest.backends.nvidia_report import GpuReport
from cloister.attest.claims import Report
from cloister.attest.evidence import Evidence
from cloister.errors import VerificationError

TYPE = "nvidia-gpu"
NO_CRL = "whether NVIDIA has revoked a certificate of the GPU was not checked"
PCIE = "GPUs in the mode protected PCIe do not encrypt what they send each other over NVLink"

_ARCHITECTURES = {"GH": "hopper", "GB": "blackwell"}
_CHIP = re.compile(r"(GH|GB)[0-9][0-9A-Z]{1,3} [\x20-\x7e]{1,64}")
"""A leaf's common name: chip, stepping, firmware ("GH100 A01 GSP FMC LF"). NVIDIA's root certifies switches too."""


def verify(evidence: Evidence, appraisal: Appraisal) -> Report:
    """Is it the genuine report of a GPU of an accepted architecture?

    Args:
        evidence: unverified; `blob` is NVIDIA's JSON for one GPU, there is nothing else.
    Raises: VerificationError "evidence-format", "chain", "expired", "product", "signature" or "debug".
    """
    checks = appraisal.checks
    # (1) One report in the accepted form; what stands around it says the same.
    with checks.step("GPU format") as step:
        if evidence.collateral or evidence.event_log or evidence.devices:
            message = "a GPU's evidence has no collateral, no event log and no devices"
            raise VerificationError("evidence-format", message)
        report = nvidia_report.parse(evidence.blob)
        step.reason = f"an SPDM report with {len(report.measurements)} measurements"
    # (2) NVIDIA certified the key that signed it.
    with checks.step("GPU chain") as step:
        key = ec_chain.check_chain(report.chain, appraisal.roots.nvidia)
        step.reason = f"{len(report.chain)} certificates lead from the signing key to NVIDIA's device root"
    # (3) The certificates are valid now.
    with checks.step("GPU validity") as step:
        ec_chain.check_validity(report.chain, appraisal.now, "at the time of this verification")
        step.reason = "all certificates are valid"
    # (4) It is a GPU, of a kind that the policy accepts.
    with checks.step("GPU architecture") as step:
        architecture = _architecture(report, appraisal)
        step.reason = f"the certificate is for a {architecture} GPU"
    # (5) The key signed request and response.
    with checks.step("GPU signature") as step:
        ec_chain.check_signature(key, report.signature, report.signed)
        step.reason = "ECDSA P-384 by the GPU's key over nonce, measurements and versions"
    # (6) The firmware that signed is the one that the hardware certified, so not a debugging one.
    with checks.step("GPU firmware") as step:
        _check_firmware(report)
        step.reason = f"driver {report.driver}, VBIOS {report.vbios}, signing firmware as certified"
    return _report(report, architecture)


def _architecture(report: GpuReport, appraisal: Appraisal) -> str:
    names = report.chain[0].subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    chip = _CHIP.fullmatch(str(names[0].value)) if len(names) == 1 else None
    if chip is None:
        raise VerificationError("product", "the certificate is not for a GPU with confidential computing")
    architecture = _ARCHITECTURES[chip[1]]
    if report.stated["arch"] != architecture.upper():
        raise VerificationError("product", f"the certificate is for a {architecture} GPU, the evidence says another")
    if architecture not in appraisal.rules.nvidia_gpu.architectures:
        hint = "see architectures in [nvidia-gpu] of the policy"
        raise VerificationError("product", f"the policy does not accept {architecture} GPUs", hint=hint)
    return architecture


def _check_firmware(report: GpuReport) -> None:
    certified = nvidia_report.certified_fwid(report.chain[0])
    if certified is None or not any(certified):
        message = "the GPU's certificate does not say which firmware holds its key: it is not one of production"
        raise VerificationError("debug", message)
    if report.fwid not in (None, certified):
        message = "other firmware runs on the GPU than its hardware certified"
        raise VerificationError("debug", message, hint="reset the GPU; turn developer tools off")


def _report(report: GpuReport, architecture: str) -> Report:
    return Report(
        type=TYPE,
        report_data=report.nonce,
        registers={f"measurement_{index}": value for index, value in sorted(report.measurements.items())},
        hardware=True,
        confidential=True,
        tcb={
            "identity": _identity(report.chain[1]),
            "architecture": architecture,
            "driver": report.driver,
            "vbios": report.vbios,
            "mode": report.mode,
        },
        warnings=(NO_CRL, PCIE) if report.mode == nvidia_report.PROTECTED_PCIE else (NO_CRL,),
    )


def _identity(device: x509.Certificate) -> str:
    """SHA-256 of the key burnt into the GPU, which certifies the leaf's; the leaf's changes with the firmware."""
    key = device.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(key).hexdigest()
