"""Reading what evidence says: the same registers as a verifier's, without believing any of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cloister.attest.backends.simulated import InsecureSimulatedAttester
from cloister.attest.evidence import Evidence
from cloister.attest.policy import AppraisalPolicy
from cloister.attest.rules import RuleTables, TpmRules
from cloister.attest.unverified import describe
from cloister.attest.verify import inspect
from cloister.errors import VerificationError
from tests.attest_ca import dcap_ca, snp_ca, tpm_ca
from tests.attest_ca.azure_vm import AzureVm
from tests.attest_ca.nitro_ca import PCRS, NitroCa
from tests.attest_ca.nvidia_ca import MEASUREMENTS, NvidiaCa

ENROLLED = tpm_ca.name_of(tpm_ca.ecc_public(tpm_ca.AK)).hex()
POLICY = AppraisalPolicy(
    accept=("tdx", "sgx", "sev-snp", "tpm", "nitro", "azure-vtpm", "nvidia-gpu", "simulated"),
    insecure_simulated=True,
    any_measurement=True,
    rules=RuleTables(tpm=TpmRules(attestation_keys=(ENROLLED,))),
)


def evidence(kind: str) -> Evidence:
    if kind == "sev-snp":
        return snp_ca.SnpCa().evidence()
    if kind == "tpm":
        return tpm_ca.quote({n: bytes([n]) * 32 for n in range(16)})
    ca = dcap_ca.shared_ca()
    return ca.tdx() if kind == "tdx" else ca.sgx()


@pytest.mark.parametrize("kind", ["tdx", "sgx", "sev-snp", "tpm"])
def test_it_says_what_a_verifier_finds(kind: str) -> None:
    shown = evidence(kind)
    roots = replace(dcap_ca.shared_ca().roots, amd=snp_ca.SnpCa().roots.amd)
    claims = inspect(shown, POLICY, None, dcap_ca.NOW, roots=roots)
    said = describe(shown)
    assert {name: value.hex() for name, value in said.registers.items()} == dict(claims.registers)
    assert said.report_data.hex() == claims.report_data
    assert said.details


def test_it_says_what_a_verifier_finds_in_documents() -> None:
    nitro, azure = NitroCa(), AzureVm(snp_ca.SnpCa())
    simulation = InsecureSimulatedAttester(measurement=b"m" * 32, clock=lambda: dcap_ca.NOW)
    for shown, roots in (
        (nitro.evidence(), nitro.roots),
        (azure.evidence(), azure.ca.roots),
        (simulation.collect(bytes(64)), None),
    ):
        claims, said = inspect(shown, POLICY, None, dcap_ca.NOW, roots=roots), describe(shown)
        assert {name: value.hex() for name, value in said.registers.items()} == dict(claims.registers), shown.type
        assert said.report_data.hex() == claims.report_data
        assert said.details


def test_it_says_what_a_gpu_measured() -> None:
    ca = NvidiaCa()
    shown = ca.evidence(ca.make_gpu())
    claims, said = inspect(shown, POLICY, None, dcap_ca.NOW, roots=ca.roots), describe(shown)
    assert dict(said.registers) == {f"measurement_{index}": value for index, value in MEASUREMENTS.items()}
    assert said.report_data.hex() == claims.report_data
    assert said.details["driver"] == "590.12"


def test_it_says_that_a_nitro_enclave_is_debugged() -> None:
    debugged = NitroCa().evidence(pcrs=dict.fromkeys(PCRS, bytes(48)))
    assert describe(debugged).details["debug"] == "ON"
    assert describe(NitroCa().evidence()).details["debug"] == "off"


def test_evidence_of_another_type_than_its_envelope_says() -> None:
    for kind, label in (("tdx", "sgx"), ("sgx", "tdx"), ("tpm", "sev-snp")):
        with pytest.raises(VerificationError) as refused:
            describe(replace(evidence(kind), type=label))
        assert refused.value.code == "evidence-format"
    with pytest.raises(VerificationError, match="not known"):
        describe(replace(evidence("tdx"), type="abacus"))
