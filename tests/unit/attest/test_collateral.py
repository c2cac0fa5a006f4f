"""Fetching endorsements: from listed addresses only, bounded, remembered for a day, and what it makes verifies."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from cloister.attest.backends.sev_snp_certs import pack_collateral, parse_collateral
from cloister.attest.collateral import MAX_ANSWER_BYTES, Answer, Fetcher, Services, collateral_for
from cloister.attest.evidence import Evidence
from cloister.attest.policy import AppraisalPolicy
from cloister.attest.verify import inspect
from cloister.errors import ProtocolError, TransportError, UsageError, VerificationError
from cloister.methods.attest import Paths, fetch_collateral, verify_evidence
from tests.attest_ca import dcap_ca, snp_ca
from tests.evidence import needs_evidence, sample

TDX_AT, SNP_AT = 1_751_000_000, 1_765_000_000
ANY = AppraisalPolicy(accept=("tdx", "sev-snp"), any_measurement=True)


@dataclass
class Vendor:
    """A local service. `answers`: (status, headers, body) by path with query."""

    answers: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    pause_s: float = 0.0
    address: str = ""

    @property
    def services(self) -> Services:
        return Services(intel=self.address, intel_root=f"{self.address}/root", amd=f"{self.address}/amd")

    def put(self, path: str, body: bytes, *, status: int = 200, **headers: str) -> None:
        self.answers[path] = (status, {name.replace("_", "-"): value for name, value in headers.items()}, body)


@pytest.fixture
def vendor() -> Iterator[Vendor]:
    state = Vendor()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            status, headers, body = state.answers.get(self.path, (404, {}, b""))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            for at in range(0, len(body), 1 << 16):
                self.wfile.write(body[at : at + (1 << 16)])
                time.sleep(state.pause_s)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def serve_intel(vendor: Vendor) -> Evidence:
    """Intel's service as it was when the sample was made."""
    content = json.loads(sample("tdx/tdx_quote_collateral.json"))
    info = f'{{"tcbInfo":{content["tcb_info"]},"signature":"{content["tcb_info_signature"]}"}}'
    identity = f'{{"enclaveIdentity":{content["qe_identity"]},"signature":"{content["qe_identity_signature"]}"}}'
    tdx, chain = "/tdx/certification/v4", {"TCB-Info-Issuer-Chain": quote(content["tcb_info_issuer_chain"])}
    vendor.answers |= {
        f"{tdx}/tcb?fmspc=b0c06f000000": (200, chain, info.encode()),
        f"{tdx}/qe/identity": (
            200, {"SGX-Enclave-Identity-Issuer-Chain": quote(content["qe_identity_issuer_chain"])}, identity.encode()
        ),
        "/sgx/certification/v4/pckcrl?ca=platform&encoding=der": (
            200, {"SGX-PCK-CRL-Issuer-Chain": quote(content["pck_crl_issuer_chain"])}, bytes.fromhex(content["pck_crl"])
        ),
        "/root/IntelSGXRootCA.der": (200, {}, bytes.fromhex(content["root_ca_crl"])),
    }  # fmt: skip
    return Evidence(type="tdx", blob=sample("tdx/tdx_quote"))


def serve_amd(vendor: Vendor, product: str = "Milan") -> Evidence:
    report = sample("snp/milan_report.bin")
    chip = report[0x1A0:0x1E0].hex()
    vendor.put(f"/amd/vcek/v1/{product}/{chip}?blSPL=03&teeSPL=00&snpSPL=08&ucodeSPL=115", sample("snp/milan_vcek.der"))
    return Evidence(type="sev-snp", blob=report)


@needs_evidence
def test_intels_collateral_is_put_together_as_the_verifier_wants_it(vendor: Vendor) -> None:
    quote_alone = serve_intel(vendor)
    fetcher = Fetcher(services=vendor.services)
    collateral = collateral_for(quote_alone, fetcher)
    assert json.loads(collateral) == json.loads(sample("tdx/tdx_quote_collateral.json"))
    assert len(fetcher.sources) == len(vendor.asked) == 4
    complete = Evidence(type="tdx", blob=quote_alone.blob, collateral=collateral)
    assert inspect(complete, ANY, None, TDX_AT).hardware


@pytest.mark.parametrize("product", ["Milan", "Genoa"])
@needs_evidence
def test_a_chips_certificate_and_its_revocation_list(vendor: Vendor, product: str) -> None:
    """The sample's report does not name its product: the service that knows the chip decides."""
    report = serve_amd(vendor, product)
    vendor.put(f"/amd/vcek/v1/{product}/crl", b"a list")
    collateral = collateral_for(report, Fetcher(services=vendor.services))
    assert collateral == pack_collateral(leaf=sample("snp/milan_vcek.der"), crl=b"a list")


@needs_evidence
def test_a_certificate_at_hand_is_not_asked_for(vendor: Vendor) -> None:
    vendor.put("/amd/vlek/v1/Milan/crl", b"a list")
    leaf = sample("snp/aws_vlek.der")
    report = Evidence(type="sev-snp", blob=sample("snp/aws_vlek_report.bin"), collateral=leaf)
    assert collateral_for(report, Fetcher(services=vendor.services)) == pack_collateral(leaf=leaf, crl=b"a list")
    assert vendor.asked == ["/amd/vlek/v1/Milan/crl"]


@needs_evidence
def test_what_cannot_be_fetched(vendor: Vendor) -> None:
    fetcher = Fetcher(services=vendor.services)
    with pytest.raises(UsageError, match="VLEK"):
        collateral_for(Evidence(type="sev-snp", blob=sample("snp/aws_vlek_report.bin")), fetcher)
    with pytest.raises(UsageError, match="nothing to fetch"):
        collateral_for(Evidence(type="nitro", blob=b"x"), fetcher)
    with pytest.raises(VerificationError):
        collateral_for(Evidence(type="tdx", blob=b"x"), fetcher)
    with pytest.raises(TransportError, match="404"):
        collateral_for(Evidence(type="sev-snp", blob=sample("snp/milan_report.bin")), fetcher)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tdx/certification/v4/tcb?fmspc=b0c06f000000", b"<html>"),
        ("/tdx/certification/v4/tcb?fmspc=b0c06f000000", b'{"tcbInfo":{},"other":1,"signature":"00"}'),
        ("/tdx/certification/v4/qe/identity", b'{"enclaveIdentity":[],"signature":"00"}'),
        ("/tdx/certification/v4/qe/identity", b'{"enclaveIdentity":{},"signature":"not hex"}'),
        ("/tdx/certification/v4/qe/identity", b"[" * 100_000),
    ],
)
@needs_evidence
def test_nonsense_from_a_service(vendor: Vendor, path: str, body: bytes) -> None:
    quote_alone = serve_intel(vendor)
    vendor.answers[path] = (200, vendor.answers[path][1], body)
    with pytest.raises(ProtocolError):
        collateral_for(quote_alone, Fetcher(services=vendor.services))


@needs_evidence
def test_a_missing_header(vendor: Vendor) -> None:
    quote_alone = serve_intel(vendor)
    path = "/tdx/certification/v4/qe/identity"
    vendor.answers[path] = (200, {}, vendor.answers[path][2])
    with pytest.raises(ProtocolError, match="identity-issuer-chain"):
        collateral_for(quote_alone, Fetcher(services=vendor.services))


# The transport --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/x",
        "http://api.trustedservices.intel.com/x",
        "https://api.trustedservices.intel.com.example.org/x",
        "https://api.trustedservices.intel.com@example.org/x",
        "https://api.trustedservices.intel.com:8443/x",
        "file:///etc/passwd",
    ],
)
def test_no_other_address_is_asked(url: str) -> None:
    with pytest.raises(ValueError, match="not on the list"):
        Fetcher().get(url)


def test_the_list_has_https_addresses_of_the_vendors_only() -> None:
    hosts = {service.removeprefix("https://") for service in Services().all}
    assert hosts == {"api.trustedservices.intel.com", "certificates.trustedservices.intel.com", "kdsintf.amd.com"}


def test_a_redirect_is_not_followed(vendor: Vendor) -> None:
    vendor.put("/from", b"", status=302, Location=f"{vendor.address}/to")
    vendor.put("/to", b"reached")
    with pytest.raises(TransportError, match="302"):
        Fetcher(services=vendor.services).get(f"{vendor.address}/from")
    assert vendor.asked == ["/from"]


def test_an_answer_has_a_largest_size(vendor: Vendor) -> None:
    vendor.put("/most", bytes(MAX_ANSWER_BYTES))
    vendor.put("/more", bytes(MAX_ANSWER_BYTES + 1))
    fetcher = Fetcher(services=vendor.services)
    assert len(fetcher.get(f"{vendor.address}/most").body) == MAX_ANSWER_BYTES
    with pytest.raises(ProtocolError, match="longer than"):
        fetcher.get(f"{vendor.address}/more")


def test_a_slow_answer_ends(vendor: Vendor) -> None:
    vendor.put("/slow", bytes(20 << 16))
    vendor.pause_s = 0.1
    began = time.monotonic()
    with pytest.raises(TransportError, match="longer than"):
        Fetcher(services=vendor.services, timeout_s=0.3).get(f"{vendor.address}/slow")
    assert time.monotonic() - began < 2.0


def test_nobody_answers(vendor: Vendor) -> None:
    gone = Services(intel="http://127.0.0.1:9")
    with pytest.raises(TransportError, match="cannot be reached"):
        Fetcher(services=gone, timeout_s=1.0).get("http://127.0.0.1:9/x")


def test_answers_are_remembered_for_a_day(vendor: Vendor, tmp_path: Path) -> None:
    vendor.put("/x", b"first", Some_Header="kept")
    now = [1000.0]
    fetcher = Fetcher(services=vendor.services, cache=tmp_path / "cache", clock=lambda: now[0])
    url = f"{vendor.address}/x"
    first = fetcher.get(url)
    vendor.put("/x", b"second")
    assert fetcher.get(url) == first
    assert (first.body, first.headers["some-header"], vendor.asked) == (b"first", "kept", ["/x"])
    assert fetcher.sources == [url, f"{url} (from the cache)"]
    now[0] += 24 * 3600.0 + 1
    assert fetcher.get(url).body == b"second"
    now[0] -= 24 * 3600.0  # a clock that was set back: what seems to come from the future is asked for again
    vendor.put("/x", b"third")
    assert fetcher.get(url).body == b"third"


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{}", b'{"url": "http://other/", "at": 0}', b"\xff"])
def test_a_damaged_cache_is_not_used(vendor: Vendor, tmp_path: Path, content: bytes) -> None:
    vendor.put("/x", b"fresh")
    fetcher = Fetcher(services=vendor.services, cache=tmp_path)
    fetcher.get(f"{vendor.address}/x")
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    answer = fetcher.get(f"{vendor.address}/x")
    assert isinstance(answer, Answer)
    assert (answer.body, len(vendor.asked)) == (b"fresh", 2)


def test_an_unwritable_cache(vendor: Vendor, tmp_path: Path) -> None:
    vendor.put("/x", b"fresh")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write the cache"):
        Fetcher(services=vendor.services, cache=tmp_path / "file").get(f"{vendor.address}/x")


# The command ----------------------------------------------------------------------------------------------------------


@needs_evidence
def test_fetched_endorsements_make_evidence_complete(vendor: Vendor, tmp_path: Path) -> None:
    (tmp_path / "quote").write_bytes(serve_intel(vendor).blob)
    (tmp_path / "policy.toml").write_text('[policy]\naccept = ["tdx"]\nmeasurements = "any"\n')
    paths = Paths(evidence=tmp_path / "quote", kind="tdx")
    policy = tmp_path / "policy.toml"
    assert not verify_evidence(paths, policy=policy, at=TDX_AT, report_data=None).accepted
    alone = fetch_collateral(paths, tmp_path / "c.json", embed=False, cache=None, services=vendor.services)
    beside = Paths(evidence=tmp_path / "quote", kind="tdx", collateral=tmp_path / "c.json")
    assert verify_evidence(beside, policy=policy, at=TDX_AT, report_data=None).accepted
    fetch_collateral(paths, tmp_path / "complete", embed=True, cache=None, services=vendor.services)
    complete = Paths(evidence=tmp_path / "complete")
    assert verify_evidence(complete, policy=policy, at=TDX_AT, report_data=None).accepted
    assert (len(alone.sources), alone.bytes) == (4, (tmp_path / "c.json").stat().st_size)
    with pytest.raises(UsageError, match="exists already"):
        fetch_collateral(paths, tmp_path / "c.json", embed=False, cache=None, services=vendor.services)


@needs_evidence
def test_an_snp_report_with_what_was_fetched(vendor: Vendor, tmp_path: Path) -> None:
    report = serve_amd(vendor)
    with pytest.raises(TransportError):  # without the revocation list nothing is written
        collateral_for(report, Fetcher(services=vendor.services))
    leaf = parse_collateral(pack_collateral(leaf=sample("snp/milan_vcek.der")))
    assert (leaf.product, leaf.kind) == ("Milan", "vcek")


def test_a_quote_whose_certificate_names_no_platform(vendor: Vendor) -> None:
    ca = dcap_ca.shared_ca()
    for chain in (
        dcap_ca.pem(ca.root, ca.pck_ca, ca.root).encode() + b"\0",
        dcap_ca.pem(ca.pck, ca.pck_ca, ca.root).replace(dcap_ca.pem(ca.pck)[28:60], "A" * 32).encode() + b"\0",
    ):
        with pytest.raises(VerificationError) as refused:
            collateral_for(ca.tdx(chain=chain, collateral=b""), Fetcher(services=vendor.services))
        assert refused.value.code == "evidence-format"
    assert vendor.asked == []


def test_a_turin_chip_has_its_own_address(vendor: Vendor) -> None:
    ca = snp_ca.SnpCa("Turin")
    chip = snp_ca.CHIP_IDS["Turin"].hex()
    vendor.put(f"/amd/vcek/v1/Turin/{chip}?fmcSPL=02&blSPL=04&teeSPL=01&snpSPL=24&ucodeSPL=219", ca.vcek.der)
    vendor.put("/amd/vcek/v1/Turin/crl", b"a list")
    report = Evidence(type="sev-snp", blob=ca.evidence().blob)
    collateral = collateral_for(report, Fetcher(services=vendor.services))
    assert collateral == pack_collateral(leaf=ca.vcek.der, crl=b"a list")
