"""What is fuzzed: a table of parsers, each with its seeds and with the errors that may leave it.

Where a signature or a tag stands before a parser, a second target (`...-signed`, `...-sealed`) makes it hold: what a
party, an enclave or an attester of bad will can send. Nothing here is about the keys; they are fixed or test CAs'.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

import grpc
import torch

from cloister.accelerator import messages
from cloister.accelerator.engine import Engine
from cloister.accelerator.session import Session
from cloister.accelerator.weights import WeightStore
from cloister.accelerator.wire import StreamLink, Wire
from cloister.agreement import Manifest, checkpoint
from cloister.agreement.receipt import Receipt, verify_receipt
from cloister.attest import enrol, enrol_files
from cloister.attest.backends import event_log, simulated, tpm_quote
from cloister.attest.claims import Claims
from cloister.attest.evidence import Evidence
from cloister.attest.policy import AppraisalPolicy
from cloister.attest.roots import TrustRoots, vendor_roots
from cloister.attest.rules import RuleTables, SgxRules, TpmRules
from cloister.attest.unverified import describe
from cloister.attest.vendor_files import READERS, Files, read_envelope, read_vendor
from cloister.attest.verify import DEVICE_VERIFIERS, VERIFIERS, inspect
from cloister.channel import handshake, rpc, server
from cloister.channel.grpc_common import reported
from cloister.channel.handshake import Responder
from cloister.channel.records import END, Opener, Sealer
from cloister.channel.wire_errors import from_wire
from cloister.crypto.bundle import read_header
from cloister.crypto.bundle.scan import BundleScanner
from cloister.crypto.encoding import Fields, decode, encode
from cloister.crypto.hpke import HpkeKey, wrap
from cloister.crypto.sealing import SealingKey
from cloister.data.activations import Schema
from cloister.data.payload import Payload
from cloister.errors import CapacityError, CloisterError, JobError, ProtocolError, RunError, VerificationError
from cloister.federation.aggregate import aggregate
from cloister.federation.update import PartyUpdate
from cloister.job import FederationSection
from cloister.tpm.commands import Tpm
from cloister.tpm.wire import RH_OWNER, TpmError
from tests.attest_ca import dcap_ca, snp_ca, tpm_ca
from tests.fuzz import seeds
from tests.fuzz.frames import unpack
from tests.unit.channel import peers

_REFUSALS = (VerificationError, ProtocolError)
_ANY = AppraisalPolicy(
    accept=(*VERIFIERS, *DEVICE_VERIFIERS),
    insecure_simulated=True,
    any_measurement=True,
    rules=RuleTables(
        sgx=SgxRules(statuses=("ConfigurationAndSWHardeningNeeded",), advisories=("INTEL-SA-00289", "INTEL-SA-00615")),
        tpm=TpmRules(attestation_keys=(tpm_ca.name_of(tpm_ca.ecc_public()).hex(),)),
    ),
)
TIMES: Mapping[str, float] = {
    "tdx": 1_750_400_000, "sgx": 1_750_400_000, "sev-snp": 1_740_000_000, "azure-vtpm": 1_740_000_000,
    "nitro": seeds.nitro_time(), "nvidia-gpu": 1_750_000_000,
}  # fmt: skip
"""When the genuine samples were valid."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One parser."""

    run: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    """Where it begins."""
    accepts: bool = True
    """Whether at least one seed is accepted (with the genuine samples at hand)."""
    may_raise: tuple[type[CloisterError], ...] = _REFUSALS
    max_bytes: int = 1 << 16

    def try_once(self, data: bytes) -> bool:
        """Whether the parser accepted it. Raises: what the parser must not raise."""
        try:
            self.run(data)
        except self.may_raise:
            return False
        return True


# Encodings ------------------------------------------------------------------------------------------------------------


def _cbor(data: bytes) -> None:
    value = decode(data, max_bytes=1 << 16, what="fuzz")
    _expect(encode(value) == data, "a value has two encodings")


def _evidence(data: bytes) -> None:
    _expect(Evidence.from_bytes(data).to_bytes() == data, "evidence has two encodings")


def _manifest(data: bytes) -> None:
    _expect(Manifest.from_bytes(data).to_bytes() == data, "a manifest has two encodings")


def _checkpoint(data: bytes) -> None:
    kinds = (checkpoint.Seal, checkpoint.Certificate, checkpoint.ShareRecord, checkpoint.Start)
    kind = kinds[data[0] % len(kinds)] if data else kinds[0]
    _expect(kind.from_bytes(data[1:]).to_bytes() == data[1:], "a checkpoint message has two encodings")


def _receipt(data: bytes) -> None:
    _expect(Receipt.from_bytes(data).to_bytes() == data, "a receipt has two encodings")
    verify_receipt(data, policy=seeds.POLICY, adapter_sha256="", allow_simulated=True)


def _policy(data: bytes) -> None:
    policy = AppraisalPolicy.from_toml(data.decode(errors="replace"))
    _expect(len(policy.sha256) == 64, "a policy has no hash")


# Evidence -------------------------------------------------------------------------------------------------------------


def _appraise(kind: str, roots: TrustRoots | None = None) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        blob, collateral, log = unpack(data, 3)
        evidence = _make(kind, blob, collateral, log)
        if kind in READERS or kind == "simulated":
            _say(evidence)
        inspect(evidence, _ANY, None, TIMES.get(kind, peers.NOW), roots=roots)

    return run


def _make(kind: str, blob: bytes, collateral: bytes = b"", log: bytes = b"") -> Evidence:
    try:
        return Evidence(type=kind, blob=blob, collateral=collateral, event_log=log)
    except ValueError as exc:  # our caller's mistake; peers come through Evidence.from_bytes
        raise VerificationError("evidence-format", "too long") from exc


def _say(evidence: Evidence) -> None:
    try:
        describe(evidence)
    except _REFUSALS:
        return


def _simulated_signed(data: bytes) -> None:
    blob = encode({"body": data, "signature": simulated._TEST_KEY.sign("simulated evidence", data)})
    inspect(_make("simulated", blob), _ANY, None, peers.NOW)


def _dcap_signed(data: bytes) -> None:
    """An attester's own report, signed by a platform that the verifier trusts."""
    ca = dcap_ca.shared_ca()
    kind, body = (data[0] if data else 0), data[1:]
    collateral, log = _dcap_collateral("sgx" if kind % 3 == 2 else "tdx"), b""
    if kind % 3 == 2:
        evidence = _make("sgx", ca.sgx_quote(body=body), collateral)
    else:
        evidence = _make(
            "tdx", ca.tdx_quote(body=body, version=4 + kind % 3, body_type=2 + kind // 128), collateral, log
        )
    inspect(evidence, _ANY, None, dcap_ca.NOW, roots=ca.roots)


@cache
def _dcap_collateral(tee: str) -> bytes:
    return dcap_ca.shared_ca().collateral(tee)


@cache
def _snp() -> snp_ca.SnpCa:
    return snp_ca.SnpCa()


def _snp_signed(data: bytes) -> None:
    body = data[:0x2A0].ljust(0x2A0, b"\0")
    inspect(_snp().evidence(body), _ANY, None, snp_ca.NOW, roots=_snp().roots)


def _tpm_signed(data: bytes) -> None:
    """A structure that is no quote, signed by an enrolled key; the PCR values are the seed's."""
    key = tpm_quote.parse_public(tpm_ca.ecc_public()).public_key
    tpm_quote.verify_quote(data, tpm_ca.sign(data), key, seeds.PCRS)


def _tpm_public(data: bytes) -> None:
    tpm_quote.parse_public(data)


def _enrol(data: bytes) -> None:
    endorsement_key, attestation_key, certificate = unpack(data, 3)
    identity = enrol.Identity(endorsement_key=endorsement_key, attestation_key=attestation_key, certificate=certificate)
    enrol.challenge(identity, manufacturers=[vendor_roots().intel] if certificate else [], now=peers.NOW)


def _enrol_file(data: bytes) -> None:
    """The first byte says which of the files it is."""
    readers = (
        enrol_files.decode_request, enrol_files.decode_challenge, enrol_files.decode_answer, enrol_files.decode_pending
    )  # fmt: skip
    readers[data[0] % len(readers) if data else 0](data[1:])


class _ScriptedTpm:
    """Answers with what the input says; half of the answers get a header that holds."""

    address = "fuzz"

    def __init__(self, answers: list[bytes]) -> None:
        self._answers = answers

    def transmit(self, command: bytes) -> bytes:
        answer = self._answers.pop(0) if self._answers else b""
        if not answer or answer[0] & 1:
            return answer[1:]
        sessions, body = command[:2] == b"\x80\x02", answer[1:]
        if sessions and answer[0] & 2:  # with a handle before the parameters
            body = body[:4] + len(body[4:]).to_bytes(4, "big") + body[4:]
        elif sessions:
            body = len(body).to_bytes(4, "big") + body
        return command[:2] + (10 + len(body)).to_bytes(4, "big") + bytes(4) + body

    def close(self) -> None:
        pass


_TPM_METHODS: tuple[Callable[[Tpm], object], ...] = (
    lambda tpm: tpm.pcr_read([0, 7, 14]),
    lambda tpm: tpm.create_primary(RH_OWNER, b""),
    lambda tpm: tpm.endorsement_certificate(),
    lambda tpm: tpm.flush_stale(),
    lambda tpm: tpm.nv_counter(0x1800000),
    lambda tpm: tpm.nv_increment(0x1800000),
    lambda tpm: tpm.unseal(b"", b"", [14]),
    lambda tpm: tpm.quote(tpm.create_primary(RH_OWNER, b""), bytes(32), [14]),
)


def _tpm_response(data: bytes) -> None:
    method, *answers = unpack(data, 6)
    _TPM_METHODS[method[0] % len(_TPM_METHODS) if method else 0](Tpm(_ScriptedTpm(answers)))


def _vendor_file(data: bytes) -> None:
    kind, *contents = unpack(data, 5)
    names = ("evidence", "collateral", "endorsement", "event_log")
    files = Files(**dict(zip(names, contents, strict=True)))
    if kind:
        read_vendor(list(READERS)[kind[0] % len(READERS)], files)
    else:
        read_envelope(files)


# Bundles --------------------------------------------------------------------------------------------------------------


def _bundle_scan(data: bytes) -> None:
    """What follows a genuine header, in two pieces."""
    scanner = BundleScanner(seeds.bundle_header(), peers.KEY.public)
    middle = len(data) // 2
    if not scanner.feed(data[:middle]):
        scanner.feed(data[middle:])
    if not scanner.done:
        raise VerificationError("truncated", "the bundle ends before its end")


def _payload(data: bytes, schema: Schema = seeds.PACK_SCHEMA) -> None:
    """What a party sealed: the enclave reads the index, the table of examples and every pack."""

    def read(offset: int, length: int) -> bytes:
        _expect(offset >= 0 and 0 <= length <= len(data) - offset, "a read outside the payload")
        return data[offset : offset + length]

    payload = Payload.open(read, len(data), schema, torch.float32, "party n")
    payload.examples()
    for index in range(len(payload)):
        payload[index]


def _update(data: bytes) -> None:
    """What a party's enclave delivers after a round."""
    update = PartyUpdate.from_bytes(data, seeds.expected_update())
    aggregate([update], seeds.expected_update().before, FederationSection())


def _wrapped(data: bytes) -> None:
    seeds.HPKE_KEY.unwrap(data, b"info")


def _sealed_state(data: bytes) -> None:
    SealingKey(bytes(32)).open(data, salt=bytes(32), purpose=b"fuzz")


# Sessions -------------------------------------------------------------------------------------------------------------


def _hello(data: bytes) -> None:
    Responder(peers.settings()).receive(data, peers.NOW)


def _hello_signed(data: bytes) -> None:
    message = encode({"body": data, "signature": peers.KEY.sign("handshake hello", data)})
    Responder(peers.settings()).receive(b"\x01" + message, peers.NOW)


def _reply(data: bytes) -> None:
    party = peers.initiator()
    party.start(peers.NOW)
    party.receive(data, peers.NOW)


def _unbound(evidence: Evidence, report_data: bytes, now: float) -> Claims:
    """Whatever the evidence is bound to: no input can know the transcript."""
    return inspect(evidence, _ANY, None, now)


def _reply_sealed(data: bytes) -> None:
    """An enclave whose share is right and whose evidence is anything."""
    party, enclave = peers.initiator(verify_evidence=_unbound), Responder(peers.settings())
    hello = party.start(peers.NOW)
    reply = enclave.receive(hello, peers.NOW)
    share = Fields.decode(bytes(reply)[1:], max_bytes=1 << 20, what="reply").blob("share")  # type: ignore[arg-type]  # HELLO is answered by bytes
    transcript = handshake._hash("reply", hello, share)
    keys = handshake._Keys(party._shared_secret(share), transcript)
    sealed = keys.seal("enclave handshake", transcript, data)
    party.receive(b"\x02" + encode({"share": share, "sealed": sealed}), peers.NOW)


def _finish_sealed(data: bytes) -> None:
    """A party whose handshake is right up to the content of FINISH."""
    enclave = Responder(peers.settings(verify_evidence=_unbound))
    enclave.receive(peers.initiator().start(peers.NOW), peers.NOW)
    keys, transcript = enclave._keys, enclave._transcript
    if keys is None:
        raise RuntimeError("no keys")
    signature = peers.KEY.sign("handshake finish", transcript)
    body = data[1:] if data[:1] == b"\0" else encode({"signature": signature, "evidence": data[1:]})
    enclave.receive(b"\x03" + keys.seal("party handshake", transcript, body), peers.NOW)


def _records(data: bytes) -> None:
    """Up to eight records under the right key and counter, or as they are."""
    opener, sealer = Opener(bytes(32), max_message_bytes=4096), Sealer(bytes(32))
    for part in unpack(data, 8):
        if part[:1] in (b"\x11", b"\x12", b"\x13"):
            opener.feed(sealer._record(part[0], memoryview(part)[1:]))
        elif part:
            opener.feed(part[1:])


def _request(data: bytes) -> None:
    """A request of an authenticated party; the handler reads fields as the enclave's does."""

    def handler(peer: handshake.Peer, method: str, body: dict[str, object]) -> dict[str, bool]:
        fields = Fields(body, "body")
        fields.integer("offset", low=0, high=1 << 40)
        fields.end()
        return {"done": True}

    sealer = Sealer(bytes(32))
    session = replace(_at_enclave(), sealer=Sealer(bytes(32)), opener=Opener(bytes(32)))
    replies = list(rpc.serve(session, [sealer._record(END, memoryview(data)), sealer.close()], handler))
    _expect(len(replies) == 2, "a request without a reply")


@cache
def _at_enclave() -> handshake.Established:
    return peers.shake()[1]


def _error_report(data: bytes) -> None:
    from_wire(decode(data, max_bytes=1 << 14, what="error report"), peer="enclave")


class _Refusal(grpc.RpcError):
    def __init__(self, details: str) -> None:
        self._details = details

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.ABORTED

    def details(self) -> str:
        return self._details


def _refusal(data: bytes) -> None:
    error = reported(_Refusal(data.decode(errors="replace")), address="fuzz")
    _expect(isinstance(error, CloisterError), "a refusal is no error of ours")


def _upload_head(data: bytes) -> None:
    server._parse_head(data, with_offset=True)


# Accelerators ---------------------------------------------------------------------------------------------------------


def _accelerator_request(data: bytes) -> None:
    _expect(messages.request_bytes(messages.parse_request(data)) == data, "a request has two encodings")


_REPLIES: tuple[Callable[[bytes], object], ...] = (
    messages.parse_welcome,
    messages.parse_begun,
    messages.parse_done,
    lambda data: messages.parse_product(data, rows=2, columns=3, parts=1),
)


def _accelerator_reply(data: bytes) -> None:
    _REPLIES[data[0] % len(_REPLIES) if data else 0](data[1:])


class _Script(socket.socket):
    """A client that has sent everything, and takes what it is sent."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._data = data

    def recv_into(self, buffer: memoryview, *_: object) -> int:  # type: ignore[override]  # as `Wire` calls it
        taken, self._data = self._data[: len(buffer)], self._data[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)

    def send(self, data: memoryview, *_: object) -> int:  # type: ignore[override]
        return len(data)


def _accelerator_session(data: bytes) -> None:
    """Whatever a client sends, a session ends without an error of its own, and weights in the making are given up."""
    store = WeightStore("cpu", 64)
    Session(StreamLink(Wire(_Script(data), "fuzz")), store, _engine(), bytes(16)).run()
    _expect(all(weights.complete and not weights.users for weights in store._held.values()), "weights are still held")


@cache
def _engine() -> Engine:
    return Engine("cpu", threads=1)


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def _key(data: bytes) -> None:
    wrap(data, bytes(32), hashlib.sha256(data).digest())
    HpkeKey.generate()


TARGETS: Mapping[str, Target] = {
    "cbor": Target(run=_cbor, seeds=seeds.cbor),
    "evidence": Target(run=_evidence, seeds=seeds.envelopes, max_bytes=1 << 17),
    "manifest": Target(run=_manifest, seeds=seeds.manifests),
    "checkpoint": Target(run=_checkpoint, seeds=seeds.checkpoints),
    "receipt": Target(run=_receipt, seeds=seeds.receipts),
    "policy": Target(run=_policy, seeds=seeds.policies, may_raise=(JobError,), max_bytes=4096),
    **{
        kind: Target(run=_appraise(kind), seeds=seeds.of_type(kind), max_bytes=1 << 17)
        for kind in (*VERIFIERS, *DEVICE_VERIFIERS)
    },
    "simulated-signed": Target(run=_simulated_signed, seeds=seeds.simulated_bodies, max_bytes=1024),
    "dcap-signed": Target(run=_dcap_signed, seeds=seeds.dcap_bodies, max_bytes=1024),
    "sev-snp-signed": Target(run=_snp_signed, seeds=seeds.snp_bodies, max_bytes=0x2A0),
    "tpm-signed": Target(run=_tpm_signed, seeds=seeds.tpm_attests, max_bytes=2048),
    "tpm-public": Target(run=_tpm_public, seeds=seeds.tpm_publics, max_bytes=2048),
    "tpm-response": Target(
        run=_tpm_response, seeds=seeds.tpm_responses, may_raise=(*_REFUSALS, TpmError), max_bytes=8192
    ),
    "enrol": Target(run=_enrol, seeds=seeds.enrolments, max_bytes=8192),
    "enrol-file": Target(run=_enrol_file, seeds=seeds.enrol_files, max_bytes=4096),
    "event-log": Target(run=event_log.parse, seeds=seeds.event_logs, max_bytes=1 << 17),
    "vendor-file": Target(run=_vendor_file, seeds=seeds.vendor_files, max_bytes=1 << 17),
    "bundle-header": Target(run=read_header, seeds=seeds.bundle_heads),
    "bundle-scan": Target(run=_bundle_scan, seeds=seeds.bundle_tails),
    "update": Target(run=_update, seeds=seeds.updates, max_bytes=1 << 14),
    "payload": Target(run=_payload, seeds=seeds.payloads, max_bytes=1 << 14),
    "payload-deflate": Target(
        run=partial(_payload, schema=seeds.CODED_SCHEMA),
        seeds=partial(seeds.payloads, seeds.CODED_SCHEMA),
        max_bytes=1 << 14,
    ),
    "wrapped-key": Target(run=_wrapped, seeds=seeds.wrapped_keys, max_bytes=2048),
    "hpke-key": Target(run=_key, seeds=lambda: [seeds.HPKE_KEY.public], max_bytes=2048),
    "sealed-state": Target(run=_sealed_state, seeds=seeds.sealed_states),
    "hello": Target(run=_hello, seeds=seeds.hellos, max_bytes=4096),
    "hello-signed": Target(run=_hello_signed, seeds=seeds.hello_bodies, max_bytes=4096),
    "reply": Target(run=_reply, seeds=seeds.replies, accepts=False, max_bytes=8192),
    "reply-sealed": Target(run=_reply_sealed, seeds=seeds.reply_bodies, max_bytes=4096),
    "finish-sealed": Target(run=_finish_sealed, seeds=seeds.finish_bodies, max_bytes=4096),
    "records": Target(run=_records, seeds=seeds.records, max_bytes=8192),
    "request": Target(run=_request, seeds=seeds.requests, max_bytes=4096),
    "error-report": Target(run=_error_report, seeds=seeds.error_reports, max_bytes=8192),
    "refusal": Target(run=_refusal, seeds=seeds.refusals, max_bytes=8192),
    "accelerator-request": Target(run=_accelerator_request, seeds=seeds.accelerator_requests, max_bytes=4096),
    "accelerator-reply": Target(
        run=_accelerator_reply, seeds=seeds.accelerator_replies, may_raise=(*_REFUSALS, CapacityError, RunError)
    ),
    "accelerator-session": Target(run=_accelerator_session, seeds=seeds.accelerator_sessions, max_bytes=4096),
    "upload-head": Target(run=_upload_head, seeds=seeds.upload_heads, max_bytes=8192),
}
"""By the name that `make fuzz TARGET=` takes."""
