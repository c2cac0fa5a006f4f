"""Every error a user can meet, in one tree.

    CloisterError                 code        exit
    ├── UsageError                usage       2     a command was called wrongly
    ├── JobError                  job         2     the job file is wrong
    ├── DataError                 data        2     a record or data file is wrong
    ├── ModelError                model       2     a model folder or its anatomy is wrong
    ├── AdapterError              adapter     2     an adapter's settings or files are wrong
    ├── CapacityError             capacity    1     disk, memory or a declared limit is exhausted
    ├── RunError                  failed      1     a run could not be finished
    ├── VerificationError         its check   3     evidence, signature, tag or policy refused
    ├── ProtocolError             protocol    4     a peer sent what it must not send
    ├── TransportError            transport   4     a peer cannot be reached or went away
    │   └── BusyError             busy        4     a peer has no free place at the moment
    └── AcceleratorError          accelerator 4     an accelerator was lost in the middle of work

`message` says what is wrong, `where` says where (file, line, field, party), `hint` says what to do. None of them
ever holds a secret. Wrong use of our own functions by our own code raises RuntimeError, ValueError or TypeError.
"""

from __future__ import annotations

from typing import ClassVar


class CloisterError(Exception):
    """Base of all errors that a command reports without a traceback."""

    code: str = "failed"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message

    def to_json(self) -> dict[str, dict[str, str]]:
        """The object that `--json` prints for a failure."""
        return {"error": {"code": self.code, "message": self.message, "where": self.where, "hint": self.hint}}


class UsageError(CloisterError):
    """A command was called with arguments that do not fit together."""

    code = "usage"
    exit_code = 2


class JobError(CloisterError):
    """The job file is malformed, incomplete or asks for something this version does not do."""

    code = "job"
    exit_code = 2


class DataError(CloisterError):
    """A data file is missing or a record in it is malformed."""

    code = "data"
    exit_code = 2


class ModelError(CloisterError):
    """A model folder is incomplete or its anatomy is not understood."""

    code = "model"
    exit_code = 2


class AdapterError(CloisterError):
    """An adapter's settings match nothing in the model, or its files do not fit it."""

    code = "adapter"
    exit_code = 2


class CapacityError(CloisterError):
    """Disk, memory or a declared limit is exhausted."""

    code = "capacity"
    exit_code = 1


class RunError(CloisterError):
    """A run could not be finished."""

    code = "failed"
    exit_code = 1


class VerificationError(CloisterError):
    """Evidence, a signature, an authentication tag or a policy check was refused.

    `code` names the check that failed, so that a caller can tell them apart without reading the message.
    """

    exit_code = 3

    def __init__(self, code: str, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message, where=where, hint=hint)
        self.code = code


class ProtocolError(CloisterError):
    """A peer sent something that the protocol does not allow at this point."""

    code = "protocol"
    exit_code = 4


class TransportError(CloisterError):
    """A peer cannot be reached, went away, or did not answer in time."""

    code = "transport"
    exit_code = 4


class BusyError(TransportError):
    """A peer has no free place at the moment; the same request may succeed later."""

    code = "busy"


class AcceleratorError(CloisterError):
    """An accelerator was lost in the middle of work: its weights and the pads of what was asked are gone with it."""

    code = "accelerator"
    exit_code = 4
