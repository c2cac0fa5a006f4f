"""Collecting GPU evidence, with a stand-in for NVIDIA's driver that has the structures of pynvml itself."""

from __future__ import annotations

import base64
import ctypes
import dataclasses
import json
import sys
from collections.abc import Iterable
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.attest.backends.nvml import WithGpus, collect_gpus
from cloister.attest.binding import device_nonce
from cloister.attest.evidence import Evidence
from cloister.attest.policy import AppraisalPolicy
from cloister.attest.rules import GpuRules, RuleTables
from cloister.attest.verify import verify
from cloister.errors import RunError, UsageError
from tests.attest_ca.nitro_ca import NOW, REPORT_DATA, NitroCa
from tests.attest_ca.nvidia_ca import NONCE, Gpu, NvidiaCa

pynvml: Any = pytest.importorskip("pynvml", reason="install the extra: pip install 'cloister[gpu]'")


class FakeNvml:
    """A driver with the given GPUs and mode. Everything it does not do itself is pynvml's own."""

    def __init__(
        self,
        ca: NvidiaCa | None = None,
        gpus: Iterable[Gpu] = (),
        *,
        environment: int = 2,
        feature: int = 1,
        dev_tools: int = 0,
        multi: int = 0,
        status: int = 0,
        architecture: int = 9,
        report: bytes | None = None,
    ) -> None:
        self.ca, self.gpus = ca, list(gpus)
        self.mode = {
            "environment": environment,
            "ccFeature": feature,
            "devToolsMode": dev_tools,
            "multiGpuMode": multi,
        }
        self.status, self.architecture, self.report = status, architecture, report
        self.open = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("nvml"):
            raise AssertionError(f"{name} would ask a real driver")
        return getattr(pynvml, name)

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetConfComputeSettings(self, pointer: Any) -> int:
        settings = pointer._obj
        assert settings.version == pynvml.nvmlSystemConfComputeSettings_v1
        for name, value in self.mode.items():
            setattr(settings, name, value)
        return self.status

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetArchitecture(self, device: int) -> int:
        return self.architecture

    def nvmlDeviceGetConfComputeGpuAttestationReport(self, device: int, nonce: bytes) -> Any:
        assert self.ca
        table = json.loads(self.ca.evidence(self.gpus[device], nonce=nonce).blob)[0]
        report = base64.b64decode(table["evidence"]) if self.report is None else self.report
        answer = pynvml.c_nvmlConfComputeGpuAttestationReport_t()
        ctypes.memmove(answer.attestationReport, report, len(report))
        answer.attestationReportSize = len(report)
        return answer

    def nvmlDeviceGetConfComputeGpuCertificate(self, device: int) -> Any:
        assert self.ca
        chain = self.ca.chain(self.gpus[device])
        pem = b"".join(c.certificate.public_bytes(Encoding.PEM) for c in chain)
        answer = pynvml.c_nvmlConfComputeGpuCertificate_t()
        ctypes.memmove(answer.attestationCertChain, pem, len(pem))
        answer.attestationCertChainSize = len(pem)
        return answer


class Machine:
    """An attester of a test CA."""

    type = "nitro"

    def __init__(self) -> None:
        self.ca = NitroCa()

    def collect(self, report_data: bytes) -> Evidence:
        return self.ca.evidence(user_data=report_data)


@pytest.fixture(scope="module")
def ca() -> NvidiaCa:
    return NvidiaCa()


def test_collected_evidence_verifies_together_with_the_machines(ca: NvidiaCa) -> None:
    machine, nvml = Machine(), FakeNvml(ca, [ca.gpu, ca.make_gpu()])
    attester = WithGpus(machine, nvml=nvml)
    evidence = attester.collect(REPORT_DATA)
    rules = RuleTables(nvidia_gpu=GpuRules(count=2))
    policy = AppraisalPolicy(accept=("nitro",), any_measurement=True, rules=rules)
    roots = dataclasses.replace(machine.ca.roots, nvidia=ca.root.certificate)
    claims = verify(evidence, policy, REPORT_DATA, NOW + 5, roots=roots)
    assert (attester.type, len(claims.devices), nvml.open) == ("nitro", 2, 0)
    assert json.loads(evidence.devices[0].blob)["nonce"] == device_nonce(REPORT_DATA).hex()


def test_protected_pcie_is_confidential_as_well(ca: NvidiaCa) -> None:
    assert len(collect_gpus(NONCE, nvml=FakeNvml(ca, [ca.gpu], feature=0, multi=1))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dev_tools": 1}, "developer tools"),
        ({"dev_tools": 7}, "developer tools"),
        ({"environment": 1}, "not of production"),
        ({"environment": 0}, "not of production"),
        ({"feature": 0}, "is off"),
        ({"feature": 0, "multi": 2}, "is off"),
        ({"status": 3}, "does not tell"),
        ({"architecture": 7}, "no confidential computing"),
        ({"report": b"x"}, "unusable"),
    ],
)
def test_gpus_that_do_not_hide_their_memory(ca: NvidiaCa, options: dict[str, Any], message: str) -> None:
    nvml = FakeNvml(ca, [ca.gpu], **options)
    with pytest.raises(RunError, match=message):
        collect_gpus(NONCE, nvml=nvml)
    assert nvml.open == 0


@pytest.mark.parametrize("count", [0, 17])
def test_numbers_of_gpus(ca: NvidiaCa, count: int) -> None:
    with pytest.raises(RunError, match=f"{count} GPUs"):
        collect_gpus(NONCE, nvml=FakeNvml(ca, [ca.gpu] * count))


def test_a_drivers_error_is_told(ca: NvidiaCa, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FakeNvml) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(FakeNvml, "nvmlDeviceGetCount", fail)
    with pytest.raises(RunError, match="Not Supported"):
        collect_gpus(NONCE, nvml=FakeNvml(ca, [ca.gpu]))


def test_no_driver_here() -> None:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        with pytest.raises(RunError, match="driver refuses"):
            collect_gpus(NONCE)
    else:
        pynvml.nvmlShutdown()
        pytest.skip("this machine has NVIDIA's driver")


def test_the_package_is_named_if_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(UsageError, match="nvidia-ml-py") as caught:
        collect_gpus(NONCE)
    assert "cloister[gpu]" in caught.value.hint


def test_a_nonce_has_32_bytes() -> None:
    with pytest.raises(ValueError, match="32"):
        collect_gpus(b"short")
