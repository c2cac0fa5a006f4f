"""Attacks on what a relying party accepts: foreign roots (7), confused types (8), policies (15), receipts (17).

All go through the production verifier; where no vendor's sample exists, a test CA stands in the vendor's place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from cloister.agreement.receipt import COUNTERSIGN_LABEL, Receipt, countersign_message, verify_receipt
from cloister.attest.backends.simulated import InsecureSimulatedAttester
from cloister.attest.evidence import Evidence
from cloister.attest.policy import AppraisalPolicy
from cloister.attest.roots import TrustRoots, vendor_roots
from cloister.attest.rules import GpuRules, RuleTables, TpmRules
from cloister.attest.verify import DEVICE_VERIFIERS, VERIFIERS, inspect, verify
from cloister.enclave.core import EnclaveCore
from cloister.errors import JobError, VerificationError
from cloister.methods.verify import verify_run
from cloister.party.client import PartyClient, Results
from tests.attest_ca import dcap_ca, snp_ca, tpm_ca
from tests.attest_ca.dcap_ca import DcapCa, tdx_body
from tests.evidence import needs_evidence, sample
from tests.unit.enclave.stage import ADAPTER, MEASUREMENT, NOW, Stage, canonical_job, claims_of

AT = dcap_ca.NOW
REPORT_DATA = bytes(range(64))
ENROLLED = tpm_ca.name_of(tpm_ca.ecc_public(tpm_ca.AK)).hex()
RULES = RuleTables(tpm=TpmRules(attestation_keys=(ENROLLED,)), nvidia_gpu=GpuRules(count=0))
TYPES = tuple(VERIFIERS)
LENIENT = AppraisalPolicy(accept=TYPES, insecure_simulated=True, any_measurement=True, rules=RULES)
"""Everything that a policy can accept at once: what it refuses, no policy accepts."""


@cache
def snp() -> snp_ca.SnpCa:
    return snp_ca.SnpCa()


def roots() -> TrustRoots:
    """Both test CAs in place of Intel and AMD."""
    return replace(dcap_ca.shared_ca().roots, amd=snp().roots.amd)


@cache
def made() -> dict[str, Evidence]:
    """Evidence that the test CAs vouch for, bound to REPORT_DATA; and simulated evidence."""
    simulated = InsecureSimulatedAttester(measurement=MEASUREMENT, clock=lambda: float(AT))
    return {
        "tdx": dcap_ca.shared_ca().tdx(),
        "sgx": dcap_ca.shared_ca().sgx(),
        "sev-snp": snp().evidence(crl=snp().crl()),
        "tpm": tpm_ca.quote({n: bytes(32) for n in range(16)}),
        "simulated": simulated.collect(REPORT_DATA),
    }


def code(evidence: Evidence, policy: AppraisalPolicy = LENIENT, **more: Any) -> str:
    arguments: dict[str, Any] = {"allow_simulated": True, "roots": roots()} | more
    with pytest.raises(VerificationError) as refused:
        verify(evidence, policy, REPORT_DATA, AT, **arguments)
    return refused.value.code


@pytest.mark.parametrize("kind", made())
def test_without_an_attack_each_is_accepted(kind: str) -> None:
    assert verify(made()[kind], LENIENT, REPORT_DATA, AT, allow_simulated=True, roots=roots()).type == kind


# 7. Foreign roots -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tdx", "sgx", "sev-snp"])
def test_7_test_cas_under_the_vendors_own_roots(kind: str) -> None:
    """`roots` has no other default than the vendors', and no policy can name one."""
    assert code(made()[kind], roots=None) == "chain"


@pytest.mark.parametrize("kind", ["tdx", "sgx", "sev-snp"])
def test_7_another_vendors_root(kind: str) -> None:
    """A root that somebody trusts for something else is no root here."""
    real = vendor_roots()
    exchanged = replace(real, intel=real.aws, amd={line: replace(c, root=real.intel) for line, c in real.amd.items()})
    assert code(made()[kind], roots=exchanged) == "chain"


def test_7_a_software_tpm_that_nobody_enrolled() -> None:
    """swtpm makes genuine quotes; what makes a TPM one is that its key is in the policy."""
    assert code(made()["tpm"], replace(LENIENT, rules=RuleTables())) == "attestation-key"
    other = tpm_ca.quote({n: bytes(32) for n in range(16)}, key=tpm_ca.RSA_AK)
    assert code(other) == "attestation-key"


def test_7_simulated_evidence_under_a_production_policy() -> None:
    production = AppraisalPolicy(accept=tuple(t for t in TYPES if t != "simulated"), any_measurement=True, rules=RULES)
    assert code(made()["simulated"], production) == "type"
    assert code(made()["simulated"], allow_simulated=False) == "simulated"
    with pytest.raises(ValueError, match="insecure_simulated"):
        AppraisalPolicy(accept=("tdx", "simulated"))
    with pytest.raises(JobError, match="insecure_simulated"):
        AppraisalPolicy.from_toml('[policy]\naccept = ["tdx", "simulated"]\n')


@pytest.mark.parametrize("key", ["roots", "root", "trust", "allow_debug", "debug"])
def test_7_no_policy_names_a_root_or_allows_debugging(key: str) -> None:
    for section in ("policy", "tdx", "sgx", "sev-snp", "tpm", "nvidia-gpu"):
        text = '[policy]\naccept = ["tdx"]\n' + ("" if section == "policy" else f"[{section}]\n") + f"{key} = true\n"
        with pytest.raises(JobError):
            AppraisalPolicy.from_toml(text)


# 8. Confused types ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", made())
@pytest.mark.parametrize("label", [*TYPES, *DEVICE_VERIFIERS])
def test_8_evidence_in_another_types_envelope(kind: str, label: str) -> None:
    if label == kind:
        return
    evidence = replace(made()[kind], type=label)
    assert code(evidence) in ("evidence-format", "type", "collateral")
    with pytest.raises(VerificationError):
        inspect(evidence, replace(LENIENT, accept=(*TYPES, *DEVICE_VERIFIERS)), None, AT, roots=roots())


@needs_evidence
@pytest.mark.parametrize("label", [*TYPES, *DEVICE_VERIFIERS])
@pytest.mark.parametrize(
    ("kind", "name", "at"),
    [
        ("tdx", "tdx/tdx_quote", 1_751_000_000), ("sgx", "sgx/sgx_quote", 1_751_000_000),
        ("sev-snp", "snp/milan_report.bin", 1_765_000_000), ("nitro", "nitro/nitro_prod_2025.cbor", 1_766_678_700),
        ("azure-vtpm", "azure/az_snp_vtpm.json", 1_765_000_000),
        ("nvidia-gpu", "nvidia/hopper_gpu_evidence.json", 1_765_000_000),
    ],
)  # fmt: skip
def test_8_a_vendors_sample_in_another_types_envelope(kind: str, name: str, at: int, label: str) -> None:
    if label == kind:
        return
    everything = replace(LENIENT, accept=(*TYPES, *DEVICE_VERIFIERS))
    with pytest.raises(VerificationError):
        inspect(Evidence(type=label, blob=sample(name)), everything, None, at)


def test_8_a_gpu_alone_opens_no_session() -> None:
    gpu = Evidence(type="nvidia-gpu", blob=b"anything")
    assert code(gpu, AppraisalPolicy(accept=("nvidia-gpu",), any_measurement=True)) == "type"


def test_8_reference_values_of_another_type_do_not_count() -> None:
    """A register that happens to be equal under another type's name accepts nothing."""
    genuine = verify(made()["tdx"], LENIENT, REPORT_DATA, AT, roots=roots())
    text = f"""
        [policy]
        accept = ["tdx"]
        [[measurement]]
        label = "of another type"
        type = "sgx"
        registers = {{ mr_td = "{genuine.registers["mr_td"]}" }}
    """
    assert code(made()["tdx"], AppraisalPolicy.from_toml(text)) == "measurement"
    right = AppraisalPolicy.from_toml(text.replace('"sgx"', '"tdx"'))
    assert verify(made()["tdx"], right, REPORT_DATA, AT, roots=roots()).measurement_label == "of another type"


# 15. Policies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", made())
def test_15_an_empty_policy_denies_everything(kind: str) -> None:
    assert code(made()[kind], AppraisalPolicy()) == "type"
    assert code(made()[kind], AppraisalPolicy.from_toml("[policy]\naccept = []\n")) == "type"


@pytest.mark.parametrize("kind", made())
def test_15_an_accepted_type_without_a_listed_measurement(kind: str) -> None:
    assert code(made()[kind], replace(LENIENT, any_measurement=False)) == "measurement"


@pytest.mark.parametrize("kind", ["tdx", "sgx", "sev-snp"])
@pytest.mark.parametrize("collateral", [b"", b"{}", b"\x00", b"[]"])
def test_15_missing_or_empty_collateral_fails_closed(kind: str, collateral: bytes) -> None:
    assert code(replace(made()[kind], collateral=collateral)) in ("collateral", "evidence-format")


def test_15_a_gpu_that_the_policy_wants_is_missing() -> None:
    wants = replace(LENIENT, rules=RULES.model_copy(update={"nvidia_gpu": GpuRules(count=1)}))
    assert code(made()["tdx"], wants) == "devices"


def test_15_a_policy_that_is_changed_is_another_policy() -> None:
    """Its hash is in job and manifest: every rule counts, not only the measurements."""
    texts = ['accept = ["tdx"]', 'accept = ["tdx"]\nmax_age_s = 301', 'accept = ["tdx", "sgx"]']
    rules = ["", '[tdx]\nstatuses = ["OutOfDate"]', '[tdx]\nadvisories = ["INTEL-SA-00001"]', "[sev-snp]\nvlek = false"]
    hashes = {AppraisalPolicy.from_toml(f"[policy]\n{t}\n{r}\n").sha256 for t in texts for r in rules}
    assert len(hashes) == len(texts) * len(rules)


# Jobs and receipts with a TDX enclave ---------------------------------------------------------------------------------

TDX_POLICY = AppraisalPolicy.from_toml(
    f"""
    [policy]
    accept = ["tdx"]
    [[measurement]]
    label = "the program"
    type = "tdx"
    registers = {{ mr_td = "{"11" * 48}", rtmr1 = "{"a1" * 48}" }}
    """
)
DAY = 86_400


class TdVm:
    """An attester whose evidence comes with its collateral, as receipts need it."""

    type = "tdx"

    def __init__(self, ca: DcapCa) -> None:
        self.ca = ca

    def collect(self, report_data: bytes) -> Evidence:
        return self.ca.tdx(body=tdx_body(report_data=report_data))


class TdxStage(Stage):
    """A job whose parties accept one TDX program and nothing simulated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.canonical = canonical_job(self.keys, policy=TDX_POLICY)
        self.job_id = hashlib.sha256(self.canonical).hexdigest()
        for name in self.names:
            self.seal(name, f"secret of {name}".encode())

    def client(self, party: str, **changes: Any) -> PartyClient:
        return super().client(party, **{"policy": TDX_POLICY, "allow_simulated": False, **changes})


@pytest.fixture(scope="module")
def ca() -> DcapCa:
    return DcapCa(now=NOW)


@pytest.fixture
def trusted(ca: DcapCa, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test CA in Intel's place for everything in this process."""
    monkeypatch.setattr("cloister.attest.verify.vendor_roots", lambda: ca.roots)


def tdx_core(stage: Stage, ca: DcapCa) -> EnclaveCore:
    source = TdVm(ca)
    return stage.enclave(attester=source, claims=claims_of(source, TDX_POLICY))


@pytest.fixture
def honest(tmp_path: Path, ca: DcapCa, trusted: None) -> tuple[TdxStage, Receipt]:
    stage = TdxStage(tmp_path)
    results = stage.perform(tdx_core(stage, ca))["north"]
    assert isinstance(results, Results), results
    return stage, results.receipt


def failed(receipt: Receipt, policy: AppraisalPolicy = TDX_POLICY, *, allow_simulated: bool = False) -> list[str]:
    verdict = verify_receipt(receipt.to_bytes(), policy=policy, adapter_sha256=None, allow_simulated=allow_simulated)
    return [check.name for check in verdict.checks if not check.passed]


def countersigned(stage: Stage, receipt: Receipt, at: Callable[[str], int]) -> Receipt:
    """All parties sign, each with a time of its own."""
    signatures = {
        name: (at(name), key.sign(COUNTERSIGN_LABEL, countersign_message(receipt, at(name))))
        for name, key in stage.keys.items()
    }
    return replace(receipt, countersignatures=signatures)


def test_17_a_receipt_says_when_it_was_valid_and_who_says_so(honest: tuple[TdxStage, Receipt]) -> None:
    """Its collateral has expired long ago when somebody checks it: the time of the countersignatures counts."""
    _, receipt = honest
    verdict = verify_receipt(receipt.to_bytes(), policy=TDX_POLICY, adapter_sha256=None, allow_simulated=False)
    assert verdict.passed, [check for check in verdict.checks if not check.passed]
    assert verdict.claims is not None
    assert (verdict.claims.verified_at, verdict.claims.confidential) == (NOW, True)
    assert verdict.checks[-1].reason == "valid at 2027-01-15 08:00:00 UTC, vouched for by north, south"


def test_17_vouched_for_after_the_collateral_had_expired(honest: tuple[TdxStage, Receipt]) -> None:
    stage, receipt = honest
    assert failed(countersigned(stage, receipt, lambda name: NOW + 29 * DAY)) == []
    assert failed(countersigned(stage, receipt, lambda name: NOW + 31 * DAY)) == ["evidence"]


def test_17_backdated(honest: tuple[TdxStage, Receipt]) -> None:
    """Dated to before the end of the run, by all or by one party; or by whoever holds no key."""
    stage, receipt = honest
    assert failed(countersigned(stage, receipt, lambda name: NOW - 3600)) == ["countersignatures"]
    one = {"north": NOW - 3600, "south": NOW + DAY}
    assert failed(countersigned(stage, receipt, one.__getitem__)) == ["countersignatures"]
    moved = {n: (at - 1, signature) for n, (at, signature) in receipt.countersignatures.items()}
    assert failed(replace(receipt, countersignatures=moved)) == ["countersignatures"]


def test_17_collateral_exchanged_or_left_out_afterwards(honest: tuple[TdxStage, Receipt], ca: DcapCa) -> None:
    """Parties vouch for the evidence with all that stands beside it."""
    _, receipt = honest
    evidence = Evidence.from_bytes(receipt.instance.evidence)
    for collateral, steps in ((b"", ["evidence", "countersignatures"]), (ca.collateral("tdx"), ["countersignatures"])):
        other = replace(evidence, collateral=collateral).to_bytes()
        assert failed(replace(receipt, instance=replace(receipt.instance, evidence=other))) == steps


def test_17_internally_consistent_but_simulated(tmp_path: Path) -> None:
    """A whole run that never saw a TEE: every signature holds, and no production policy accepts it."""
    stage = Stage(tmp_path)
    results = stage.perform(stage.enclave())["north"]
    assert isinstance(results, Results)
    for allow_simulated in (True, False):
        assert failed(results.receipt, allow_simulated=allow_simulated) == ["evidence"]


def test_17_evidence_of_another_instance(honest: tuple[TdxStage, Receipt], tmp_path: Path, ca: DcapCa) -> None:
    stage, receipt = honest
    (tmp_path / "other").mkdir()
    other_stage = TdxStage(tmp_path / "other")
    other = other_stage.perform(tdx_core(other_stage, ca))["north"]
    assert isinstance(other, Results)
    swapped = replace(receipt, instance=replace(receipt.instance, evidence=other.receipt.instance.evidence))
    assert failed(countersigned(stage, swapped, lambda name: NOW)) == ["evidence"]


def test_17_adapter_or_configuration_swapped(honest: tuple[TdxStage, Receipt], tmp_path: Path) -> None:
    _, receipt = honest
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    (folder / "receipt.json").write_bytes(receipt.to_bytes())
    (tmp_path / "mine.toml").write_text(policy_text())
    for name in ADAPTER:
        for file, content in ADAPTER.items():
            (folder / "adapter" / file).write_bytes(content)
        assert verify_run(folder, policy=tmp_path / "mine.toml", insecure_simulated=False).verdict == "verified"
        (folder / "adapter" / name).write_bytes(ADAPTER[name] + b" ")
        report = verify_run(folder, policy=tmp_path / "mine.toml", insecure_simulated=False)
        assert [c.name for c in report.checks if c.status == "failed"] == ["adapter"]


def policy_text() -> str:
    (value,) = TDX_POLICY.reference_values
    registers = ", ".join(f'{name} = "{register.hex()}"' for name, register in value.registers.items())
    return (
        '[policy]\naccept = ["tdx"]\n[[measurement]]\n'
        f'label = "{value.label}"\ntype = "tdx"\nregisters = {{ {registers} }}\n'
    )


@pytest.mark.parametrize("insecure_simulated", [True, False])
def test_17_a_policy_in_the_run_folder_is_ignored(
    honest: tuple[TdxStage, Receipt], tmp_path: Path, insecure_simulated: bool
) -> None:
    """It would accept the run; the verifier has none, or one that does not."""
    _, receipt = honest
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "receipt.json").write_bytes(receipt.to_bytes())
    (folder / "policy.toml").write_text(policy_text())
    none = verify_run(folder, policy=None, insecure_simulated=insecure_simulated)
    assert (none.verdict, none.policy, none.attestation) == ("integrity only, origin not verified", "none", None)
    (tmp_path / "mine.toml").write_text(policy_text().replace("11" * 48, "12" * 48))
    mine = verify_run(folder, policy=tmp_path / "mine.toml", insecure_simulated=insecure_simulated)
    assert (mine.verdict, [c.name for c in mine.checks if c.status == "failed"]) == ("refused", ["evidence"])
    (tmp_path / "mine.toml").write_text(policy_text())
    right = verify_run(folder, policy=tmp_path / "mine.toml", insecure_simulated=insecure_simulated)
    assert (right.verdict, right.attestation is not None) == ("verified", True)


# A party that is offered too little -----------------------------------------------------------------------------------


class TpmMachine:
    """Measured by a TPM, and readable by its operator."""

    type = "tpm"

    def collect(self, report_data: bytes) -> Evidence:
        message = hashlib.sha256(report_data).digest()
        return tpm_ca.quote({n: bytes(32) for n in range(16)}, extra_data=message)


def test_15_a_machine_that_hides_nothing_gets_no_data(tmp_path: Path) -> None:
    """The policy lists it, and still the party releases nothing across machines without the explicit flag."""
    policy = AppraisalPolicy(accept=("tpm",), any_measurement=True, rules=RULES)
    source = TpmMachine()
    stage = Stage(tmp_path)
    core = stage.enclave(attester=source, claims=claims_of(source, policy))
    asked: list[str] = []

    class Wire:
        def request(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
            asked.append(method)
            return core.handle("north", method, body)

    client = stage.client("north", policy=policy, allow_simulated=False)
    with pytest.raises(VerificationError) as refused:
        client.verify_instance(Wire())
    assert (refused.value.code, asked) == ("confidential", ["instance"])
    allowed = stage.client("north", policy=policy, allow_simulated=False, allow_not_confidential=True)
    assert not allowed.verify_instance(Wire()).claims.confidential


def test_15_a_manifest_that_the_parties_did_not_sign(honest: tuple[TdxStage, Receipt]) -> None:
    _, receipt = honest
    body = json.loads(receipt.body)
    changes: tuple[dict[str, Any], ...] = (
        {"manifest_signatures": {}},
        {"manifest_signatures": {**body["manifest_signatures"], "north": "00" * 64}},
        {"manifest": body["manifest"].replace(body["manifest"][-8:], "00000000")},
    )
    for change in changes:
        altered = json.dumps(body | change, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        assert "manifest" in failed(replace(receipt, body=altered))
