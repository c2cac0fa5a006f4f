"""Party keys, signatures, fingerprints, and secrets that do not print."""

import copy
import os
import pickle
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import x25519
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cloister.crypto.keys import DataKey, PartyKey, fingerprint, verify_signature
from cloister.errors import UsageError, VerificationError


def test_sign_and_verify() -> None:
    key = PartyKey.generate()
    verify_signature(key.public, "manifest", b"text", key.sign("manifest", b"text"))


def test_the_signature_is_plain_ed25519_over_the_documented_bytes() -> None:
    key = PartyKey.generate()
    parts = (b"cloister signature v1", b"manifest", b"text")
    message = b"".join(len(p).to_bytes(8, "big") + p for p in parts)
    Ed25519PublicKey.from_public_bytes(key.public).verify(key.sign("manifest", b"text"), message)


@pytest.mark.parametrize("change", ["label", "shift", "message", "signature", "short", "key", "bad key"])
def test_signature_refused(change: str) -> None:
    key = PartyKey.generate()
    public, label, message, signature = key.public, "manifest", b"text", key.sign("manifest", b"text")
    if change == "label":
        label = "approval"
    elif change == "shift":  # label and message must not be exchangeable at their border
        label, message = "manifestt", b"ext"
    elif change == "message":
        message = b"test"
    elif change == "signature":
        signature = signature[:-1] + bytes([signature[-1] ^ 1])
    elif change == "short":
        signature = signature[:10]
    elif change == "key":
        public = PartyKey.generate().public
    else:
        public = b"short"
    with pytest.raises(VerificationError) as refused:
        verify_signature(public, label, message, signature, where="hospital-a")
    assert (refused.value.code, refused.value.where) == ("signature", "hospital-a")


def test_save_and_load(tmp_path: Path) -> None:
    key = PartyKey.generate()
    path = tmp_path / "a.key"
    key.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().startswith("-----BEGIN PRIVATE KEY-----")
    loaded = PartyKey.load(path)
    assert loaded.public == key.public
    verify_signature(key.public, "x", b"y", loaded.sign("x", b"y"))


def test_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    PartyKey.generate().save(path)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        PartyKey.generate().save(path)
    assert path.read_bytes() == before
    with pytest.raises(UsageError, match="cannot write"):
        PartyKey.generate().save(tmp_path / "none" / "a.key")


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_refuses_a_key_that_others_can_reach(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "a.key"
    PartyKey.generate().save(path)
    path.chmod(mode)
    with pytest.raises(UsageError, match="others") as refused:
        PartyKey.load(path)
    assert "chmod 600" in refused.value.hint


def test_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        PartyKey.load(tmp_path / "absent")
    path = tmp_path / "k"
    path.write_bytes(b"no key")
    path.chmod(0o600)
    with pytest.raises(UsageError, match="PEM"):
        PartyKey.load(path)
    other = x25519.X25519PrivateKey.generate()
    path.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(UsageError, match="Ed25519"):
        PartyKey.load(path)


def test_fingerprint() -> None:
    a, b = PartyKey.generate().public, PartyKey.generate().public
    assert fingerprint(a) == fingerprint(a) != fingerprint(b)
    groups = fingerprint(a).split(" ")
    assert [len(g) for g in groups] == [4] * 8
    assert fingerprint(bytes(32)) == "a7a1 340a c24c a18f 9376 ced2 ed14 7937"


def test_secrets_do_not_print_or_travel() -> None:
    key, data_key = PartyKey.generate(), DataKey.generate()
    secret = data_key.reveal()
    assert secret.hex() not in repr(data_key) + str(data_key)
    assert repr(secret)[2:-1] not in repr(data_key)
    assert "***" in repr(key)
    for value in (key, data_key):
        with pytest.raises(TypeError):
            pickle.dumps(value)
        with pytest.raises(TypeError):
            copy.deepcopy(value)


def test_data_key() -> None:
    assert DataKey.generate().reveal() != DataKey.generate().reveal()
    with pytest.raises(ValueError, match="32 bytes"):
        DataKey(b"short")
