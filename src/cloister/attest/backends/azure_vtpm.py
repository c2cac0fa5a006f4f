"""Azure confidential virtual machines: an SEV-SNP report vouches for a paravisor, which vouches for a TPM inside it.

    VCEK -> SNP report -> its report_data = SHA-256(runtime claims) -> attestation key in them -> quote -> PCRs, nonce

`Evidence.blob` is JSON with exactly these keys: `version` (2); `tpm_quote` with `signature` and `message` (hex; the
number of an RSASSA signature, and a TPMS_ATTEST) and `pcrs` (hex, all 24 of the SHA-256 bank, in order); `hcl_report`
(base64url; what the paravisor keeps at TPM index 0x01400001) and `vcek` (base64url of DER). `Evidence.collateral` is
empty, or CBOR {crl}, DER.

The paravisor (Microsoft's "HCL") runs in the guest's highest privilege level, is what the SNP measurement measures,
and keeps the TPM. So a PCR is worth as much as the paravisor: a policy that names PCRs has to name `snp_measurement`
or `snp_id_key_digest` as well. For the attestation key the claims give no TPM attributes, only that it signs; that
it is restricted to what the TPM made itself is the paravisor's word.

Source: Microsoft, "Azure confidential VM guest attestation design", and openvmm's IGVM attestation protocol.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from dataclasses import dataclass
from hmac import compare_digest
from typing import Any

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from cloister.attest.appraisal import Appraisal
from cloister.attest.backends import sev_snp
from cloister.attest.backends.sev_snp_certs import MAX_CERTIFICATE_BYTES, MAX_CRL_BYTES, Endorsement, parse_endorsement
from cloister.attest.backends.sev_snp_report import REPORT_BYTES, SnpReport, parse_report
from cloister.attest.backends.tpm_quote import (
    NUM_PCRS,
    PCR_BYTES,
    Quote,
    rsa_public_key,
    rsassa_signature,
    verify_quote,
)
from cloister.attest.claims import Report
from cloister.attest.evidence import Evidence
from cloister.crypto.encoding import Fields
from cloister.errors import ProtocolError, VerificationError

TYPE = "azure-vtpm"
VERSION = 2
MAX_BLOB_BYTES = 1 << 15
PARAVISOR_WARNING = (
    "PCRs are worth as much as the paravisor that keeps them: the policy must name snp_measurement or snp_id_key_digest"
)

_KEY_ID = "HCLAkPub"
_MAX_SIGNATURE_BYTES, _MAX_QUOTE_BYTES, _MAX_HCL_BYTES = 512, 1024, 8192
_HEX = re.compile(r"([0-9a-f]{2})*")
_BASE64URL = re.compile(r"[A-Za-z0-9_-]*={0,2}")

# Layout of the paravisor's report: header, SNP report, request data, runtime claims, zeros. Numbers little endian.
_MAGIC, _HEADER_BYTES, _HEADER_VERSIONS, _AK_REQUEST = b"HCLA", 32, (1, 2), 2
_DATA_BYTES, _DATA_VERSION, _SNP, _SHA256 = 20, 1, 2, 1


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the evidence consists of, unverified."""

    snp: SnpReport
    endorsement: Endorsement
    claims: bytes
    signature: bytes
    attest: bytes
    pcrs: dict[int, bytes]


def verify(evidence: Evidence, appraisal: Appraisal) -> Report:
    """Is it a quote of a TPM that a paravisor keeps inside a genuine SNP guest? See `attest.appraisal.Verifier`.

    Raises: VerificationError with a code of `sev_snp.verify`, or "runtime-claims", "tpm-key", "tpm-quote", "pcr".
    """
    with appraisal.checks.step("evidence format") as step:
        parts = parse(evidence)
        step.reason = "quote, paravisor's report and certificate, nothing else"
    # Only the paravisor has VMPL 0: a report that anybody else asked for says nothing about its TPM.
    snp = sev_snp.verify_report(parts.snp, parts.endorsement, appraisal, any_level=False)
    with appraisal.checks.step("runtime claims") as step:
        _check_claims(parts.claims, snp.report_data)
        claims = _parse_claims(parts.claims)
        step.reason = "the report of the processor holds their SHA-256"
    with appraisal.checks.step("attestation key") as step:
        key = _attestation_key(claims)
        step.reason = "the paravisor vouches for it in the runtime claims, for signing only"
    with appraisal.checks.step("quote") as step:
        quote = verify_quote(parts.attest, rsassa_signature(parts.signature), key, parts.pcrs)
        step.reason = f"signed by that key over the {len(quote.pcrs)} PCR values that came with it"
    return _report(snp, quote, claims)


def _check_claims(claims: bytes, report_data: bytes) -> None:
    if not compare_digest(hashlib.sha256(claims).digest() + bytes(32), report_data):
        hint = "the attestation key in them is not the one of this machine"
        raise VerificationError("runtime-claims", "the processor's report is not about these runtime claims", hint=hint)


def _attestation_key(claims: dict[str, Any]) -> RSAPublicKey:
    """The one key with the known id: a JSON Web Key (RFC 7517) for signatures with RSA."""
    keys = claims.get("keys")
    found = [k for k in keys if isinstance(k, dict) and k.get("kid") == _KEY_ID] if isinstance(keys, list) else []
    if len(found) != 1:
        raise VerificationError("tpm-key", f"the runtime claims hold not exactly one key {_KEY_ID}")
    key = found[0]
    if key.get("kty") != "RSA" or key.get("key_ops") != ["sign"]:
        raise VerificationError("tpm-key", "the attestation key is not an RSA key for signing only")
    exponent = int.from_bytes(_from_base64url(key.get("e"), 8, "the key's exponent"), "big")
    return rsa_public_key(_from_base64url(key.get("n"), 512, "the key's modulus"), exponent)


def _report(snp: Report, quote: Quote, claims: dict[str, Any]) -> Report:
    registers = {f"pcr{n}": value for n, value in quote.pcrs.items()}
    registers |= {f"snp_{name}": value for name, value in snp.registers.items()}
    tcb = dict(snp.tcb) | {"boots": str(quote.reset_count), "resumes": str(quote.restart_count)}
    machine = claims.get("vm-configuration")
    for key in ("secure-boot", "console-enabled", "vmUniqueId"):
        if isinstance(machine, dict) and isinstance(machine.get(key), bool | str):
            tcb[f"paravisor: {key}"] = str(machine[key])
    return Report(
        type=TYPE,
        report_data=quote.extra_data,
        registers=registers,
        hardware=True,
        confidential=True,
        tcb=tcb,
        warnings=(*snp.warnings, PARAVISOR_WARNING),
    )


# Parsing --------------------------------------------------------------------------------------------------------------


def parse(evidence: Evidence) -> Parts:
    """Take the evidence apart. Raises: VerificationError "evidence-format", "collateral" or "product"."""
    if evidence.event_log:
        raise VerificationError("evidence-format", "azure-vtpm evidence has no event log here")
    if len(evidence.blob) > MAX_BLOB_BYTES:
        raise VerificationError("evidence-format", f"azure-vtpm evidence has more than {MAX_BLOB_BYTES} bytes")
    outer = _table(_load(evidence.blob, "the evidence"), ("version", "tpm_quote", "hcl_report", "vcek"))
    if type(outer["version"]) is not int or outer["version"] != VERSION:
        raise VerificationError("evidence-format", f"azure-vtpm evidence of another version than {VERSION}")
    quote = _table(outer["tpm_quote"], ("signature", "message", "pcrs"))
    snp, claims = _parse_hcl(_from_base64url(outer["hcl_report"], _MAX_HCL_BYTES, "hcl_report"))
    vcek = _from_base64url(outer["vcek"], MAX_CERTIFICATE_BYTES, "vcek")
    return Parts(
        snp=parse_report(snp),
        endorsement=parse_endorsement(vcek, _parse_crl(evidence.collateral)),
        claims=claims,
        signature=_from_hex(quote["signature"], _MAX_SIGNATURE_BYTES),
        attest=_from_hex(quote["message"], _MAX_QUOTE_BYTES),
        pcrs=_parse_pcrs(quote["pcrs"]),
    )


def _parse_pcrs(values: object) -> dict[int, bytes]:
    if not isinstance(values, list) or len(values) != NUM_PCRS:
        raise VerificationError("evidence-format", f"azure-vtpm evidence has the values of all {NUM_PCRS} PCRs")
    return {n: _from_hex(value, PCR_BYTES) for n, value in enumerate(values)}


def _parse_crl(collateral: bytes) -> bytes:
    if not collateral:
        return b""
    try:
        fields = Fields.decode(collateral, max_bytes=2 * MAX_CRL_BYTES, max_items=4, what="the collateral")
        crl = fields.blob("crl", max_size=MAX_CRL_BYTES)
        fields.end()
    except ProtocolError as exc:
        raise VerificationError("collateral", str(exc)) from exc
    return crl


def _parse_hcl(report: bytes) -> tuple[bytes, bytes]:
    """SNP report and runtime claims. Everything around them is unsigned: it must have the one value that it can."""
    start = _HEADER_BYTES + REPORT_BYTES
    numbers = [int.from_bytes(report[at : at + 4], "little") for at in range(start, start + _DATA_BYTES, 4)]
    size = numbers[4]
    end = start + _DATA_BYTES + size
    version, total, request = (int.from_bytes(report[at : at + 4], "little") for at in (4, 8, 12))
    if report[:4] != _MAGIC or version not in _HEADER_VERSIONS or request != _AK_REQUEST or any(report[16:32]):
        raise VerificationError("evidence-format", "the paravisor's report has a header that is not known here")
    if numbers[:4] != [_DATA_BYTES + size, _DATA_VERSION, _SNP, _SHA256]:
        raise VerificationError("evidence-format", "the paravisor's report is not about an SEV-SNP guest with SHA-256")
    if total != end or len(report) < end or any(report[end:]):
        raise VerificationError("evidence-format", "the paravisor's report is not as long as it says")
    return report[_HEADER_BYTES:start], report[start + _DATA_BYTES : end]


def _parse_claims(claims: bytes) -> dict[str, Any]:
    """Unknown claims are none of our business: the paravisor that writes them is measured."""
    value = _load(claims, "the runtime claims")
    if not isinstance(value, dict):
        raise VerificationError("evidence-format", "the runtime claims are not a table")
    return value


def _load(data: bytes, what: str) -> object:
    """JSON without keys that occur twice."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as exc:
        raise VerificationError("evidence-format", f"{what} is not JSON: {exc}") from exc


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _table(value: object, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != set(keys):
        raise VerificationError("evidence-format", f"azure-vtpm evidence needs exactly the keys {', '.join(keys)}")
    return value


def _from_hex(value: object, max_size: int) -> bytes:
    """Lower case, so that there is one way to write it."""
    if not isinstance(value, str) or len(value) > 2 * max_size or not _HEX.fullmatch(value):
        raise VerificationError("evidence-format", f"a value is not lower-case hex of at most {max_size} bytes")
    return bytes.fromhex(value)


def _from_base64url(value: object, max_size: int, what: str) -> bytes:
    """RFC 4648, section 5; padding may be left out, bits that mean nothing are zero."""
    if not isinstance(value, str) or len(value) > 2 * max_size or not _BASE64URL.fullmatch(value):
        raise VerificationError("evidence-format", f"{what} is not base64url of at most {max_size} bytes")
    bare = value.rstrip("=")
    padded = bare + "=" * (-len(bare) % 4)
    try:
        data = base64.urlsafe_b64decode(padded)
    except binascii.Error as exc:
        raise VerificationError("evidence-format", f"{what} is not base64url") from exc
    if base64.urlsafe_b64encode(data).decode() != padded or value not in (bare, padded) or len(data) > max_size:
        raise VerificationError("evidence-format", f"{what} is not base64url of at most {max_size} bytes")
    return data
