"""TDX and SGX quotes: genuine ones at their own time, a test CA's under every rule, and malformed ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import dcap_qvl
import pytest

from cloister.attest.backends import dcap_quote, event_log
from cloister.attest.checks import Checks
from cloister.attest.claims import Claims
from cloister.attest.evidence import MAX_COLLATERAL_BYTES, Evidence
from cloister.attest.policy import AppraisalPolicy
from cloister.attest.roots import TrustRoots
from cloister.attest.rules import DcapRules, RuleTables, SgxRules, TcbStatus
from cloister.attest.verify import inspect, verify
from cloister.errors import VerificationError
from tests.attest_ca.dcap_ca import (
    NOW,
    REPORT_DATA,
    RTMRS,
    SEPT_VE_DISABLE,
    DcapCa,
    pem,
    sgx_body,
    shared_ca,
    tdx_body,
)
from tests.evidence import needs_evidence, sample

CA = shared_ca()
TDX_TIME, GCP_TIME, SGX_TIME = 1_750_400_000, 1_771_500_000, 1_750_400_000
SGX_OPT_IN = SgxRules(statuses=("ConfigurationAndSWHardeningNeeded",), advisories=("INTEL-SA-00289", "INTEL-SA-00615"))


def policy(tee: str, rules: DcapRules | None = None) -> AppraisalPolicy:
    tables = RuleTables() if rules is None else RuleTables(**{tee: rules})  # type: ignore[arg-type]  # by name
    return AppraisalPolicy(accept=(tee,), any_measurement=True, rules=tables)


def judge(
    evidence: Evidence,
    rules: DcapRules | None = None,
    *,
    now: float = NOW,
    roots: TrustRoots | None = CA.roots,
    checks: Checks | None = None,
) -> Claims:
    return verify(evidence, policy(evidence.type, rules), REPORT_DATA, now, roots=roots, checks=checks)


def refused(evidence: Evidence, rules: DcapRules | None = None, **how: Any) -> VerificationError:
    with pytest.raises(VerificationError) as error:
        judge(evidence, rules, **how)
    return error.value


def genuine(tee: str, quote: str, collateral: str, now: float, rules: DcapRules | None = None) -> Claims:
    """A real quote: bound to whatever its machine had in mind."""
    evidence = Evidence(type=tee, blob=sample(quote), collateral=sample(collateral) if collateral else b"")
    return inspect(evidence, policy(tee, rules), None, now)


# Genuine evidence -----------------------------------------------------------------------------------------------------


@needs_evidence
@pytest.mark.parametrize(
    ("quote", "collateral", "now"),
    [
        ("tdx/tdx_quote", "tdx/tdx_quote_collateral.json", TDX_TIME),
        ("tdx/tdx_quote_v5_gcp.dat", "tdx/tdx_quote_outdated_collateral.json", GCP_TIME),
    ],
)
def test_genuine_tdx_quotes(quote: str, collateral: str, now: float) -> None:
    claims = genuine("tdx", quote, collateral, now)
    report: Any = dcap_qvl.parse_quote(sample(quote)).report  # the oracle: another parser
    assert claims.registers == {
        "mr_td": report.mr_td.hex(),
        **{f"rtmr{i}": getattr(report, f"rt_mr{i}").hex() for i in range(4)},
        "mr_config_id": report.mr_config_id.hex(),
        "mr_owner": report.mr_owner.hex(),
        "mr_owner_config": report.mr_owner_config.hex(),
        "mr_seam": report.mr_seam.hex(),
        "td_attributes": report.td_attributes.hex(),
    }
    assert claims.report_data == report.report_data.hex()
    assert claims.hardware
    assert claims.confidential
    assert (claims.tcb["status"], claims.tcb["advisories"]) == ("UpToDate", "none")
    assert claims.issued_at is None


@needs_evidence
def test_genuine_collateral_counts_in_its_own_time_only() -> None:
    """From the identity of the quoting enclave (last issued) to the PCK revocation list (first to expire)."""
    issued = datetime(2025, 6, 19, 10, 32, 27, tzinfo=UTC).timestamp()
    until = datetime(2025, 7, 19, 10, 0, 35, tzinfo=UTC).timestamp()
    for now in (issued, until - 1):
        genuine("tdx", "tdx/tdx_quote", "tdx/tdx_quote_collateral.json", now)
    for now in (issued - 1, until, until + 1, 0, 2**40):
        with pytest.raises(VerificationError) as error:
            genuine("tdx", "tdx/tdx_quote", "tdx/tdx_quote_collateral.json", now)
        assert error.value.code == "expired"


@needs_evidence
def test_a_genuine_sgx_quote_needs_status_and_advisories_opted_in() -> None:
    sgx = ("sgx", "sgx/sgx_quote", "sgx/sgx_quote_collateral.json", SGX_TIME)
    for rules, hint in (
        (SgxRules(), '"ConfigurationAndSWHardeningNeeded" in statuses of [sgx]'),
        (SgxRules(statuses=SGX_OPT_IN.statuses), "advisories of [sgx]"),
        (SgxRules(statuses=SGX_OPT_IN.statuses, advisories=("INTEL-SA-00289",)), "advisories of [sgx]"),
    ):
        with pytest.raises(VerificationError) as error:
            genuine(*sgx, rules)
        assert error.value.code == "tcb"
        assert hint in error.value.hint
    claims = genuine(*sgx, SGX_OPT_IN)
    report: Any = dcap_qvl.parse_quote(sample("sgx/sgx_quote")).report
    assert claims.registers == {
        "mr_enclave": report.mr_enclave.hex(),
        "mr_signer": report.mr_signer.hex(),
        "isv_prod_id": "0000",
        "config_id": "00" * 64,
    }
    assert claims.report_data == report.report_data.hex()
    assert claims.tcb["advisories"] == "INTEL-SA-00289, INTEL-SA-00615"
    assert [w for w in claims.warnings if "ConfigurationAndSWHardeningNeeded" in w]
    assert [w for w in claims.warnings if "INTEL-SA-00289, INTEL-SA-00615" in w]


@needs_evidence
def test_a_genuine_outdated_platform() -> None:
    with pytest.raises(VerificationError, match="older than every level") as error:
        genuine("tdx", "tdx/tdx_quote_outdated", "tdx/tdx_quote_outdated_collateral.json", GCP_TIME)
    assert error.value.code == "tcb"


@needs_evidence
def test_a_genuine_debug_enclave() -> None:
    with pytest.raises(VerificationError) as error:
        genuine("sgx", "sgx/sgx_quote_debug.dat", "", SGX_TIME)
    assert error.value.code == "debug"


# The test CA ----------------------------------------------------------------------------------------------------------


def test_each_step_is_listed() -> None:
    checks = Checks()
    judge(CA.tdx(), checks=checks)
    common = ["type", "layout", "attributes", "collateral", "root", "certificates", "signatures", "TCB status"]
    assert [c.name for c in checks.done] == [*common, "advisories", "event log", "binding", "measurement"]
    checks = Checks()
    judge(CA.sgx(), checks=checks)
    assert [c.name for c in checks.done] == [*common, "advisories", "security version", "binding", "measurement"]
    assert all(c.passed and c.reason != "holds" for c in checks.done)


@pytest.mark.parametrize(
    ("evidence", "step"),
    [
        (CA.tdx(collateral=CA.collateral(days=(-9, -1))), "certificates"),
        (CA.tdx(qe_mrsigner=bytes(32)), "signatures"),
        (CA.tdx(qe_svn=1), "signatures"),
        (CA.tdx(collateral=CA.collateral(status="OutOfDate")), "TCB status"),
        (CA.tdx(collateral=CA.collateral(advisories=["INTEL-SA-00001"])), "advisories"),
    ],
)
def test_the_list_ends_with_the_step_that_failed(evidence: Evidence, step: str) -> None:
    checks = Checks()
    error = refused(evidence, checks=checks)
    assert [(c.name, c.passed) for c in checks.done][-1] == (step, False)
    assert all(c.passed for c in checks.done[:-1])
    assert checks.done[-1].reason.startswith(error.message)


def test_registers_lie_where_the_test_ca_wrote_them() -> None:
    claims = judge(CA.tdx(body=tdx_body(mr_td=b"\x77" * 48)))
    assert claims.registers["mr_td"] == "77" * 48
    assert [claims.registers[f"rtmr{i}"] for i in range(4)] == [r.hex() for r in RTMRS]
    assert [claims.registers[n][:2] for n in ("mr_seam", "mr_config_id", "mr_owner", "mr_owner_config")] == [
        "51", "c0", "c1", "c2",
    ]  # fmt: skip
    claims = judge(CA.sgx(body=sgx_body(isv_prod_id=0x0102, isv_svn=9)))
    assert claims.registers == {
        "mr_enclave": "22" * 32, "mr_signer": "33" * 32, "isv_prod_id": "0201", "config_id": "00" * 64,
    }  # fmt: skip
    assert claims.tcb["isv_svn"] == "9"


def test_every_kind_of_td_report() -> None:
    td15 = tdx_body(mr_service_td=bytes(48))
    for quote in (
        {"version": 4},
        {"version": 5, "body_type": 2},
        {"version": 5, "body_type": 3, "body": td15},
        {"version": 5, "body_type": 4, "body": td15 + bytes(885 - 648)},
    ):
        assert judge(CA.tdx(**quote)).report_data == REPORT_DATA.hex()


STATUSES: tuple[TcbStatus, ...] = (
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
)


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("tee", ["tdx", "sgx"])
def test_a_status_counts_only_where_it_is_listed(tee: str, status: TcbStatus) -> None:
    rules = SgxRules if tee == "sgx" else DcapRules
    evidence = getattr(CA, tee)(collateral=CA.collateral(tee, status=status))
    every: tuple[TcbStatus, ...] = ("UpToDate", *STATUSES)
    nothing: tuple[TcbStatus, ...] = ()
    for listed in (every[:1], tuple(s for s in every if s != status), nothing):
        error = refused(evidence, rules(statuses=listed))
        assert error.code == "tcb"
        assert status in error.message
    claims = judge(evidence, rules(statuses=(status,)))
    assert claims.tcb["status"] == status
    assert [w for w in claims.warnings if status in w]


def test_up_to_date_counts_only_where_it_is_listed() -> None:
    assert refused(CA.tdx(), DcapRules(statuses=("SWHardeningNeeded",))).code == "tcb"
    assert refused(CA.tdx(), DcapRules(statuses=())).code == "tcb"
    assert judge(CA.tdx()).tcb["status"] == "UpToDate"


def test_the_quoting_enclaves_status_counts_too() -> None:
    evidence = CA.tdx(collateral=CA.collateral(qe_status="OutOfDate"))
    assert refused(evidence).code == "tcb"
    assert judge(evidence, DcapRules(statuses=("OutOfDate",))).tcb["status"] == "OutOfDate"
    # Intel defines no such status of a quoting enclave, and the library would overlook it.
    odd = CA.tdx(collateral=CA.collateral(qe_status="OutOfDateConfigurationNeeded"))
    every = DcapRules(statuses=("UpToDate", *STATUSES))
    assert "quoting enclave" in refused(odd, every).message
    assert refused(CA.tdx(collateral=CA.collateral(qe_status="SWHardeningNeeded")), every).code == "tcb"


def test_every_advisory_must_be_listed() -> None:
    evidence = CA.tdx(collateral=CA.collateral(advisories=["INTEL-SA-2"], qe_advisories=["INTEL-SA-1"]))
    for listed in ((), ("INTEL-SA-1",), ("INTEL-SA-2",), ("INTEL-SA-3",)):
        error = refused(evidence, DcapRules(advisories=listed))
        assert error.code == "tcb"
        assert set(error.message.split(": ")[1].split(", ")) == {"INTEL-SA-1", "INTEL-SA-2"} - set(listed)
    claims = judge(evidence, DcapRules(advisories=("INTEL-SA-1", "INTEL-SA-2", "INTEL-SA-3")))
    assert claims.tcb["advisories"] == "INTEL-SA-1, INTEL-SA-2"


def test_the_least_evaluation_number() -> None:
    evidence = CA.tdx(collateral=CA.collateral(evaluation=17))
    assert judge(evidence, DcapRules(min_tcb_evaluation=17)).tcb["tcb_evaluation"] == "17"
    for least in (18, 2**32):
        assert refused(evidence, DcapRules(min_tcb_evaluation=least)).code == "tcb"


@pytest.mark.parametrize("key", ["dynamic_platform", "cached_keys", "smt"])
def test_features_of_the_platform(key: str) -> None:
    feature: dict[str, Any] = {key: False}
    with_it, without = CA.tdx(), CA.tdx(pck=CA.certify_pck(**feature))
    refusing = DcapRules(**feature)
    assert judge(without, refusing).hardware
    error = refused(with_it, refusing)
    assert error.code == "tcb"
    assert error.hint == f"{key} in [tdx]"


def test_the_least_security_version_of_an_enclave() -> None:
    evidence = CA.sgx(body=sgx_body(isv_svn=5))
    assert judge(evidence, SgxRules(min_isv_svn=5)).hardware
    assert refused(evidence, SgxRules(min_isv_svn=6)).code == "svn"


def test_an_event_log_must_replay() -> None:
    digest = event_log.runtime_digest("app", b"1")
    events = [{"imr": 3, "event_type": 0x08000001, "digest": digest.hex(), "event": "app", "event_payload": "31"}]
    log = json.dumps(events).encode()
    rtmrs = event_log.replay(event_log.parse(log))
    checks = Checks()
    judge(CA.tdx(body=tdx_body(rtmrs=rtmrs), event_log=log), checks=checks)
    assert "1 events replay" in next(c.reason for c in checks.done if c.name == "event log")
    assert refused(CA.tdx(event_log=log)).code == "event-log"
    assert refused(dataclasses.replace(CA.sgx(), event_log=log)).code == "evidence-format"


# Refusals, each with its code and words -------------------------------------------------------------------------------


def collateral(**replaced: Any) -> Evidence:
    return CA.tdx(collateral=CA.collateral(**replaced))


REFUSALS: Mapping[str, tuple[Callable[[], Evidence], str, str]] = {
    "root revoked": (
        lambda: collateral(root_ca_crl=CA.crl(of_root=True, revoked=[CA.root.serial_number]).hex()),
        "revoked", "root certificate itself",
    ),
    "signer revoked": (
        lambda: collateral(root_ca_crl=CA.crl(of_root=True, revoked=[CA.tcb_signer.serial_number]).hex()),
        "revoked", "that signs TCB information",
    ),
    "PCK CRL of tomorrow": (
        lambda: collateral(pck_crl=CA.crl(of_root=False, days=(1, 30)).hex()),
        "expired",
        "dated in the future",
    ),
    "TCB info of tomorrow": (lambda: collateral(days=(1, 30)), "expired", "dated in the future"),
    "other maker of the quoting enclave": (
        lambda: dataclasses.replace(CA.tdx(), blob=CA.tdx_quote()[:12] + bytes(16) + CA.tdx_quote()[28:]),
        "signature",
        "not Intel's quoting enclave",
    ),
    "TCB info of SGX": (lambda: CA.tdx(collateral=CA.collateral("sgx")), "collateral", "not for this tdx platform"),
    "mixed": (lambda: collateral(**tcb_info_of("sgx")), "collateral", "not for this tdx platform"),
    "other platform": (lambda: collateral(fmspc=bytes(6)), "collateral", "not for this tdx platform"),
    "TCB info altered": (lambda: collateral(tcb_info_signature="11" * 64), "collateral", "TCB information"),
    "identity altered": (lambda: collateral(qe_identity_signature="11" * 64), "collateral", "quoting enclave"),
    "root CRL by another": (
        lambda: collateral(root_ca_crl=CA.crl(of_root=False).hex()), "collateral", "the root's revocation list",
    ),
    "PCK CRL by another": (lambda: collateral(pck_crl=CA.crl(of_root=True).hex()), "chain", "does not lead"),
    "malformed chain": (lambda: collateral(tcb_info_issuer_chain="x"), "collateral", "cannot be used"),
    "malformed signature": (lambda: collateral(tcb_info_signature="11"), "collateral", "cannot be used"),
    "PCK not DER": (
        lambda: CA.tdx(chain=as_pem(b"\x30\x00", *ders(CA.pck_ca, CA.root))), "chain", "certificate is malformed",
    ),
    "issuer not DER": (
        lambda: CA.tdx(chain=as_pem(*ders(CA.pck), b"\x30\x00", *ders(CA.root))), "chain", "malformed",
    ),
    "foreign quoting enclave": (lambda: CA.tdx(qe_mrsigner=bytes(32)), "signature", "not Intel's quoting enclave"),
    "quoting enclave in debug": (lambda: CA.tdx(qe_flags=0x13), "signature", "not Intel's quoting enclave"),
    "old quoting enclave": (lambda: CA.tdx(qe_svn=1), "tcb", "quoting enclave is older"),
    "old platform": (lambda: collateral(min_svn=9), "tcb", "older than every level"),
    "TDX module": (lambda: CA.tdx(body=tdx_body()[:64] + b"\1" + tdx_body()[65:]), "tcb", "TDX module"),
    "revoked level": (lambda: collateral(status="Revoked"), "tcb", "has revoked the platform's TCB level"),
    "unknown status": (lambda: collateral(status="TDRelaunchAdvised"), "tcb", "TDRelaunchAdvised is unknown"),
}  # fmt: skip


def tcb_info_of(tee: str) -> dict[str, str]:
    table = json.loads(CA.collateral(tee))
    return {name: table[name] for name in ("tcb_info", "tcb_info_signature")}


def ders(*certificates: Any) -> list[bytes]:
    quote = CA.tdx_quote(chain=pem(*certificates).encode() + pem(*[CA.root] * (3 - len(certificates))).encode())
    return list(dcap_quote.parse(quote).chain[: len(certificates)])


def as_pem(*chain: bytes) -> bytes:
    return b"".join(dcap_quote._to_pem(der) for der in chain)


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_in_words(name: str) -> None:
    make, code, words = REFUSALS[name]
    error = refused(make(), DcapRules(statuses=("UpToDate", *STATUSES)))
    assert (error.code, words in error.message) == (code, True), error.message


def test_a_name_from_outside_cannot_write_to_the_terminal() -> None:
    hostile = DcapCa(common_name="evil\x1b[31m\nroot")
    stale = hostile.collateral(pck_crl=hostile.crl(of_root=False, days=(-9, -1)).hex())
    for evidence in (hostile.tdx(collateral=stale), hostile.tdx(pck=hostile.certify_pck(days=(-9, -1)))):
        error = refused(evidence, roots=hostile.roots)
        assert (error.code, error.message.isprintable()) == ("expired", True)


# Malformed ------------------------------------------------------------------------------------------------------------


TABLE = json.loads(CA.collateral())


def malformed_collateral() -> Iterator[bytes]:
    yield from (b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 200_000, b'{"a":' * 80_000)
    yield from (CA.collateral() + b"x", CA.collateral()[:-1])
    wrong_types: tuple[Any, ...] = (7, None, [], {})
    replaced: list[dict[str, Any]] = [{name: value} for name in TABLE for value in wrong_types]
    # Nothing depends on the issuer of the PCK revocation list: the list itself is verified with the quote's chain.
    replaced += [{name: "\x00é"} for name in TABLE if name != "pck_crl_issuer_chain"]
    replaced += [
        {"tcb_info": "[" * 100_000},
        {"qe_identity": '{"a":' * 60_000},
        {"root_ca_crl": "30" * 100_000},
        {"tcb_info_issuer_chain": TABLE["tcb_info_issuer_chain"] * 150},
    ]
    for change in replaced:
        yield json.dumps(TABLE | change).encode()
    for name in TABLE:
        yield json.dumps({k: v for k, v in TABLE.items() if k != name}).encode()


@pytest.mark.parametrize("data", [pytest.param(d, id=str(i)) for i, d in enumerate(malformed_collateral())])
def test_malformed_collateral(data: bytes) -> None:
    error = refused(CA.tdx(collateral=data))
    assert error.code == "collateral"
    assert len(error.message) < 300


def test_collateral_beyond_the_limit_is_no_evidence() -> None:
    with pytest.raises(ValueError, match="collateral is longer"):
        CA.tdx(collateral=bytes(MAX_COLLATERAL_BYTES + 1))


def test_a_chain_in_the_collateral_does_not_replace_the_quotes() -> None:
    other = DcapCa()
    theirs = json.loads(other.collateral()) | {"pck_certificate_chain": pem(other.pck, other.pck_ca, other.root)}
    ours = TABLE | {"pck_certificate_chain": theirs["pck_certificate_chain"]}
    assert judge(CA.tdx(collateral=json.dumps(ours).encode())).hardware
    ours["pck_certificate_chain"] = pem(CA.pck, CA.pck_ca, CA.root)
    assert refused(other.tdx(collateral=json.dumps(ours).encode())).code == "chain"


@pytest.mark.parametrize("count", [1, 69, 71, 140])
@pytest.mark.parametrize("byte", [b"\0", b"\1"])
def test_bytes_behind_a_quote(count: int, byte: bytes) -> None:
    for evidence in (CA.tdx(), CA.tdx(version=5), CA.sgx()):
        error = refused(dataclasses.replace(evidence, blob=evidence.blob + byte * count))
        assert (error.code, f"{count} bytes behind" in error.message) == ("evidence-format", True)


def test_intels_own_padding_of_version_4_only() -> None:
    padding = bytes(dcap_quote.V4_PADDING_BYTES)
    evidence = CA.tdx()
    assert judge(dataclasses.replace(evidence, blob=evidence.blob + padding)).hardware
    assert refused(dataclasses.replace(evidence, blob=evidence.blob + padding[1:] + b"\1")).code == "evidence-format"
    for other in (CA.tdx(version=5), CA.sgx()):
        assert refused(dataclasses.replace(other, blob=other.blob + padding)).code == "evidence-format"


def test_a_quote_in_the_others_envelope() -> None:
    error = refused(dataclasses.replace(CA.tdx(), type="sgx"))
    assert (error.code, error.message) == ("evidence-format", "the envelope says SGX, but the quote is of TDX")
    assert refused(dataclasses.replace(CA.sgx(), type="tdx")).code == "evidence-format"


def test_headers_that_do_not_go_together() -> None:
    quote = CA.tdx_quote()
    for at, value in ((0, 3), (0, 6), (2, 3), (4, 0), (4, 1), (8, 1), (11, 1)):
        changed = quote[:at] + bytes([value]) + quote[at + 1 :]
        assert refused(Evidence(type="tdx", blob=changed, collateral=CA.collateral())).code == "evidence-format"
    for version in (4, 5):
        changed = bytes([version]) + CA.sgx_quote()[1:]
        assert refused(Evidence(type="sgx", blob=changed, collateral=CA.collateral("sgx"))).code == "evidence-format"


@pytest.mark.parametrize(("body_type", "size"), [(1, 384), (2, 648), (3, 584), (4, 648), (5, 584), (0, 0), (0, 584)])
def test_bodies_of_another_kind(body_type: int, size: int) -> None:
    error = refused(CA.tdx(version=5, body_type=body_type, body=tdx_body()[:1] + bytes(max(0, size - 1))))
    assert (error.code, "a body of type" in error.message) == ("evidence-format", True)


def test_certificates_have_one_form() -> None:
    good = pem(CA.pck, CA.pck_ca, CA.root).encode()
    for chain in (good, good + b"\0", good[:-1], good[:-1] + b"\0"):
        assert judge(CA.tdx(chain=chain)).hardware
    lines = good.split(b"\n")
    padded = pem(CA.pck, CA.pck_ca).encode() + b"-----BEGIN CERTIFICATE-----\nA\n-----END CERTIFICATE-----\n"
    for chain in (
        b"",
        b"\0",
        pem(CA.pck, CA.pck_ca).encode(),
        pem(CA.pck, CA.pck_ca, CA.root, CA.root).encode(),
        good + b"\0\0",
        good + b"\n",
        b"\n" + good,
        good.replace(b"\n", b"\r\n"),
        b"\n".join([lines[0], lines[1] + lines[2], *lines[3:]]),
        good.replace(b"-----END", b"\n-----END", 1),
        padded,
    ):
        assert refused(CA.tdx(chain=chain)).code == "evidence-format"


def test_lengths_inside_a_quote_must_add_up() -> None:
    """Every length field one more or less; what it moves is read as something else or missing."""
    quote = CA.tdx_quote()
    signature = 48 + 584
    inner = signature + 4 + 128
    for at in (signature, inner + 2, inner + 6 + 448, inner + 6 + 448 + 2 + 32 + 2):
        for step in (1, 255):
            changed = quote[:at] + bytes([(quote[at] + step) % 256]) + quote[at + 1 :]
            assert refused(Evidence(type="tdx", blob=changed, collateral=CA.collateral())).code == "evidence-format"
    for at, kind in ((inner, 5), (inner + 6 + 448 + 2 + 32, 2)):
        other = quote[:at] + bytes([kind]) + quote[at + 1 :]
        assert refused(Evidence(type="tdx", blob=other, collateral=CA.collateral())).code == "evidence-format"
    # Consistent, but with bytes between: behind the inner certificates, and behind the certification data.
    for extra in (b"\0", b"x" * 100):
        body, tail = quote[:signature], quote[signature + 4 :]
        inside = tail[:130] + (len(tail) - 134 + len(extra)).to_bytes(4, "little") + tail[134:] + extra
        behind = tail + extra
        for tail in (inside, behind):
            changed = body + len(tail).to_bytes(4, "little") + tail
            assert refused(Evidence(type="tdx", blob=changed, collateral=CA.collateral())).code == "evidence-format"


def test_attributes() -> None:
    for bit in range(64):
        flags = (int.from_bytes(SEPT_VE_DISABLE, "little") | 1 << bit).to_bytes(8, "little")
        evidence = CA.tdx(body=tdx_body(td_attributes=flags))
        if bit in (16, 27, 28, 30, 31, 63):
            assert judge(evidence).registers["td_attributes"] == flags.hex()
        else:
            assert refused(evidence).code == ("debug" if bit in (0, 4, 5, 6) else "attributes")
    assert refused(CA.tdx(body=tdx_body(td_attributes=bytes(8)))).code == "attributes"
    bound = CA.tdx(version=5, body_type=3, body=tdx_body(mr_service_td=b"\1" * 48))
    assert refused(bound).code == "attributes"
    for bit in range(64):
        evidence = CA.sgx(body=sgx_body(flags=1 | 1 << bit))
        if bit in (0, 2, 4, 5, 6, 7, 10):
            assert judge(evidence).hardware
        else:
            assert refused(evidence).code == ("debug" if bit == 1 else "attributes")
    assert refused(CA.sgx(body=sgx_body(flags=4))).code == "attributes"


def test_reserved_bytes_of_an_enclaves_report() -> None:
    body = sgx_body()
    reserved = [*range(20, 32), *range(96, 128), *range(160, 192), *range(262, 304)]
    for at in reserved[::7]:
        assert refused(CA.sgx(body=body[:at] + b"\1" + body[at + 1 :])).code == "attributes"


def test_no_clock_of_ours_can_crash_it() -> None:
    for now in (-1.0, 0.0, 2.0**40, 2.0**70):
        assert refused(CA.tdx(), now=now).code == "expired"
