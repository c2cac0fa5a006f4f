"""Policies: strict TOML, default deny, canonical bytes."""

import dataclasses
from pathlib import Path

import pytest

from cloister.attest.policy import MAX_POLICY_BYTES, AppraisalPolicy
from cloister.errors import JobError

GOOD = """
[policy]
accept = ["tdx", "simulated"]
insecure_simulated = true
max_age_s = 60

[[measurement]]
label = "cloister 0.1"
type = "tdx"
registers = { mr_td = "AABBCCDDEEFF00112233445566778899", rtmr1 = "00112233445566778899aabbccddeeff" }
"""


def test_parse() -> None:
    policy = AppraisalPolicy.from_toml(GOOD)
    assert (policy.accept, policy.max_age_s, policy.any_measurement) == (("tdx", "simulated"), 60, False)
    assert policy.reference_values[0].registers["mr_td"].hex() == "aabbccddeeff00112233445566778899"


def test_defaults_deny() -> None:
    policy = AppraisalPolicy.from_toml('[policy]\naccept = ["tdx"]\n')
    assert (policy.insecure_simulated, policy.any_measurement, policy.reference_values) == (False, False, ())
    assert AppraisalPolicy().accept == ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.accept = ("x",)  # type: ignore[misc]  # the point of the test


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("", "[policy]", "missing"),
        ("[policy", "p.toml", "TOML"),
        ("[policy]\n", "policy.accept", "missing"),
        ("[policy]\naccept = []\nacept = 1", "[policy]", "unknown key 'acept'"),
        ("[policy]\naccept = []\n[other]", "p.toml", "unknown key 'other'"),
        ('[policy]\naccept = "tdx"', "policy.accept", "list"),
        ('[policy]\naccept = ["T D X"]', "policy.accept", "words"),
        ("[policy]\naccept = [1]", "policy.accept", "words"),
        ('[policy]\naccept = ["simulated"]', "[policy]", "insecure_simulated"),
        ('[policy]\naccept = []\ninsecure_simulated = "true"', "policy.insecure_simulated", "bool"),
        ("[policy]\naccept = []\nmax_age_s = true", "policy.max_age_s", "int"),
        ("[policy]\naccept = []\nmax_age_s = 0", "[policy]", "max_age_s"),
        ("[policy]\naccept = []\nmax_age_s = 99999999999999999999", "[policy]", "max_age_s"),  # found by fuzzing
        ('[policy]\naccept = []\nmeasurements = "none"', "policy.measurements", "any"),
        ("[policy]\naccept = []\nmeasurements = true", "policy.measurements", "any"),
        ("[policy]\naccept = []\n[[measurement]]", "measurement 1.registers", "missing"),
        ('[policy]\naccept = []\n[[measurement]]\nlabel="a"\ntype="tdx"\nregisters={}', "registers", "at least one"),
        ('[policy]\naccept = []\n[[measurement]]\nlabel="a"\ntype="tdx"\nregisters={a="0"}', "registers.a", "hex"),
        (
            '[policy]\naccept = []\n[[measurement]]\nlabel="a"\ntype="azure-vtpm"\nregisters={pcr4="00"}',
            "[policy]",
            "must name snp_id_key_digest or snp_measurement",
        ),
        ('[policy]\naccept = []\n[tdx]\nstatuses = ["Revoked"]', "[tdx] statuses.0", "Input should be"),
        ("[policy]\naccept = []\n[tdx]\nstatus = []", "[tdx] status", "unknown key"),
        ("[policy]\naccept = []\n[sev-snp.min_tcb]\nsnp = 256", "[sev-snp] min_tcb.snp", "less than"),
        ('[policy]\naccept = []\n[nvidia-gpu]\ncount = "8"', "[nvidia-gpu] count", "integer"),
        ('[policy]\naccept = []\n[[measurement]]\nlabel="a"\ntype="tdx"\nregisters={a=1}', "registers.a", "hex"),
        ("[policy]\naccept = []\n[[measurement]]\nlable=1", "measurement 1", "unknown key 'lable'"),
        (GOOD.replace("max_age_s = 60", 'measurements = "any"'), "[policy]", "exclude"),
        (GOOD.replace('type = "tdx"', "type = 5"), "measurement 1.type", "words"),
        (GOOD.replace('label = "cloister 0.1"\n', ""), "measurement 1.label", "missing"),
    ],
)
def test_errors_name_the_field(text: str, where: str, message: str) -> None:
    with pytest.raises(JobError, match=message) as refused:
        AppraisalPolicy.from_toml(text, where="p.toml")
    assert refused.value.where.startswith("p.toml")
    assert where in refused.value.where


def test_load(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(GOOD)
    assert AppraisalPolicy.load(path) == AppraisalPolicy.from_toml(GOOD)
    with pytest.raises(JobError, match="cannot read"):
        AppraisalPolicy.load(tmp_path / "absent")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(JobError, match="UTF-8"):
        AppraisalPolicy.load(path)
    path.write_bytes(b"#" * (MAX_POLICY_BYTES + 1))
    with pytest.raises(JobError, match="longer"):
        AppraisalPolicy.load(path)


def test_canonical_bytes_depend_on_meaning_only() -> None:
    policy = AppraisalPolicy.from_toml(GOOD)
    same = (
        GOOD.replace('["tdx", "simulated"]', '["simulated", "tdx", "tdx"]').replace("AABB", "aabb") + "\n# a comment\n"
    )
    assert AppraisalPolicy.from_toml(same).sha256 == policy.sha256
    others = {
        AppraisalPolicy.from_toml(GOOD.replace(old, new)).sha256
        for old, new in (
            ("= 60", "= 61"),
            ("AABB", "AABC"),
            ('type = "tdx"', 'type = "sgx"'),
            ("rtmr1", "rtmr2"),
            ('"tdx", ', ""),
            ("0.1", "0.2"),
        )
    }
    assert len(others | {policy.sha256}) == 7


def test_insecure_simulated_only() -> None:
    listed = AppraisalPolicy.insecure_simulated_only(b"m" * 32)
    assert (listed.any_measurement, listed.reference_values[0].registers["source"]) == (False, b"m" * 32)
    assert AppraisalPolicy.insecure_simulated_only().any_measurement
