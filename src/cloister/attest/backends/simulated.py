"""A simulated TEE for tests and for runs on one machine. IT PROTECTS NOTHING.

Its signing key is published below, so anybody can make such evidence; the signature only finds accidents and lets
tests tamper. Its claims say `hardware=False, confidential=False`, and no production policy accepts its type.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import cloister
from cloister.attest.appraisal import Appraisal
from cloister.attest.claims import Report
from cloister.attest.evidence import REPORT_DATA_BYTES, Evidence
from cloister.crypto.encoding import Fields, encode, join
from cloister.crypto.keys import SIGNATURE_BYTES, PartyKey, verify_signature
from cloister.errors import ProtocolError, VerificationError

TYPE = "simulated"
REGISTER = "source"
WARNING = "SIMULATED: no hardware protects this enclave; its operator sees everything"

_LABEL = "simulated evidence"
_MAX_BLOB_BYTES = 1024
_MAX_TIME = 1 << 40
# A fixed, published test key: it authenticates nobody.
_TEST_KEY = PartyKey(
    Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"cloister simulated TEE: a published test key").digest())
)


class InsecureSimulatedAttester:
    """Signs whatever it is asked to, with a key that everybody knows."""

    type = TYPE

    def __init__(self, *, measurement: bytes | None = None, clock: Callable[[], float] = time.time) -> None:
        self._measurement = measure_source() if measurement is None else measurement
        self._clock = clock

    def collect(self, report_data: bytes) -> Evidence:
        """See `attest.attester.Attester`."""
        if len(report_data) != REPORT_DATA_BYTES:
            raise ValueError(f"report data has {REPORT_DATA_BYTES} bytes")
        body = encode({"measurement": self._measurement, "report_data": report_data, "issued_at": int(self._clock())})
        return Evidence(type=TYPE, blob=encode({"body": body, "signature": _TEST_KEY.sign(_LABEL, body)}))


def verify(evidence: Evidence, appraisal: Appraisal) -> Report:
    """Is it unaltered? (Genuine it never is.)

    Raises: VerificationError with code "evidence-format" or "signature".
    """
    with appraisal.checks.step("signature") as step:
        report = read(evidence)
        step.reason = "the published test key signed it, which proves nothing"
    return report


def read(evidence: Evidence) -> Report:
    """Check the published key's signature, which proves nothing, and read what it covers. Raises: as `verify`."""
    try:
        outer = Fields.decode(evidence.blob, max_bytes=_MAX_BLOB_BYTES, what="simulated evidence")
        body, signature = outer.blob("body"), outer.blob("signature", size=SIGNATURE_BYTES)
        outer.end()
        verify_signature(_TEST_KEY.public, _LABEL, body, signature)
        fields = Fields.decode(body, max_bytes=_MAX_BLOB_BYTES, what="simulated evidence")
        report = Report(
            type=TYPE,
            report_data=fields.blob("report_data", size=REPORT_DATA_BYTES),
            registers={REGISTER: fields.blob("measurement", size=32)},
            hardware=False,
            confidential=False,
            issued_at=fields.integer("issued_at", low=0, high=_MAX_TIME),
            warnings=(WARNING,),
        )
        fields.end()
    except ProtocolError as exc:
        raise VerificationError("evidence-format", f"the simulated evidence is malformed: {exc}") from exc
    if evidence.collateral or evidence.event_log:
        raise VerificationError("evidence-format", "simulated evidence has no collateral and no event log")
    return report


@cache
def measure_source() -> bytes:
    """SHA-256 over the names and contents of the installed package's Python files, sorted by name: 32 bytes."""
    return measure_folder(Path(cloister.__path__[0]))


def measure_folder(root: Path) -> bytes:
    """SHA-256 over (name, content) of all Python files under `root`, sorted by their POSIX names."""
    digest = hashlib.sha256(b"cloister source measurement v1")
    files = {file.relative_to(root).as_posix(): file for file in root.rglob("*.py")}
    for name in sorted(files):
        digest.update(join(name.encode(), files[name].read_bytes()))
    return digest.digest()
