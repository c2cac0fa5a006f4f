"""Helpers: both ends of a handshake in memory, with attesters that count."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

from cloister.attest.backends.simulated import InsecureSimulatedAttester
from cloister.attest.claims import Claims
from cloister.attest.evidence import Evidence
from cloister.attest.policy import AppraisalPolicy
from cloister.attest.verify import verify
from cloister.channel.handshake import Established, Initiator, Responder, ResponderSettings
from cloister.channel.rpc import Handler, Session, serve
from cloister.crypto.keys import PartyKey
from cloister.errors import CloisterError, TransportError

JOB = "ab" * 32
PARTY = "hospital-a"
NOW = 1_800_000_000.0
MEASUREMENT = b"m" * 32
KEY = PartyKey.generate()


def appraise(evidence: Evidence, report_data: bytes, now: float) -> Claims:
    policy = AppraisalPolicy.insecure_simulated_only(MEASUREMENT)
    return verify(evidence, policy, report_data, now, allow_simulated=True)


class CountingAttester:
    """A simulated TEE that remembers what it signed."""

    type = "simulated"

    def __init__(self, measurement: bytes = MEASUREMENT) -> None:
        self.asked: list[bytes] = []
        self.collected: list[Evidence] = []
        self._real = InsecureSimulatedAttester(measurement=measurement, clock=lambda: NOW)

    def collect(self, report_data: bytes) -> Evidence:
        self.asked.append(report_data)
        self.collected.append(self._real.collect(report_data))
        return self.collected[-1]


def settings(**changes: Any) -> ResponderSettings:
    values: dict[str, Any] = {"job_id": JOB, "public_keys": {PARTY: KEY.public}, "attester": CountingAttester()}
    return ResponderSettings(**(values | changes))


def initiator(**changes: Any) -> Initiator:
    values: dict[str, Any] = {"job_id": JOB, "party": PARTY, "key": KEY, "verify_evidence": appraise}
    return Initiator(**(values | changes))


def shake(
    party: Initiator | None = None, enclave: Responder | None = None, now: float = NOW
) -> tuple[Established, Established]:
    """Run a handshake; returns the party's and the enclave's ends."""
    party, enclave = party or initiator(), enclave or Responder(settings())
    reply = enclave.receive(party.start(now), now)
    assert isinstance(reply, bytes)
    finish, at_party = party.receive(reply, now)
    at_enclave = enclave.receive(finish, now)
    assert isinstance(at_enclave, Established)
    return at_party, at_enclave


class MemoryPipe:
    """`rpc.Pipe` over two queues, with a server thread behind it."""

    def __init__(self, at_enclave: Established, handler: Handler) -> None:
        self.to_enclave: queue.Queue[bytes | None] = queue.Queue()
        self.to_party: queue.Queue[bytes | None] = queue.Queue()
        self.failure: CloisterError | None = None
        self.sent: list[bytes] = []
        self._thread = threading.Thread(target=self._serve, args=(at_enclave, handler), daemon=True)
        self._thread.start()

    def _serve(self, at_enclave: Established, handler: Handler) -> None:
        records: Iterator[bytes] = iter(self.to_enclave.get, None)
        try:
            for record in serve(at_enclave, records, handler):
                self.to_party.put(record)
        except CloisterError as exc:  # kept for the test to look at
            self.failure = exc
        self.to_party.put(None)

    def send(self, record: bytes) -> None:
        self.sent.append(record)
        self.to_enclave.put(record)

    def receive(self, timeout_s: float | None) -> bytes | None:
        try:
            return self.to_party.get(timeout=timeout_s)
        except queue.Empty as exc:
            raise TransportError("did not answer") from exc

    def close(self) -> None:
        self.to_enclave.put(None)

    def join(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()


def session(handler: Handler) -> tuple[Session, MemoryPipe]:
    at_party, at_enclave = shake()
    pipe = MemoryPipe(at_enclave, handler)
    return Session(at_party, pipe), pipe
