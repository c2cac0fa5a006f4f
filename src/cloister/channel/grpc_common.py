"""What client and server share: method names, options, and refusals as gRPC status.

gRPC is only the carrier. It is neither trusted nor asked for encryption: sessions protect themselves, and so do sealed
bundles. So what a status says is as unauthenticated as a cut cable.
"""

from __future__ import annotations

import json

import grpc

from cloister.channel.limits import Limits
from cloister.channel.records import MAX_RECORD_BYTES
from cloister.channel.wire_errors import from_wire, to_wire
from cloister.crypto.bundle.header import MAX_HEADER_BYTES
from cloister.errors import BusyError, CloisterError, ProtocolError, TransportError

SERVICE = "cloister.v1.Enclave"
SESSION, UPLOAD, OFFSET = (f"/{SERVICE}/{name}" for name in ("Session", "Upload", "Offset"))
PIECE_BYTES = 1 << 20
MAX_CARRIER_BYTES = max(MAX_RECORD_BYTES, PIECE_BYTES) + (1 << 20)
"""Longest gRPC message: a record, a piece, or a handshake message with its evidence."""
MAX_METADATA_BYTES = 16 << 10
"""Headers of one call, gRPC's own included; a refusal travels in them, in four texts of at most 1,000 characters."""
MAX_UPLOAD_HEAD_BYTES = MAX_HEADER_BYTES + 1024

_KEEPALIVE_MS = 20_000


def common_options() -> list[tuple[str, int]]:
    """Options of both ends: large messages, dead peers found by pings, no proxies, no shared ports."""
    return [
        ("grpc.max_receive_message_length", MAX_CARRIER_BYTES),
        ("grpc.max_send_message_length", MAX_CARRIER_BYTES),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # none: nobody sends a little that becomes much
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.so_reuseport", 0),  # two enclaves on one port would share its connections: refuse instead
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]


_STATUS = {
    "BusyError": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "CapacityError": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "TransportError": grpc.StatusCode.DEADLINE_EXCEEDED,
    "ProtocolError": grpc.StatusCode.INVALID_ARGUMENT,
    "VerificationError": grpc.StatusCode.FAILED_PRECONDITION,
}


def server_options(limits: Limits) -> list[tuple[str, int]]:
    """Options of the enclave's end: `common_options`, and bounds that hold before any of our code runs."""
    return [
        *common_options(),
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.max_concurrent_streams", limits.max_calls_per_connection),
        ("grpc.server_handshake_timeout_ms", round(1000 * limits.greeting_timeout_s)),
        ("grpc.max_connection_idle_ms", round(1000 * limits.unused_timeout_s)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ]


def refusal(exc: CloisterError) -> tuple[grpc.StatusCode, str]:
    """Status and details that tell a peer why it is refused."""
    wire = to_wire(exc)
    return _STATUS.get(wire["kind"], grpc.StatusCode.ABORTED), json.dumps(wire)


def reported(exc: grpc.RpcError, *, address: str) -> CloisterError:
    """The error behind a failed call: what the peer reported, or that it could not be reached."""
    status, details = exc.code(), exc.details() or ""
    if details.startswith("{"):
        try:
            return from_wire(json.loads(details), peer="enclave")
        except (json.JSONDecodeError, RecursionError, ProtocolError):
            return ProtocolError("the enclave sent a malformed refusal", where=address)
    if status is grpc.StatusCode.UNAVAILABLE:
        hint = "is the enclave running, and is the address right?"
        return TransportError("the enclave cannot be reached or went away", where=address, hint=hint)
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return BusyError("the enclave has too many connections", where=address, hint="try again later")
    if status is grpc.StatusCode.UNIMPLEMENTED:
        return TransportError("there is no cloister enclave at this address", where=address)
    name = status.name.lower().replace("_", " ")
    return TransportError(f"the connection ended ({name})", where=address, hint="connect again")
