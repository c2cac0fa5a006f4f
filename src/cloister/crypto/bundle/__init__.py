"""Sealed bundles: a party's activations as an ordinary file that only the attested enclave can open.

    magic "CLSTRBN1" | u32 length | header (canonical CBOR) | header signature (64)
    per chunk:  u32 (length, top bit = last) | AES-256-GCM ciphertext and tag
    u32 length | trailer (canonical CBOR: payload_bytes, commitment, signature)

All integers are big endian. Every chunk but the last holds exactly `chunk_bytes`; the last holds at least one byte
unless the payload is empty. A bundle's data key encrypts that bundle and nothing else, so the chunk counter is a
nonce that never repeats. The file can be read from the front without knowing its size: nothing may follow it.
"""

from cloister.crypto.bundle.header import BundleHeader, UnverifiedHeader, read_header
from cloister.crypto.bundle.incoming import IncomingBundle, IncomingStore
from cloister.crypto.bundle.reader import SealedReader
from cloister.crypto.bundle.verify import VerifiedBundle, verify_bundle
from cloister.crypto.bundle.writer import BundleWriter

__all__ = [
    "BundleHeader",
    "BundleWriter",
    "IncomingBundle",
    "IncomingStore",
    "SealedReader",
    "UnverifiedHeader",
    "VerifiedBundle",
    "read_header",
    "verify_bundle",
]
