"""Sealed checkpoints on the enclave's disk, which its operator may read, copy, exchange and delete.

FOLDER/00000007.sealed        magic | u32 length | CBOR { seal, shares } | what is sealed
FOLDER/00000007.certificate   the seal with the parties' signatures, once a quorum has signed

A file appears whole and synced under its name or not at all, before anybody hears of it. The last two are kept.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hmac import compare_digest
from pathlib import Path

from cloister.agreement.checkpoint import MAX_RECORD_BYTES, Certificate, Seal, ShareRecord
from cloister.crypto.bundle.writer import disk_error
from cloister.crypto.encoding import Fields, encode
from cloister.crypto.sealing import write_durably
from cloister.errors import CloisterError, DataError, ProtocolError

MAGIC = b"CLSTRCP1"
KEPT = 2
_LENGTH_BYTES = 4
_MAX_HEAD_BYTES = MAX_RECORD_BYTES + (1 << 16)
_NAME = re.compile(r"(\d{8,})\.sealed")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A checkpoint on disk whose bytes are those that its seal names. Nobody has said yet that the seal is genuine."""

    seal: Seal
    record: ShareRecord
    path: Path
    offset: int

    def content(self) -> bytes:
        """What is sealed, unverified: opening it finds any change. Raises: DataError."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                return file.read()
        except OSError as exc:
            raise DataError(f"cannot read: {exc.strerror}", where=str(self.path)) from exc


class CheckpointFolder:
    """One job's checkpoints; made when the first is written."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def write(self, seal: Seal, record: ShareRecord, content: bytes) -> None:
        """Put a checkpoint on disk and drop all but the last two.

        Raises:
            CapacityError, DataError: it cannot be written; those before it are still there.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise disk_error(exc, self.folder, 0) from exc
        head = encode({"seal": seal.to_bytes(), "shares": record.to_bytes()})
        length = len(head).to_bytes(_LENGTH_BYTES, "big")
        write_durably(self._path(seal.number), MAGIC + length + head, content)
        for number in self._numbers():
            if not seal.number - KEPT < number <= seal.number:
                for path in (self._path(number), self._certificate_path(number)):
                    with suppress(OSError):  # the new one is there, and an old one does no harm
                        path.unlink(missing_ok=True)

    def write_certificate(self, certificate: Certificate) -> None:
        """Raises: CapacityError, DataError."""
        write_durably(self._certificate_path(certificate.seal.number), certificate.to_bytes())

    def newest(self) -> Stored | None:
        """The newest checkpoint that is whole. A damaged one is passed over: parties will notice if that matters."""
        for number in sorted(self._numbers(), reverse=True):
            try:
                return _read(self._path(number))
            except (CloisterError, OSError):
                continue
        return None

    def certificates(self) -> Iterator[Certificate]:
        """Those that can be read; unverified."""
        for number in sorted(self._numbers(), reverse=True):
            try:
                yield Certificate.from_bytes(self._certificate_path(number).read_bytes())
            except (CloisterError, OSError):
                continue

    def _numbers(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return [int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.sealed"

    def _certificate_path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.certificate"


def _read(path: Path) -> Stored:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        prefix = file.read(len(MAGIC) + _LENGTH_BYTES)
        length = int.from_bytes(prefix[len(MAGIC) :], "big")
        if not prefix.startswith(MAGIC) or len(prefix) != len(MAGIC) + _LENGTH_BYTES or length > _MAX_HEAD_BYTES:
            raise ProtocolError("this is no checkpoint", where=str(path))
        fields = Fields.decode(file.read(length), max_bytes=_MAX_HEAD_BYTES, what="checkpoint")
        seal = Seal.from_bytes(fields.blob("seal"))
        record = ShareRecord.from_bytes(fields.blob("shares", max_size=MAX_RECORD_BYTES + 1024))
        fields.end()
        while piece := file.read(1 << 20):
            digest.update(piece)
    if not compare_digest(digest.digest(), seal.content) or not compare_digest(record.sha256, seal.shares_sha256):
        raise ProtocolError("the checkpoint was altered", where=str(path))
    return Stored(seal=seal, record=record, path=path, offset=len(prefix) + length)
