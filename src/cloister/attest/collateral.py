"""Fetching the vendors' endorsements: Intel's collateral from its Provisioning Certification Service, AMD's
certificates and revocation lists from its Key Distribution Service.

Only the command `cloister attest fetch` comes here, when somebody types it; a verifier never does. What is fetched is
not trusted: it is signed by the vendors, and the verifiers check that. The transport is HTTPS to addresses on a list,
without redirects, with limits on size and time.

Source: Intel, "Provisioning Certification Service API", version 4; AMD, "VCEK Certificate and KDS Interface
Specification" (57230), chapter 4.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO
from urllib.parse import unquote

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from dcap_qvl import parse_pck_extension_from_pem

from cloister.attest.backends import dcap_quote
from cloister.attest.backends.ec_chain import PARSE_ERRORS
from cloister.attest.backends.sev_snp import product_line
from cloister.attest.backends.sev_snp_certs import pack_collateral, parse_collateral
from cloister.attest.backends.sev_snp_report import SnpReport, parse_report, parse_tcb
from cloister.attest.evidence import Evidence
from cloister.errors import ProtocolError, TransportError, UsageError, VerificationError

MAX_ANSWER_BYTES = 1 << 20
TIMEOUT_S = 20.0
"""For one answer, from the first byte to the last."""
MAX_AGE_S = 24 * 3600.0
"""How old an answer in the cache may be: the vendors sign for 30 days and publish anew whenever a flaw is found."""


@dataclass(frozen=True, kw_only=True)
class Services:
    """Where the vendors' services are. Only these addresses are ever asked."""

    intel: str = "https://api.trustedservices.intel.com"
    intel_root: str = "https://certificates.trustedservices.intel.com"
    amd: str = "https://kdsintf.amd.com"

    @property
    def all(self) -> tuple[str, ...]:
        return (self.intel, self.intel_root, self.amd)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a service said. `headers` have names in lower case."""

    body: bytes
    headers: Mapping[str, str]


@dataclass(kw_only=True)
class Fetcher:
    """Asks the services, or a cache folder that remembers their answers. `sources` lists what was asked."""

    services: Services = field(default_factory=Services)
    cache: Path | None = None
    clock: Callable[[], float] = time.time
    timeout_s: float = TIMEOUT_S
    sources: list[str] = field(default_factory=list)

    def get(self, url: str) -> Answer:
        """The answer to a GET.

        Raises:
            ValueError: the address is not on the list. TransportError: no answer, or an error.
            ProtocolError: an answer that is too long.
        """
        if not any(url.startswith(f"{service}/") for service in self.services.all):
            raise ValueError(f"the address is not on the list: {url}")
        cached = self._cached(url)
        self.sources.append(url if cached is None else f"{url} (from the cache)")
        if cached is not None:
            return cached
        answer = _ask(url, self.timeout_s)
        self._remember(url, answer)
        return answer

    def _path(self, url: str) -> Path | None:
        return None if self.cache is None else self.cache / f"{hashlib.sha256(url.encode()).hexdigest()}.json"

    def _cached(self, url: str) -> Answer | None:
        """A remembered answer that is young enough; whatever is wrong with the file, it is asked for again."""
        path = self._path(url)
        if path is None:
            return None
        try:
            content = json.loads(path.read_bytes())
            if content["url"] != url or not 0 <= self.clock() - content["at"] <= MAX_AGE_S:
                return None
            headers = {str(name): str(value) for name, value in content["headers"].items()}
            return Answer(body=bytes.fromhex(content["body"]), headers=headers)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def _remember(self, url: str, answer: Answer) -> None:
        path = self._path(url)
        if path is None:
            return
        content = {"url": url, "at": self.clock(), "headers": dict(answer.headers), "body": answer.body.hex()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(path.name + ".part")
            part.write_text(json.dumps(content))
            part.replace(path)
        except OSError as exc:
            raise UsageError(f"cannot write the cache: {exc.strerror}", where=str(path.parent)) from exc


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The list of addresses would mean nothing if a service could point elsewhere."""

    def redirect_request(self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str) -> None:  # fmt: skip # noqa: E501
        return None


def _ask(url: str, timeout_s: float) -> Answer:
    deadline, body = time.monotonic() + timeout_s, b""
    request = urllib.request.Request(url, headers={"User-Agent": "cloister"})  # noqa: S310  # on the list: see `get`
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout_s) as reply:
            headers = {name.lower(): value for name, value in reply.headers.items()}
            while block := reply.read1(1 << 16):
                body += block
                if len(body) > MAX_ANSWER_BYTES:
                    raise ProtocolError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes", where=url)
                if time.monotonic() > deadline:
                    raise TransportError(f"the answer took longer than {timeout_s:.0f} s", where=url)
    except urllib.error.HTTPError as exc:
        with exc:
            raise TransportError(f"the service answered with status {exc.code}", where=url) from exc
    except (OSError, HTTPException) as exc:
        raise TransportError(f"the service cannot be reached: {exc}", where=url) from exc
    return Answer(body=body, headers=headers)


def collateral_for(evidence: Evidence, fetcher: Fetcher) -> bytes:
    """The endorsements that a verifier of this evidence needs: what belongs into `Evidence.collateral`.

    Raises:
        UsageError: there is nothing to fetch for this type. VerificationError: the evidence is malformed.
        TransportError, ProtocolError: a service could not be asked, or answered nonsense.
    """
    if evidence.type in ("tdx", "sgx"):
        return _intel(evidence, fetcher)
    if evidence.type == "sev-snp":
        return _amd(evidence, fetcher)
    hint = "only tdx, sgx and sev-snp evidence comes without its endorsements"
    raise UsageError(f"there is nothing to fetch for evidence of type {evidence.type}", hint=hint)


# Intel ----------------------------------------------------------------------------------------------------------------


def _intel(evidence: Evidence, fetcher: Fetcher) -> bytes:
    """QuoteCollateralV3 as JSON."""
    quote = dcap_quote.parse(evidence.blob)
    try:
        leaf = x509.load_der_x509_certificate(quote.chain[0])
        issuer = "platform" if "Platform" in leaf.issuer.rfc4514_string() else "processor"
        fmspc = parse_pck_extension_from_pem(leaf.public_bytes(Encoding.PEM)).fmspc.hex()
    except PARSE_ERRORS as exc:
        raise VerificationError("evidence-format", "the quote's certificate names no platform (FMSPC)") from exc
    base = f"{fetcher.services.intel}/{{}}/certification/v4"
    crl = fetcher.get(f"{base.format('sgx')}/pckcrl?ca={issuer}&encoding=der")
    tcb = fetcher.get(f"{base.format(quote.tee)}/tcb?fmspc={fmspc}")
    identity = fetcher.get(f"{base.format(quote.tee)}/qe/identity")
    root_crl = fetcher.get(f"{fetcher.services.intel_root}/IntelSGXRootCA.der")
    tcb_info, tcb_signature = _signed(tcb, "tcbInfo")
    qe_identity, qe_signature = _signed(identity, "enclaveIdentity")
    content = {
        "pck_crl_issuer_chain": _chain(crl, "sgx-pck-crl-issuer-chain"),
        "root_ca_crl": root_crl.body.hex(),
        "pck_crl": crl.body.hex(),
        "tcb_info_issuer_chain": _chain(tcb, "tcb-info-issuer-chain", "sgx-tcb-info-issuer-chain"),
        "tcb_info": tcb_info,
        "tcb_info_signature": tcb_signature,
        "qe_identity_issuer_chain": _chain(identity, "sgx-enclave-identity-issuer-chain"),
        "qe_identity": qe_identity,
        "qe_identity_signature": qe_signature,
    }
    return json.dumps(content).encode()


def _signed(answer: Answer, name: str) -> tuple[str, str]:
    """(text, signature in hex) of {"NAME":{...},"signature":"..."}: the signature is over the text as it stands."""
    try:
        text = answer.body.decode()
        json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ProtocolError(f"Intel's {name} is not JSON") from exc
    found = re.fullmatch(rf'\{{"{name}":(\{{.*\}}),"signature":"([0-9a-fA-F]+)"\}}\s*', text, re.DOTALL)
    if found is None:
        raise ProtocolError(f"Intel's {name} has another form than it should")
    return found[1], found[2]


def _chain(answer: Answer, *names: str) -> str:
    for name in names:
        if name in answer.headers:
            return unquote(answer.headers[name])
    raise ProtocolError(f"Intel's answer lacks the header {names[0]}")


# AMD ------------------------------------------------------------------------------------------------------------------


def _amd(evidence: Evidence, fetcher: Fetcher) -> bytes:
    """The chip's certificate, unless the evidence has one, and the revocation list of its product line."""
    report = parse_report(evidence.blob)
    if evidence.collateral:
        endorsement = parse_collateral(evidence.collateral)
        product, leaf = endorsement.product, endorsement.certificate.public_bytes(Encoding.DER)
    elif report.signing_key != "vcek":
        hint = "the cloud provider hands it out; give it as --endorsement"
        raise UsageError("this report is signed with a provider's key (VLEK), which AMD does not hand out", hint=hint)
    else:
        product, leaf = _vcek(report, fetcher)
    crl = fetcher.get(f"{fetcher.services.amd}/{report.signing_key}/v1/{product}/crl")
    return pack_collateral(leaf=leaf, crl=crl.body)


def _vcek(report: SnpReport, fetcher: Fetcher) -> tuple[str, bytes]:
    """(product line, DER). A report of version 2 does not name its product: the service knows whose chip it is."""
    named = None if report.cpu is None else product_line(*report.cpu)
    for product in ("Milan", "Genoa") if named is None else (named,):
        try:
            return product, fetcher.get(_vcek_url(report, product, fetcher.services)).body
        except TransportError as exc:
            refused = exc
    raise refused


def _vcek_url(report: SnpReport, product: str, services: Services) -> str:
    tcb = parse_tcb(report.reported_tcb, product)
    levels = {"blSPL": tcb.bootloader, "teeSPL": tcb.tee, "snpSPL": tcb.snp, "ucodeSPL": tcb.microcode}
    chip = report.chip_id
    if product == "Turin":
        levels, chip = {"fmcSPL": tcb.fmc, **levels}, report.chip_id[:8]
    query = "&".join(f"{name}={level:02}" for name, level in levels.items())
    return f"{services.amd}/vcek/v1/{product}/{chip.hex()}?{query}"
