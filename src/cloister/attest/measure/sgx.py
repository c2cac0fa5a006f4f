"""MRENCLAVE and MRSIGNER of an enclave's SIGSTRUCT, as `gramine-sgx-sign` writes it into a .sig file.

Source: Intel Software Developer's Manual, volume 3D, 38.13 (SIGSTRUCT; the signature covers bytes 0-127 and 900-1027).
"""

from __future__ import annotations

import hashlib

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers
from cryptography.hazmat.primitives.hashes import SHA256

from cloister.attest.measure.reference import Reference
from cloister.errors import DataError

SIGSTRUCT_BYTES = 1808
_HEADER = bytes.fromhex("06000000e10000000000010000000000")
_HEADER2 = bytes.fromhex("01010000600000006000000001000000")
_DEBUG = 1 << 1
_EXPONENT = 3


def measure_sgx(sigstruct: bytes, *, what: str) -> Reference:
    """Reference values of a signed enclave. The signature is verified, so the file is whole.

    Raises: DataError: not a SIGSTRUCT, altered, or signed for debugging.
    """
    if len(sigstruct) != SIGSTRUCT_BYTES or sigstruct[:16] != _HEADER or sigstruct[24:40] != _HEADER2:
        raise DataError("not an SGX SIGSTRUCT", where=what, hint="give the .sig file that gramine-sgx-sign wrote")
    _check_signature(sigstruct, what)
    if int.from_bytes(sigstruct[928:936], "little") & _DEBUG:
        hint = "set sgx.debug = false in the manifest and sign again"
        raise DataError("the enclave is signed for debugging, which no verifier accepts", where=what, hint=hint)
    return Reference(
        type="sgx",
        registers={
            "mr_enclave": sigstruct[960:992],
            "mr_signer": hashlib.sha256(sigstruct[128:512]).digest(),
        },
        notes=(
            "mr_enclave covers Gramine, the manifest and through its trusted files Python, packages, Cloister and job",
            f"isv_prod_id {int.from_bytes(sigstruct[1024:1026], 'little')},"
            f" isv_svn {int.from_bytes(sigstruct[1026:1028], 'little')}",
        ),
    )


def _check_signature(sigstruct: bytes, what: str) -> None:
    """RSA-3072 with exponent 3; all numbers are little-endian."""
    if int.from_bytes(sigstruct[512:516], "little") != _EXPONENT:
        raise DataError("the SIGSTRUCT's exponent is not 3", where=what)
    modulus = int.from_bytes(sigstruct[128:512], "little")
    try:
        RSAPublicNumbers(_EXPONENT, modulus).public_key().verify(
            sigstruct[516:900][::-1], sigstruct[:128] + sigstruct[900:1028], PKCS1v15(), SHA256()
        )
    except (InvalidSignature, ValueError) as exc:
        raise DataError("the SIGSTRUCT's signature does not hold: the file was altered", where=what) from exc
