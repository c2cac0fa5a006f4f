"""Public areas (TPMT_PUBLIC) of the keys that we ask a TPM for.

A primary key is derived from the hierarchy's seed and this template: the same template gives the same key after every
restart, so nothing has to be stored and nothing can be lost.

Source: TCG, "TPM 2.0 Library, Part 2", sections 8.3 (attributes) and 12.2.4; "EK Credential Profile for TPM 2.0",
annex B.3.3 (template L-1); "TPM v2.0 Provisioning Guidance", section 7.5.1 (storage root key).
"""

from __future__ import annotations

import hashlib

from cloister.tpm.wire import ALG_NULL, ALG_SHA256, sized, u16, u32

_RSA, _AES, _KEYEDHASH, _ECDSA, _ECC, _CFB = 0x01, 0x06, 0x08, 0x18, 0x23, 0x43
_P256 = 0x03
_EK_CERTIFICATE_RSA_2048 = 0x01C00002

FIXED_TPM, FIXED_PARENT, SENSITIVE_DATA_ORIGIN = 1 << 1, 1 << 4, 1 << 5
USER_WITH_AUTH, ADMIN_WITH_POLICY, NO_DA = 1 << 6, 1 << 7, 1 << 10
RESTRICTED, DECRYPT, SIGN = 1 << 16, 1 << 17, 1 << 18
_KEY = FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN

EK_CERTIFICATE_INDEX = _EK_CERTIFICATE_RSA_2048
"""NV index where the manufacturer put the certificate of `ENDORSEMENT_KEY`."""

EK_POLICY = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
"""PolicySecret(endorsement hierarchy): who may use the EK is who may use the hierarchy."""

_AES_128_CFB = u16(_AES) + u16(128) + u16(_CFB)
_EK_HEAD = u16(_RSA) + u16(ALG_SHA256) + u32(_KEY | ADMIN_WITH_POLICY | RESTRICTED | DECRYPT) + sized(EK_POLICY)
ENDORSEMENT_KEY_START = _EK_HEAD + _AES_128_CFB + u16(ALG_NULL) + u16(2048) + u32(0)
"""What the public area of every such EK starts with; its modulus follows."""
ENDORSEMENT_KEY = ENDORSEMENT_KEY_START + sized(bytes(256))
"""RSA 2048, restricted decryption: credentials are encrypted to it."""


def _ecc(attributes: int, symmetric: bytes, scheme: bytes, x: bytes) -> bytes:
    head = u16(_ECC) + u16(ALG_SHA256) + u32(_KEY | USER_WITH_AUTH | NO_DA | RESTRICTED | attributes) + sized(b"")
    return head + symmetric + scheme + u16(_P256) + u16(ALG_NULL) + sized(x) + sized(bytes(32))


def attestation_key(label: str = "cloister") -> bytes:
    """ECDSA P-256, restricted signing: it signs only what the TPM itself made. One key per label."""
    unique = hashlib.sha256(b"attestation key of " + label.encode()).digest()
    return _ecc(SIGN, u16(ALG_NULL), u16(_ECDSA) + u16(ALG_SHA256), unique)


STORAGE_ROOT_KEY = _ecc(DECRYPT, _AES_128_CFB, u16(ALG_NULL), bytes(32))
"""ECC P-256, restricted decryption: the parent of sealed data."""


def sealed_data(policy: bytes) -> bytes:
    """Data that only a session with this policy (32 bytes) may read; no password does."""
    head = u16(_KEYEDHASH) + u16(ALG_SHA256) + u32(FIXED_TPM | FIXED_PARENT | NO_DA)
    return head + sized(policy) + u16(ALG_NULL) + sized(b"")
