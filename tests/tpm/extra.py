"""Commands that attackers send and Cloister never does ("TPM 2.0 Library, Part 3")."""

from __future__ import annotations

from enum import IntEnum

from cloister.tpm.commands import Loaded, Tpm
from cloister.tpm.wire import ALG_NULL, RH_PASSWORD, Command, Response, pcr_selection, sized, u16


class Extra(IntEnum):
    PCR_RESET = 0x13D
    CERTIFY = 0x148
    GET_TIME = 0x14C
    SIGN = 0x15D


def send(tpm: Tpm, command: Extra, handles: tuple[int, ...], parameters: bytes = b"") -> Response:
    """Every handle is authorised by an empty password."""
    sessions = (RH_PASSWORD,) * len(handles)
    return tpm.run(command, handles, parameters, sessions=sessions)[1]  # type: ignore[arg-type]


def certify(tpm: Tpm, what: Loaded, key: Loaded, extra_data: bytes) -> tuple[bytes, bytes]:
    """A signed statement about an object: made and signed by the TPM, but no quote."""
    response = send(tpm, Extra.CERTIFY, (what.handle, key.handle), sized(extra_data) + u16(ALG_NULL))
    return response.sized(), response.rest()


def quote_bank(tpm: Tpm, key: Loaded, extra_data: bytes, pcrs: range, algorithm: int) -> tuple[bytes, bytes]:
    """A quote over another bank."""
    parameters = sized(extra_data) + u16(ALG_NULL) + pcr_selection(pcrs, algorithm)
    _, response = tpm.run(Command.QUOTE, (key.handle,), parameters, sessions=(RH_PASSWORD,))
    return response.sized(), response.rest()
