"""Wrapping secrets to a public key."""

import pickle

import pytest

from cloister.crypto.hpke import OVERHEAD_BYTES, PUBLIC_BYTES, HpkeKey, unwrap, wrap
from cloister.errors import VerificationError


def test_round_trip() -> None:
    key = HpkeKey.generate()
    assert len(key.public) == PUBLIC_BYTES
    wrapped = wrap(key.public, b"secret", b"manifest")
    assert len(wrapped) == len(b"secret") + OVERHEAD_BYTES
    assert unwrap(key, wrapped, b"manifest") == b"secret"
    assert wrap(key.public, b"secret", b"manifest") != wrapped


def test_every_altered_byte_is_found() -> None:
    key = HpkeKey.generate()
    wrapped = wrap(key.public, b"secret", b"i")
    for at in range(len(wrapped)):
        altered = wrapped[:at] + bytes([wrapped[at] ^ 0x40]) + wrapped[at + 1 :]
        with pytest.raises(VerificationError) as refused:
            key.unwrap(altered, b"i")
        assert refused.value.code == "unwrap"


def test_other_info_key_or_length() -> None:
    key = HpkeKey.generate()
    wrapped = wrap(key.public, b"secret", b"manifest 1")
    for private, data, info in (
        (key, wrapped, b"manifest 2"),
        (HpkeKey.generate(), wrapped, b"manifest 1"),
        (key, wrapped[:-1], b"manifest 1"),
        (key, wrapped + b"x", b"manifest 1"),
        (key, b"", b"manifest 1"),
    ):
        with pytest.raises(VerificationError, match="cannot be opened"):
            private.unwrap(data, info)


@pytest.mark.parametrize("public", [b"", b"\xff" * PUBLIC_BYTES, bytes(PUBLIC_BYTES), bytes(32)])
def test_malformed_public_key(public: bytes) -> None:
    with pytest.raises(VerificationError) as refused:
        wrap(public, b"secret", b"i")
    assert refused.value.code == "public-key"


def test_does_not_print() -> None:
    key = HpkeKey.generate()
    assert repr(key) == "HpkeKey(***)"
    with pytest.raises(TypeError):
        pickle.dumps(key)
