"""TPM structures: what a restricted key signed over exactly these PCRs is read; everything else is refused."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from cloister.attest.backends.tpm_quote import (
    PublicKey,
    Quote,
    parse_public,
    rsa_public_key,
    rsassa_signature,
    verify_quote,
)  # fmt: skip
from cloister.errors import VerificationError
from tests.attest_ca.tpm_ca import (
    AK,
    CERTIFY,
    CREATION,
    DECRYPT,
    ECDSA,
    FIXED_PARENT,
    FIXED_TPM,
    MAGIC,
    NULL,
    ORIGIN,
    RESTRICTED,
    RESTRICTED_SIGNING,
    RSA_AK,
    RSAPSS,
    RSASSA,
    SHA1,
    SHA_256,
    SIGN,
    attest,
    b2,
    ecc_public,
    name_of,
    rsa_public,
    select,
    sign,
)  # fmt: skip

PCRS = {n: hashlib.sha256(bytes([n])).digest() for n in (0, 4, 7, 11)}
EXTRA = b"what was asked"


def refused(code: str, call: Callable[[], object]) -> str:
    with pytest.raises(VerificationError) as caught:
        call()
    assert caught.value.code == code, caught.value
    return str(caught.value)


def verify(
    message: bytes,
    signature: bytes | None = None,
    key: PublicKey | None = None,
    pcrs: dict[int, bytes] = PCRS,
) -> Quote:
    return verify_quote(message, sign(message) if signature is None else signature, key or AK.public_key(), pcrs)


# Keys -----------------------------------------------------------------------------------------------------------------


def test_a_p256_attestation_key() -> None:
    public = ecc_public()
    key = parse_public(public)
    assert key.name == name_of(public)
    assert key.public_key == AK.public_key()


@pytest.mark.parametrize("scheme", [RSASSA, RSAPSS])
@pytest.mark.parametrize("exponent", [0, 65537])
def test_an_rsa_attestation_key(scheme: int, exponent: int) -> None:
    public = rsa_public(scheme=scheme, exponent=exponent)
    key = parse_public(public)
    assert key.name == name_of(public)
    assert key.public_key == RSA_AK.public_key()


@pytest.mark.parametrize("missing", [FIXED_TPM, FIXED_PARENT, ORIGIN, RESTRICTED, SIGN])
def test_each_attribute_that_makes_an_attestation_key_is_needed(missing: int) -> None:
    assert "is not set" in refused(
        "tpm-key", lambda: parse_public(ecc_public(attributes=RESTRICTED_SIGNING & ~missing))
    )


@pytest.mark.parametrize("extra", [DECRYPT, 1 << 19])
def test_keys_that_can_do_more_are_refused(extra: int) -> None:
    assert "is set" in refused("tpm-key", lambda: parse_public(ecc_public(attributes=RESTRICTED_SIGNING | extra)))


@pytest.mark.parametrize(
    "public",
    [
        ecc_public(name_alg=SHA1), ecc_public(scheme=RSASSA), ecc_public(scheme=NULL), ecc_public(curve=4),
        ecc_public(point=(1, 1)), rsa_public(scheme=ECDSA), rsa_public(scheme=NULL), rsa_public(exponent=3),
        rsa_public(bits=1024, modulus=b"\x81" + bytes(126) + b"\x01"), rsa_public(modulus=b"\x80" + bytes(255)),
        struct.pack(">HHIH", 0x08, SHA_256, RESTRICTED_SIGNING, 0),
        ecc_public().replace(struct.pack(">HHH", NULL, ECDSA, SHA_256), struct.pack(">HHH", NULL, ECDSA, SHA1)),
        ecc_public().replace(struct.pack(">HHH", NULL, ECDSA, SHA_256), struct.pack(">HHH", 0x06, ECDSA, SHA_256)),
        ecc_public().replace(struct.pack(">HHH", SHA_256, 3, NULL), struct.pack(">HHH", SHA_256, 3, 0x22)),
    ],
)  # fmt: skip
def test_keys_that_are_no_attestation_keys_here(public: bytes) -> None:
    refused("tpm-key", lambda: parse_public(public))


@pytest.mark.parametrize("public", [ecc_public(), rsa_public()])
def test_public_areas_have_one_length(public: bytes) -> None:
    for size in range(len(public)):
        with pytest.raises(VerificationError) as caught:
            parse_public(public[:size])
        assert caught.value.code in {"evidence-format", "tpm-key"}
    refused("evidence-format", lambda: parse_public(public + b"\0"))
    assert "too long" in refused("evidence-format", lambda: parse_public(public + bytes(4096)))
    assert "truncated" in refused("evidence-format", lambda: parse_public(public[:-1]))


def test_an_authorisation_policy_changes_nothing_but_the_name() -> None:
    public = ecc_public().replace(
        struct.pack(">IH", RESTRICTED_SIGNING, 0), struct.pack(">I", RESTRICTED_SIGNING) + b2(EXTRA)
    )
    assert parse_public(public).public_key == AK.public_key()
    assert parse_public(public).name != parse_public(ecc_public()).name
    too_long = ecc_public().replace(
        struct.pack(">IH", RESTRICTED_SIGNING, 0), struct.pack(">IH", RESTRICTED_SIGNING, 65)
    )
    refused("evidence-format", lambda: parse_public(too_long))


def test_a_modulus_as_long_as_it_says() -> None:
    refused("evidence-format", lambda: parse_public(rsa_public(bits=3072)))


def test_rsa_keys_have_2048_to_4096_bits() -> None:
    def modulus(bits: int) -> bytes:
        return ((1 << bits - 1) + 1).to_bytes(bits // 8, "big")

    for bits in (2048, 3072, 4096):
        assert rsa_public_key(modulus(bits), 65537).key_size == bits
    for bits in (1024, 2040, 4104):
        refused("tpm-key", lambda bits=bits: rsa_public_key(modulus(bits), 65537))  # type: ignore[misc]
    refused("tpm-key", lambda: rsa_public_key(modulus(2048), 3))
    refused("tpm-key", lambda: rsa_public_key(b"", 65537))


# Quotes ---------------------------------------------------------------------------------------------------------------


def test_a_quote_by_each_kind_of_key() -> None:
    message = attest(PCRS, extra_data=EXTRA, resets=9)
    for signature, key in (
        (sign(message), AK.public_key()),
        (sign(message, RSA_AK), RSA_AK.public_key()),
        (sign(message, RSA_AK, pss=True), RSA_AK.public_key()),
    ):
        quote = verify(message, signature, key)
        assert quote.extra_data == EXTRA
        assert list(quote.pcrs.items()) == sorted(PCRS.items())
        assert (quote.clock_ms, quote.reset_count, quote.restart_count) == (123_456, 9, 1)
        assert quote.firmware_version == 0x20191023_00163636
        assert quote.qualified_signer == name_of(b"qualified")


def test_salts_as_long_as_they_can_be_are_tpms_too() -> None:
    message = attest(PCRS)
    pss = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=padding.PSS.MAX_LENGTH)
    raw = RSA_AK.sign(message, pss, hashes.SHA256())
    verify(message, struct.pack(">HH", RSAPSS, SHA_256) + b2(raw), RSA_AK.public_key())


def test_a_bare_number_as_signature() -> None:
    message = attest(PCRS)
    raw = RSA_AK.sign(message, padding.PKCS1v15(), hashes.SHA256())
    assert rsassa_signature(raw) == sign(message, RSA_AK)
    verify(message, rsassa_signature(raw), RSA_AK.public_key())


@pytest.mark.parametrize("key", [AK, RSA_AK])
def test_every_flipped_byte_of_quote_and_signature(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> None:
    message = attest(PCRS)
    signature = sign(message, key)
    for at in range(len(message)):
        flipped = message[:at] + bytes([message[at] ^ 1 << at % 8]) + message[at + 1 :]
        refused("signature", lambda flipped=flipped: verify(flipped, signature, key.public_key()))  # type: ignore[misc]
    for at in range(len(signature)):
        flipped = signature[:at] + bytes([signature[at] ^ 1 << at % 8]) + signature[at + 1 :]
        with pytest.raises(VerificationError) as caught:
            verify(message, flipped, key.public_key())
        assert caught.value.code in {"signature", "evidence-format"}


def test_signatures_of_another_kind_hash_or_length() -> None:
    message = attest(PCRS)
    good = sign(message)
    refused("signature", lambda: verify(message, sign(message, RSA_AK)))
    refused("signature", lambda: verify(message, good, RSA_AK.public_key()))
    refused("signature", lambda: verify(message, struct.pack(">HH", ECDSA, SHA1) + good[4:]))
    refused("signature", lambda: verify(message, struct.pack(">HH", RSASSA, SHA_256) + good[4:]))
    refused("signature", lambda: verify(message, struct.pack(">HH", NULL, SHA_256)))
    refused("evidence-format", lambda: verify(message, good + b"\0"))
    refused("evidence-format", lambda: verify(message, good[:-1]))
    refused("evidence-format", lambda: verify(message, sign(message, RSA_AK) + b"\0", RSA_AK.public_key()))
    refused("evidence-format", lambda: verify(message, good[:4] + b2(bytes(33)) + b2(bytes(32))))
    refused("signature", lambda: verify(message, good[:4] + b2(b"") + b2(b"")))


@pytest.mark.parametrize("magic", [bytes(4), b"GCT\xff", b"\xffTCF"])
def test_signed_but_not_made_by_a_tpm(magic: bytes) -> None:
    assert magic != MAGIC
    refused("tpm-quote", lambda: verify(attest(PCRS, magic=magic)))


@pytest.mark.parametrize("kind", [CERTIFY, CREATION, 0x8014, 0])
def test_signed_by_a_tpm_but_no_quote(kind: int) -> None:
    refused("tpm-quote", lambda: verify(attest(PCRS, kind=kind)))


@pytest.mark.parametrize(
    "selection",
    [
        select(PCRS, bank=SHA1),
        select(PCRS, bank=0x0C),
        struct.pack(">I", 2) + select(PCRS)[4:] + select(PCRS, bank=SHA1)[4:],
        struct.pack(">I", 2) + select(PCRS)[4:] + select(PCRS)[4:],
        struct.pack(">I", 0),
    ],
)
def test_another_bank_or_several(selection: bytes) -> None:
    refused("tpm-quote", lambda: verify(attest(PCRS, selection=selection)))


def test_pcrs_are_exactly_those_that_were_quoted() -> None:
    message = attest(PCRS)
    fewer = {n: v for n, v in PCRS.items() if n != 7}
    refused("pcr", lambda: verify(message, pcrs=fewer))
    refused("pcr", lambda: verify(message, pcrs=PCRS | {8: bytes(32)}))
    refused("pcr", lambda: verify(message, pcrs={}))
    refused("pcr", lambda: verify(message, pcrs={n + 1: v for n, v in PCRS.items()}))
    refused("pcr", lambda: verify(message, pcrs=PCRS | {4: PCRS[7], 7: PCRS[4]}))
    for pcr in PCRS:
        refused("pcr", lambda pcr=pcr: verify(message, pcrs=PCRS | {pcr: bytes(32)}))  # type: ignore[misc]
    refused("pcr", lambda: verify(attest(fewer, selection=select(PCRS))))
    refused("pcr", lambda: verify(attest({}), pcrs={}))


def test_boundaries_between_pcr_values_do_not_move() -> None:
    """Their digest is over all of them together: only the length keeps them apart."""
    two = {0: b"\x01" * 32, 1: b"\x02" * 32}
    moved = {0: b"\x01" * 31, 1: b"\x01" + b"\x02" * 32}
    refused("evidence-format", lambda: verify(attest(two), pcrs=moved))


def test_pcrs_that_no_tpm_has() -> None:
    beyond = PCRS | {24: bytes(32)}
    refused("pcr", lambda: verify(attest(beyond, selection=select(beyond, size=4)), pcrs=beyond))
    refused("evidence-format", lambda: verify(attest(PCRS, selection=select(PCRS, size=5))))
    assert verify(attest(PCRS, selection=select(PCRS, size=4))).pcrs == PCRS


def test_quotes_have_one_length() -> None:
    message = attest(PCRS)
    for size in range(len(message)):
        with pytest.raises(VerificationError) as caught:
            verify(message[:size])
        assert caught.value.code in {"evidence-format", "tpm-quote"}
    refused("evidence-format", lambda: verify(message + b"\0"))
    assert "truncated" in refused("evidence-format", lambda: verify(message[:-1]))
    refused("evidence-format", lambda: verify(attest(PCRS, extra_data=bytes(67))))
