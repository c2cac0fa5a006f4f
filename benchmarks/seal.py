"""Rates of sealing, hashing, verifying and opening a bundle of 1 MiB chunks: medians of five, in GB/s.

python benchmarks/seal.py [--mib 512] [--folder /tmp]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister.crypto.bundle import BundleHeader, BundleWriter, SealedReader, verify_bundle
from cloister.crypto.keys import PartyKey

JOB = "ab" * 32
MIB = 1 << 20


def rate(name: str, size: int, work: Callable[[], object], repeats: int = 5) -> None:
    """Run `work` on `size` bytes `repeats` times; print median and spread."""
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        rates.append(size / (time.perf_counter() - start) / 1e9)
    print(f"{name:<42} {statistics.median(rates):6.2f} GB/s   ({min(rates):.2f} to {max(rates):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    size, piece = options.mib * MIB, os.urandom(MIB)
    key = PartyKey.generate()
    header = BundleHeader(
        job_id=JOB, party="bench", kind="train", schema={}, counts={}, chunk_bytes=MIB, max_payload_bytes=size
    )
    aead, out = AESGCM(bytes(32)), bytearray(MIB + 16)

    def encrypt() -> None:
        for index in range(options.mib):
            aead.encrypt_into(index.to_bytes(12, "big"), piece, b"", out)

    def hash_pieces() -> None:
        for _ in range(options.mib):
            hashlib.sha256(piece).digest()

    rate("AES-256-GCM encrypt_into alone", size, encrypt)
    rate("SHA-256 alone", size, hash_pieces)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "b"

        def seal() -> BundleWriter:
            with BundleWriter(path, header, key) as writer:
                for _ in range(options.mib):
                    writer.write(piece)
            return writer

        rate("seal to a file (encrypt, hash, write, sync)", size, seal)
        writer = seal()
        rate(
            "verify a file (read, hash)",
            size,
            lambda: verify_bundle(path, job_id=JOB, party="bench", public_key=key.public),
        )
        bundle = verify_bundle(path, job_id=JOB, party="bench", public_key=key.public)
        with SealedReader(bundle, writer.data_key) as reader:
            target = bytearray(MIB)

            def open_all() -> None:
                for index in range(options.mib):
                    reader.read_into(index * MIB, target)

            rate("open (read, hash, decrypt)", size, open_all)


if __name__ == "__main__":
    main()
