"""The carrier's public names: what enclave and party processes import."""

from cloister.channel.client import connect, upload
from cloister.channel.limits import Limits
from cloister.channel.rpc import Session
from cloister.channel.server import EnclaveServer

__all__ = ["EnclaveServer", "Limits", "Session", "connect", "upload"]
