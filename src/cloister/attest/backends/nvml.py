"""Collecting the evidence of this machine's NVIDIA GPUs, together with the machine's own, through NVIDIA's NVML.

Guarantees, to whoever trusts the measured program that runs this: every GPU of the machine attested for a nonce that
derives from the machine's evidence, and the driver says that confidential computing is on and developer tools are
off, which no GPU's report states.

Source: NVIDIA, NVML API reference, "Confidential Computing"; a report begins with the request (nvtrust).
"""

from __future__ import annotations

import base64
import ctypes
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

from cloister.attest.attester import Attester
from cloister.attest.backends import nvidia_report
from cloister.attest.backends.nvidia_report import NONCE_BYTES
from cloister.attest.binding import device_nonce
from cloister.attest.evidence import MAX_DEVICES, Evidence
from cloister.errors import RunError, UsageError, VerificationError

TYPE = "nvidia-gpu"

_WHERE = "NVML"
_MIN_DRIVER_HINT = "install NVIDIA's data centre driver 550 or later inside the confidential VM"


class WithGpus:
    """Adds the evidence of all GPUs to that of a machine, whose report data must be 64 bytes in its report."""

    def __init__(self, attester: Attester, *, nvml: Any = None) -> None:
        """Args: nvml: the module `pynvml`, or a stand-in (tests)."""
        self._attester = attester
        self._nvml = nvml

    @property
    def type(self) -> str:
        return self._attester.type

    def collect(self, report_data: bytes) -> Evidence:
        """See `attest.attester.Attester`. Raises: as `collect_gpus`."""
        devices = collect_gpus(device_nonce(report_data), nvml=self._nvml)
        return replace(self._attester.collect(report_data), devices=devices)


def collect_gpus(nonce: bytes, *, nvml: Any = None) -> tuple[Evidence, ...]:
    """Return the evidence of each GPU, at least of one.

    Args: nonce: 32 bytes, see `binding.device_nonce`. nvml: the module `pynvml`, or a stand-in (tests).
    Raises: UsageError if nvidia-ml-py is missing; RunError if NVML cannot be used, a GPU cannot attest, or debugging
        is on.
    """
    if len(nonce) != NONCE_BYTES:
        raise ValueError(f"a GPU's nonce has {NONCE_BYTES} bytes")
    nvml = _load() if nvml is None else nvml
    with _session(nvml):
        _check_mode(nvml)
        count = nvml.nvmlDeviceGetCount()
        if not 1 <= count <= MAX_DEVICES:
            raise RunError(f"{count} GPUs here, 1 to {MAX_DEVICES} can attest", where=_WHERE)
        return tuple(_collect(nvml, index, nonce) for index in range(count))


def _load() -> Any:  # Any: the module has no types
    try:
        return import_module("pynvml")
    except ModuleNotFoundError as exc:
        hint = "pip install 'cloister[gpu]'"
        raise UsageError("evidence of GPUs needs the package nvidia-ml-py", where=_WHERE, hint=hint) from exc


@contextmanager
def _session(nvml: Any) -> Iterator[None]:
    """NVML between initialisation and shutdown; its errors become ours."""
    try:
        nvml.nvmlInit()
        try:
            yield
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as exc:
        raise RunError(f"NVIDIA's driver refuses: {exc}", where=_WHERE, hint=_MIN_DRIVER_HINT) from exc


def _check_mode(nvml: Any) -> None:
    settings = nvml.c_nvmlSystemConfComputeSettings_v1_t()
    # This one function of pynvml does not check what it returns.
    if nvml.nvmlSystemGetConfComputeSettings(ctypes.byref(settings)) != nvml.NVML_SUCCESS:
        raise RunError("the driver does not tell its mode", where=_WHERE, hint=_MIN_DRIVER_HINT)
    if settings.devToolsMode != nvml.NVML_CC_SYSTEM_DEVTOOLS_MODE_OFF:
        hint = "the host turns them off, then resets the GPU"
        raise RunError("developer tools are on: the GPU's memory can be read from outside", where=_WHERE, hint=hint)
    if settings.environment != nvml.NVML_CC_SYSTEM_ENVIRONMENT_PROD:
        raise RunError("the GPUs' confidential computing is not of production", where=_WHERE)
    # Protected PCIe is a mode of its own, in which the other switch is off.
    on = settings.ccFeature == nvml.NVML_CC_SYSTEM_FEATURE_ENABLED
    if not on and settings.multiGpuMode != nvml.NVML_CC_SYSTEM_MULTIGPU_PROTECTED_PCIE:
        hint = "the host turns it on, then resets the GPU"
        raise RunError("confidential computing is off on the GPUs", where=_WHERE, hint=hint)


def _collect(nvml: Any, index: int, nonce: bytes) -> Evidence:
    where = f"GPU {index}"
    device = nvml.nvmlDeviceGetHandleByIndex(index)
    architectures = {nvml.NVML_DEVICE_ARCH_HOPPER: "HOPPER", nvml.NVML_DEVICE_ARCH_BLACKWELL: "BLACKWELL"}
    architecture = architectures.get(nvml.nvmlDeviceGetArchitecture(device))
    if architecture is None:
        raise RunError("has no confidential computing", where=where, hint="use a Hopper or Blackwell GPU")
    answer = nvml.nvmlDeviceGetConfComputeGpuAttestationReport(device, nonce)
    certificates = nvml.nvmlDeviceGetConfComputeGpuCertificate(device)
    table = {
        "arch": architecture,
        "certificate": _base64(certificates.attestationCertChain, certificates.attestationCertChainSize),
        "evidence": _base64(answer.attestationReport, answer.attestationReportSize),
        "nonce": nonce.hex(),
        "version": "1.0",
    }
    blob = json.dumps(table, sort_keys=True).encode()
    try:
        nvidia_report.parse(blob)
    except VerificationError as exc:
        raise RunError(f"gave something unusable: {exc}", where=where) from exc
    return Evidence(type=TYPE, blob=blob)


def _base64(buffer: Any, size: int) -> str:
    return base64.b64encode(bytes(buffer)[:size]).decode()
