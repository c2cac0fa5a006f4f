"""Receiving a bundle: the server's half of an upload that can be cut at any byte and goes on from there.

Nothing is written before the signed header is verified, and never more than it allows. The bytes received so far are
the file `NAME.part`; its length is the offset at which to resume, after a restart of either side too. Everything is
hashed as it comes, so nothing is read again; a wrong byte is found at the end at the latest, and then the part is
discarded. The bytes come from an unauthenticated
connection: an active attacker on the network can force a repetition, never a wrong bundle.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path

from cloister.crypto.bundle.header import BundleHeader, UnverifiedHeader
from cloister.crypto.bundle.scan import BundleScanner
from cloister.crypto.bundle.verify import VerifiedBundle, scan_file, verify_bundle
from cloister.crypto.bundle.writer import disk_error, remove_part, sync_folder, write_all
from cloister.errors import CapacityError, CloisterError, DataError, ProtocolError, VerificationError

MAX_BEGINNINGS = 64
"""How often a party may begin one bundle anew while this process runs: each discards what came of the one before."""


class IncomingBundle:
    """One expected bundle. Safe to call from several connections: bytes are taken only at the current offset.

    Args:
        chunk_bytes: the job's. A hash of 32 bytes is kept of every chunk, so that a party that chose small ones could
            make memory grow with what it sends.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        job_id: str,
        party: str,
        public_key: bytes,
        chunk_bytes: int,
        max_payload_bytes: int,
    ) -> None:
        self.path = Path(path)
        self.part = self.path.with_name(self.path.name + ".part")
        self.bundle: VerifiedBundle | None = None
        """Set once the whole bundle has arrived and holds."""
        self._job_id = job_id
        self._party = party
        self._public_key = public_key
        self._chunk_bytes = chunk_bytes
        self._max_payload_bytes = max_payload_bytes
        self._lock = threading.Lock()
        self._header: BundleHeader | None = None
        self._prefix = b""
        self._size = 0
        self._scanner: BundleScanner | None = None
        self._begun = 0

    def check(self, unverified: UnverifiedHeader) -> BundleHeader:
        """The header, if it is this party's for this job. Touches no disk. Raises: VerificationError."""
        return unverified.verify(job_id=self._job_id, party=self._party, public_key=self._public_key)

    def begin(self, encoded_header: bytes, signature: bytes) -> int:
        """Verify the signed header and return the offset in the bundle's file from which to send.

        A part with another header is discarded: that bundle was begun anew by its party.

        Raises: VerificationError if the header is not this party's for this job, or its chunks are of another size;
            CapacityError if it claims more than this server takes, or the bundle was begun anew too often;
            ProtocolError if another bundle is complete already.
        """
        unverified = UnverifiedHeader.parse(encoded_header, signature)
        header = self.check(unverified)
        if header.chunk_bytes != self._chunk_bytes:
            message = f"the bundle has chunks of {header.chunk_bytes} bytes, the job has {self._chunk_bytes}"
            raise VerificationError("header", message, where=self._party, hint="seal it with [transport] chunk_mib")
        if header.max_payload_bytes > self._max_payload_bytes:
            raise CapacityError(
                f"the bundle may hold {header.max_payload_bytes} bytes, this enclave takes {self._max_payload_bytes}",
                where=self._party,
            )
        with self._lock:
            self._resume_complete(unverified.prefix)
            if self.bundle is not None:
                return self.path.stat().st_size
            if self._prefix != unverified.prefix:
                self._resume_part(header, unverified.prefix)
            elif self._scanner is not None and self._scanner.done:  # publishing failed the last time
                self._publish(header, self._scanner, 0)
            return self._size

    def feed(self, offset: int, data: bytes) -> bool:
        """Append bytes that begin at `offset` of the bundle's file; return whether the bundle is complete.

        Raises: ProtocolError for another offset than the current one or bytes after the end; VerificationError if
            the bundle does not hold (its part is then discarded); CapacityError if the disk is full (what was
            written stays).
        """
        with self._lock:
            header, scanner = self._header, self._scanner
            if header is None:
                raise RuntimeError("feed before begin")
            if self.bundle is not None or scanner is None or offset != self._size:
                raise ProtocolError(f"bytes for offset {offset} while the next is {self._size}", where=self._party)
            if self._size + len(data) > header.max_file_bytes:
                raise ProtocolError("more bytes than the bundle's signed header allows", where=self._party)
            before = self._size
            try:
                self._append(data)
            finally:  # a disk that is full has still taken some
                excess = self._scan(scanner, memoryview(data)[: self._size - before])
            if not scanner.done:
                return False
            self._publish(header, scanner, excess)
            if excess:  # the bundle is here and holds; what came behind it is gone
                raise ProtocolError("there are bytes after the bundle's end", where=self._party)
            return True

    @property
    def offset(self) -> int:
        """How many bytes of the bundle's file are here."""
        with self._lock:
            return self._size

    def _resume_complete(self, prefix: bytes) -> None:
        """Take up a complete file that is here from before a restart, or refuse another bundle in its place."""
        if self.bundle is None and self.path.exists():
            try:
                self.bundle = verify_bundle(
                    self.path, job_id=self._job_id, party=self._party, public_key=self._public_key
                )
            except VerificationError:
                _remove(self.path)  # damaged since it arrived: it is fetched again
                return
            with self.path.open("rb") as file:
                self._prefix = file.read(self.bundle.data_offset)
            self._header, self._size = self.bundle.header, self.path.stat().st_size
        if self.bundle is not None and self._prefix != prefix:
            hint = "send the bundle that was sent before; a job takes each bundle once"
            raise ProtocolError("another bundle is here already, complete", where=self._party, hint=hint)

    def _resume_part(self, header: BundleHeader, prefix: bytes) -> None:
        try:
            with self.part.open("rb") as file:
                same = file.read(len(prefix)) == prefix
            size = self.part.stat().st_size
        except FileNotFoundError:
            same, size = False, 0
        except OSError as exc:
            raise DataError(f"cannot read: {exc.strerror}", where=str(self.part)) from exc
        if not same:
            self._count_beginning()
        self._header, self._prefix, self._size = header, prefix, 0
        self._scanner = scanner = BundleScanner(header, self._public_key)
        if not same:
            _remove(self.part)
            try:
                self._append(prefix)
            except CloisterError:
                self._discard()  # half a prefix is nothing to resume from
                raise
            return
        self._size = size
        with self.part.open("rb") as file:
            file.seek(len(prefix))
            try:
                in_buffer = scan_file(file, scanner)
            except VerificationError:
                self._discard()
                raise
            excess = size - file.tell() + in_buffer
        if scanner.done:
            self._publish(header, scanner, excess)

    def _count_beginning(self) -> None:
        """A party that crashes while it writes its bundle begins anew; one that does so without end is stopped."""
        if self._begun == MAX_BEGINNINGS:
            message = f"this bundle was begun anew {MAX_BEGINNINGS} times"
            raise CapacityError(message, where=self._party, hint="a restarted enclave counts anew")
        self._begun += 1

    def _append(self, data: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        header = self._header
        needed = header.max_file_bytes - self._size if header else len(data)
        try:
            fd = os.open(self.part, flags, 0o600)
        except OSError as exc:
            raise disk_error(exc, self.part, needed) from exc
        try:
            write_all(fd, data)
        except OSError as exc:
            raise disk_error(exc, self.part, needed) from exc
        finally:
            # A write that failed half-way has kept good bytes: the next offset is the file's length.
            self._size = os.fstat(fd).st_size
            os.close(fd)

    def _scan(self, scanner: BundleScanner, data: memoryview) -> int:
        try:
            return scanner.feed(data)
        except VerificationError:
            self._discard()
            raise

    def _publish(self, header: BundleHeader, scanner: BundleScanner, excess: int) -> None:
        """Make a part that holds durable and give it its name."""
        try:
            with self.part.open("rb+") as file:
                self._size -= excess
                file.truncate(self._size)
                os.fsync(file.fileno())
            self.part.replace(self.path)
            sync_folder(self.path)
        except OSError as exc:
            raise disk_error(exc, self.path, 0) from exc
        self.bundle = VerifiedBundle.from_scan(self.path, header, len(self._prefix), scanner)

    def _discard(self) -> None:
        remove_part(self.part)  # a part that stays is found to be wrong again
        self._header, self._scanner, self._prefix, self._size = None, None, b"", 0


def _remove(path: Path) -> None:
    """Raises: DataError."""
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        raise disk_error(exc, path, 0) from exc


class IncomingStore:
    """The bundles that an enclave expects, one per party and kind, in one folder (`PARTY.KIND.bundle`)."""

    def __init__(
        self,
        folder: Path | str,
        *,
        job_id: str,
        public_keys: Mapping[str, bytes],
        chunk_bytes: int,
        max_payload_bytes: int,
    ) -> None:
        self.folder = Path(folder)
        self._job_id = job_id
        self._public_keys = dict(public_keys)
        self._chunk_bytes = chunk_bytes
        self._max_payload_bytes = max_payload_bytes
        self._bundles: dict[tuple[str, str], IncomingBundle] = {}
        self._lock = threading.Lock()

    def __call__(self, header: BundleHeader) -> IncomingBundle:
        """The bundle that an unverified header claims to be; `begin` then verifies it.

        Raises: VerificationError("party") for a party that is not in the job.
        """
        return self.expected(header.party, header.kind)

    def expected(self, party: str, kind: str) -> IncomingBundle:
        """The one object for this party and kind. Raises: VerificationError("party") for a stranger."""
        if party not in self._public_keys:
            raise VerificationError("party", "the bundle is of a party that is not in the job", where=party)
        with self._lock:
            if (party, kind) not in self._bundles:
                self._bundles[party, kind] = IncomingBundle(
                    self.folder / f"{party}.{kind}.bundle",
                    job_id=self._job_id,
                    party=party,
                    public_key=self._public_keys[party],
                    chunk_bytes=self._chunk_bytes,
                    max_payload_bytes=self._max_payload_bytes,
                )
            return self._bundles[party, kind]
