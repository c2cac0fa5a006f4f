"""The TPM 2.0 commands that attestation, sealing and rollback counters need, one method each.

Authorisations are empty passwords and policies: what a TPM protects here, it protects by PCRs and by who may open the
device. Secrets cross the bus to the TPM unencrypted; a TPM hides nothing from who controls its machine anyway.

Source: TCG, "TPM 2.0 Library, Part 3: Commands", revision 1.59; each method names its command.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

from cloister.errors import ProtocolError
from cloister.tpm import templates
from cloister.tpm.device import Device, is_software, open_device
from cloister.tpm.wire import (
    ALG_NULL,
    ALG_SHA256,
    HT_LOADED_SESSION,
    HT_NV,
    HT_TRANSIENT,
    PCR_BYTES,
    RC_HANDLE,
    RC_INITIALIZE,
    RC_NV_UNINITIALIZED,
    RH_ENDORSEMENT,
    RH_NULL,
    RH_OWNER,
    RH_PASSWORD,
    Command,
    Response,
    TpmError,
    build,
    parse,
    pcr_selection,
    sized,
    u8,
    u16,
    u32,
)

_CAPABILITY_HANDLES = 1
_POLICY_SESSION = 1
_NV_COUNTER_ATTRIBUTES = 1 << 1 | 1 << 4 | 1 << 17 | 1 << 25
"""Part 2, section 13.4: OWNERWRITE, type counter, OWNERREAD, NO_DA."""
_NV_CHUNK_BYTES = 512
_MAX_CERTIFICATE_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """An object in the TPM."""

    handle: int
    public: bytes
    """TPMT_PUBLIC."""
    name: bytes
    """nameAlg and SHA-256 of `public`: 34 bytes."""


class Tpm:
    """One open TPM.

    with Tpm.open("/dev/tpmrm0") as tpm, tpm.primary(RH_OWNER, templates.STORAGE_ROOT_KEY) as root: ...
    """

    def __init__(self, device: Device) -> None:
        self.device = device

    @classmethod
    def open(cls, address: str) -> Tpm:
        """Open the TPM at an address (see `tpm.device`), started and with nothing left behind by others."""
        tpm = cls(open_device(address))
        try:
            tpm.startup()
            if is_software(address):
                tpm.flush_stale()
        except BaseException:
            tpm.device.close()
            raise
        return tpm

    def __enter__(self) -> Tpm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.device.close()

    def run(
        self,
        command: Command,
        handles: Sequence[int] = (),
        parameters: bytes = b"",
        *,
        sessions: Sequence[int] = (),
        has_handle: bool = False,
    ) -> tuple[int, Response]:
        """Send a command; see `wire.build` and `wire.parse`."""
        request = build(command, handles, sessions, parameters)
        return parse(self.device.transmit(request), command, has_handle=has_handle)

    def startup(self) -> None:
        """TPM2_Startup(CLEAR), if the firmware has not done it."""
        try:
            self.run(Command.STARTUP, parameters=u16(0))
        except TpmError as exc:
            if exc.reason != RC_INITIALIZE:
                raise

    def flush_stale(self) -> None:
        """Flush what a client that died left loaded: swtpm has no resource manager and serves one client at a time.

        Never on a device: there the resource manager does it, and other sessions may be somebody's.
        """
        for kind in (HT_TRANSIENT, HT_LOADED_SESSION):
            parameters = u32(_CAPABILITY_HANDLES) + u32(kind << 24) + u32(16)
            _, response = self.run(Command.GET_CAPABILITY, parameters=parameters)
            response.take(5)  # more data follow; the capability again
            for handle in [response.number(4) for _ in range(min(response.number(4), 16))]:
                self.flush(handle)

    # Objects ----------------------------------------------------------------------------------------------------------

    def create_primary(self, hierarchy: int, template: bytes) -> Loaded:
        """TPM2_CreatePrimary: derive a key from the hierarchy's seed."""
        parameters = sized(sized(b"") + sized(b"")) + sized(template) + sized(b"") + u32(0)
        handle, response = self.run(
            Command.CREATE_PRIMARY, (hierarchy,), parameters, sessions=(RH_PASSWORD,), has_handle=True
        )
        public = response.sized()
        response.sized(), response.sized(), response.take(6), response.sized()  # creation data, hash and ticket
        return Loaded(handle=handle, public=public, name=response.sized())

    @contextmanager
    def primary(self, hierarchy: int, template: bytes) -> Iterator[Loaded]:
        """`create_primary` for the time of a block."""
        loaded = self.create_primary(hierarchy, template)
        try:
            yield loaded
        finally:
            self.flush(loaded.handle)

    def create(self, parent: Loaded, template: bytes, data: bytes = b"") -> tuple[bytes, bytes]:
        """TPM2_Create. Returns: the private part, encrypted by the TPM, and the public area."""
        parameters = sized(sized(b"") + sized(data)) + sized(template) + sized(b"") + u32(0)
        _, response = self.run(Command.CREATE, (parent.handle,), parameters, sessions=(RH_PASSWORD,))
        return response.sized(), response.sized()

    @contextmanager
    def load(self, parent: Loaded, private: bytes, public: bytes) -> Iterator[Loaded]:
        """TPM2_Load, for the time of a block."""
        handle, response = self.run(
            Command.LOAD, (parent.handle,), sized(private) + sized(public), sessions=(RH_PASSWORD,), has_handle=True
        )
        try:
            yield Loaded(handle=handle, public=public, name=response.sized())
        finally:
            self.flush(handle)

    def flush(self, handle: int) -> None:
        """TPM2_FlushContext."""
        self.run(Command.FLUSH_CONTEXT, parameters=u32(handle))

    # Sessions and enrolment -------------------------------------------------------------------------------------------

    @contextmanager
    def policy_session(self) -> Iterator[int]:
        """TPM2_StartAuthSession, of type policy, unbound and unsalted. Yields its handle."""
        parameters = sized(os.urandom(16)) + sized(b"") + u8(_POLICY_SESSION) + u16(ALG_NULL) + u16(ALG_SHA256)
        handle, _ = self.run(Command.START_AUTH_SESSION, (RH_NULL, RH_NULL), parameters, has_handle=True)
        try:
            yield handle
        finally:
            self.flush(handle)

    def policy_secret(self, session: int, hierarchy: int = RH_ENDORSEMENT) -> None:
        """TPM2_PolicySecret: prove to the session that we may use the hierarchy."""
        parameters = sized(b"") + sized(b"") + sized(b"") + u32(0)
        self.run(Command.POLICY_SECRET, (hierarchy, session), parameters, sessions=(RH_PASSWORD,))

    def activate_credential(self, key: Loaded, endorsement_key: Loaded, credential: bytes, seed: bytes) -> bytes:
        """TPM2_ActivateCredential: the secret, if both keys live in this TPM and `credential` names `key`."""
        with self.policy_session() as session:
            self.policy_secret(session)
            _, response = self.run(
                Command.ACTIVATE_CREDENTIAL,
                (key.handle, endorsement_key.handle),
                sized(credential) + sized(seed),
                sessions=(RH_PASSWORD, session),
            )
        return response.sized()

    def endorsement_certificate(self) -> bytes | None:
        """What the manufacturer stored about the EK: DER, maybe padded; None without one."""
        index = templates.EK_CERTIFICATE_INDEX
        try:
            size = self.nv_size(index)
        except TpmError as exc:
            if exc.reason != RC_HANDLE:
                raise
            return None
        if size > _MAX_CERTIFICATE_BYTES:
            raise ProtocolError(f"the TPM announces an endorsement certificate of {size} bytes")
        return b"".join(
            self.nv_read(index, min(_NV_CHUNK_BYTES, size - at), at) for at in range(0, size, _NV_CHUNK_BYTES)
        )

    # Measuring and quoting --------------------------------------------------------------------------------------------

    def quote(self, key: Loaded, extra_data: bytes, pcrs: Iterable[int]) -> tuple[bytes, bytes]:
        """TPM2_Quote over the SHA-256 bank. Returns: TPMS_ATTEST and TPMT_SIGNATURE."""
        parameters = sized(extra_data) + u16(ALG_NULL) + pcr_selection(pcrs)
        _, response = self.run(Command.QUOTE, (key.handle,), parameters, sessions=(RH_PASSWORD,))
        return response.sized(), response.rest()

    def pcr_read(self, pcrs: Iterable[int]) -> dict[int, bytes]:
        """TPM2_PCR_Read of the SHA-256 bank: 32 bytes each. A TPM gives eight at a time."""
        wanted = sorted(set(pcrs))
        values: dict[int, bytes] = {}
        for start in range(0, len(wanted), 8):
            batch = wanted[start : start + 8]
            _, response = self.run(Command.PCR_READ, parameters=pcr_selection(batch))
            response.take(4)  # a counter of changes
            selected, count = response.take(10), response.number(4)
            if selected != pcr_selection(batch) or count != len(batch):
                raise ProtocolError("the TPM has no SHA-256 bank, or not all of these PCRs")
            values |= {pcr: response.sized() for pcr in batch}
            response.end()
        if any(len(value) != PCR_BYTES for value in values.values()):
            raise ProtocolError("the TPM gave a PCR that is not as long as a SHA-256 digest")
        return values

    def pcr_extend(self, pcr: int, digest: bytes) -> None:
        """TPM2_PCR_Extend of the SHA-256 bank: the PCR becomes SHA-256(its value, digest)."""
        if len(digest) != PCR_BYTES:
            raise ValueError(f"a digest has {PCR_BYTES} bytes")
        self.run(Command.PCR_EXTEND, (pcr,), u32(1) + u16(ALG_SHA256) + digest, sessions=(RH_PASSWORD,))

    # Sealing ----------------------------------------------------------------------------------------------------------

    def seal(self, data: bytes, pcrs: Mapping[int, bytes]) -> tuple[bytes, bytes]:
        """Seal at most 128 bytes to PCR values (those now, or others that will be). Returns: see `create`."""
        with self.primary(RH_OWNER, templates.STORAGE_ROOT_KEY) as root:
            return self.create(root, templates.sealed_data(pcr_policy(pcrs)), data)

    def unseal(self, private: bytes, public: bytes, pcrs: Iterable[int]) -> bytes:
        """TPM2_Unseal. Raises: TpmError, reason RC_POLICY_FAIL, if one of the PCRs has another value now."""
        with (
            self.primary(RH_OWNER, templates.STORAGE_ROOT_KEY) as root,
            self.load(root, private, public) as loaded,
            self.policy_session() as session,
        ):
            self.run(Command.POLICY_PCR, (session,), sized(b"") + pcr_selection(pcrs))
            _, response = self.run(Command.UNSEAL, (loaded.handle,), sessions=(session,))
        return response.sized()

    # Counters that survive power loss and never go back ---------------------------------------------------------------

    def nv_define_counter(self, index: int) -> None:
        """TPM2_NV_DefineSpace: a counter of 64 bits. It starts above the highest one that this TPM ever had."""
        public = u32(HT_NV << 24 | index) + u16(ALG_SHA256) + u32(_NV_COUNTER_ATTRIBUTES) + sized(b"") + u16(8)
        self.run(Command.NV_DEFINE_SPACE, (RH_OWNER,), sized(b"") + sized(public), sessions=(RH_PASSWORD,))

    def nv_undefine(self, index: int) -> None:
        """TPM2_NV_UndefineSpace."""
        self.run(Command.NV_UNDEFINE_SPACE, (RH_OWNER, HT_NV << 24 | index), sessions=(RH_PASSWORD,))

    def nv_increment(self, index: int) -> int:
        """TPM2_NV_Increment. Returns: the new value."""
        self.run(Command.NV_INCREMENT, (RH_OWNER, HT_NV << 24 | index), sessions=(RH_PASSWORD,))
        value = self.nv_counter(index)
        if value is None:
            raise ProtocolError("the TPM counted, but has no value")
        return value

    def nv_counter(self, index: int) -> int | None:
        """The counter's value; None before the first increment."""
        try:
            return int.from_bytes(self.nv_read(HT_NV << 24 | index, 8, authorised_by=RH_OWNER), "big")
        except TpmError as exc:
            if exc.reason != RC_NV_UNINITIALIZED:
                raise
            return None

    def nv_size(self, handle: int) -> int:
        """TPM2_NV_ReadPublic: how many bytes an index holds. Raises: TpmError, reason RC_HANDLE, if there is none."""
        _, response = self.run(Command.NV_READ_PUBLIC, (handle,))
        return int.from_bytes(response.sized()[-2:], "big")

    def nv_read(self, handle: int, size: int, offset: int = 0, *, authorised_by: int | None = None) -> bytes:
        """TPM2_NV_Read; without `authorised_by` with the index' own empty password."""
        by = handle if authorised_by is None else authorised_by
        _, response = self.run(Command.NV_READ, (by, handle), u16(size) + u16(offset), sessions=(RH_PASSWORD,))
        return response.sized()


def pcr_policy(pcrs: Mapping[int, bytes]) -> bytes:
    """The policy "these PCRs have these values", 32 bytes (TPM2_PolicyPCR, section 23.7, from an empty policy)."""
    values = hashlib.sha256(b"".join(pcrs[pcr] for pcr in sorted(pcrs))).digest()
    return hashlib.sha256(bytes(32) + u32(Command.POLICY_PCR) + pcr_selection(pcrs) + values).digest()


def extended(value: bytes, digest: bytes) -> bytes:
    """What a PCR of the SHA-256 bank becomes."""
    return hashlib.sha256(value + digest).digest()
