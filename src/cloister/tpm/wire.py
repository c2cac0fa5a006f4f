"""Bytes of TPM 2.0 commands and responses: numbers big endian, a TPM2B is a length of two bytes and the bytes.

Source: TCG, "TPM 2.0 Library", revision 1.59: Part 1 section 18 (command and response structure), Part 2 sections 6
(constants), 10.5 (TPM2B), 10.6 (PCR selection), 10.13 (authorisation areas).
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

from cloister.errors import ProtocolError, RunError

MAX_FIELD_BYTES = 2048
NUM_PCRS = 24
PCR_BYTES = 32

TAG_NO_SESSIONS, TAG_SESSIONS = 0x8001, 0x8002
ALG_SHA1, ALG_SHA256, ALG_NULL = 0x0004, 0x000B, 0x0010

# Part 2, section 7.4 (TPM_RH) and 7.2 (types of handles).
RH_OWNER, RH_NULL, RH_PASSWORD, RH_ENDORSEMENT = 0x40000001, 0x40000007, 0x40000009, 0x4000000B
HT_NV, HT_LOADED_SESSION, HT_TRANSIENT = 0x01, 0x02, 0x80


class Command(IntEnum):
    """Part 2, section 6.5.2 (TPM_CC), those that we use."""

    NV_UNDEFINE_SPACE = 0x122
    NV_DEFINE_SPACE = 0x12A
    CREATE_PRIMARY = 0x131
    NV_INCREMENT = 0x134
    STARTUP = 0x144
    ACTIVATE_CREDENTIAL = 0x147
    NV_READ = 0x14E
    POLICY_SECRET = 0x151
    CREATE = 0x153
    LOAD = 0x157
    QUOTE = 0x158
    UNSEAL = 0x15E
    FLUSH_CONTEXT = 0x165
    NV_READ_PUBLIC = 0x169
    START_AUTH_SESSION = 0x176
    GET_CAPABILITY = 0x17A
    PCR_READ = 0x17E
    POLICY_PCR = 0x17F
    PCR_EXTEND = 0x182


# Part 2, section 6.6 (TPM_RC), what callers tell apart; in format 1 the number of the handle, parameter or session
# is masked out.
RC_INITIALIZE, RC_POLICY_FAIL, RC_HANDLE, RC_INTEGRITY, RC_NV_UNINITIALIZED = 0x100, 0x09D, 0x08B, 0x09F, 0x14A


class TpmError(RunError):
    """The TPM refused a command."""

    def __init__(self, command: Command, response_code: int) -> None:
        hint = "has somebody set a password for its owner or endorsement hierarchy? this program knows none"
        super().__init__(
            f"the TPM refused {command.name} with response code {response_code:#05x}",
            hint=hint if response_code & 0xBF == 0xA2 else "",  # TPM_RC_BAD_AUTH
        )
        self.command = command
        self.reason = response_code & 0xBF if response_code & 0x80 else response_code
        """The response code without the number of the handle, parameter or session."""


class Response:
    """Reads a response front to back; what does not fit is a ProtocolError."""

    def __init__(self, data: bytes, command: Command) -> None:
        self._data, self._at, self._command = data, 0, command

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        piece = self._data[self._at : self._at + size]
        if len(piece) < size:
            raise ProtocolError(f"the TPM's response to {self._command.name} is truncated")
        self._at += size
        return piece

    def number(self, size: int) -> int:
        """An unsigned number of `size` bytes."""
        return int.from_bytes(self.take(size), "big")

    def sized(self) -> bytes:
        """The bytes of a TPM2B."""
        size = self.number(2)
        if size > MAX_FIELD_BYTES:
            raise ProtocolError(f"the TPM's response to {self._command.name} has a field of {size} bytes")
        return self.take(size)

    def rest(self) -> bytes:
        """What is left."""
        return self.take(len(self._data) - self._at)

    def end(self) -> None:
        """Refuse bytes that nobody took."""
        if self._at != len(self._data):
            raise ProtocolError(f"the TPM's response to {self._command.name} is longer than expected")


def u8(value: int) -> bytes:
    return value.to_bytes(1, "big")


def u16(value: int) -> bytes:
    return value.to_bytes(2, "big")


def u32(value: int) -> bytes:
    return value.to_bytes(4, "big")


def sized(data: bytes) -> bytes:
    """A TPM2B."""
    return u16(len(data)) + data


def pcr_selection(pcrs: Iterable[int], algorithm: int = ALG_SHA256) -> bytes:
    """TPML_PCR_SELECTION of one bank."""
    bits = 0
    for pcr in pcrs:
        if not 0 <= pcr < NUM_PCRS:
            raise ValueError(f"a TPM has PCRs 0 to {NUM_PCRS - 1}, not {pcr}")
        bits |= 1 << pcr
    return u32(1) + u16(algorithm) + u8(NUM_PCRS // 8) + bits.to_bytes(NUM_PCRS // 8, "little")


def session(handle: int = RH_PASSWORD) -> bytes:
    """TPMS_AUTH_COMMAND: an empty password, or a policy session that goes on after the command."""
    return u32(handle) + sized(b"") + u8(1) + sized(b"")


def build(command: Command, handles: Iterable[int], sessions: Iterable[int], parameters: bytes) -> bytes:
    """A whole command; `sessions` authorise the first handles, in their order."""
    body = b"".join(map(u32, handles))
    authorisations = b"".join(map(session, sessions))
    if authorisations:
        body += u32(len(authorisations)) + authorisations
    body += parameters
    tag = TAG_SESSIONS if authorisations else TAG_NO_SESSIONS
    return u16(tag) + u32(10 + len(body)) + u32(command) + body


def parse(data: bytes, command: Command, *, has_handle: bool = False) -> tuple[int, Response]:
    """Take a whole response apart.

    Args:
        has_handle: whether a successful response to this command starts with a handle.
    Returns: the handle (0 without one), and the parameters.
    Raises: TpmError if the TPM refused, ProtocolError if the response is malformed.
    """
    response = Response(data, command)
    tag, size, response_code = response.number(2), response.number(4), response.number(4)
    if size != len(data) or tag not in (TAG_SESSIONS, TAG_NO_SESSIONS):
        raise ProtocolError(f"the TPM's response to {command.name} has a wrong tag or length")
    if response_code:
        raise TpmError(command, response_code)
    handle = response.number(4) if has_handle else 0
    parameters = response.take(response.number(4)) if tag == TAG_SESSIONS else response.rest()
    # Behind the parameters stand the sessions' acknowledgements: empty for passwords and for our policies.
    return handle, Response(parameters, command)
