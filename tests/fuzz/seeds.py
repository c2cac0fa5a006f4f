"""Where fuzzing begins: genuine samples where the folder of `tests.evidence` is there, and our own of every kind."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import cbor2
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.accelerator import messages
from cloister.accelerator.wire import frame_bytes
from cloister.agreement import APPROVAL_LABEL, MANIFEST_LABEL, Manifest, approval_message, checkpoint
from cloister.agreement.receipt import COUNTERSIGN_LABEL, Receipt, countersign_message, make_receipt
from cloister.attest.backends.event_log import RUNTIME_EVENT, runtime_digest
from cloister.attest.backends.simulated import InsecureSimulatedAttester
from cloister.attest.backends.tpm import pack_event_log
from cloister.attest.binding import instance_report_data
from cloister.attest.enrol import Identity, challenge
from cloister.attest.enrol_files import encode_answer, encode_challenge, encode_pending, encode_request
from cloister.attest.evidence import Evidence
from cloister.attest.policy import AppraisalPolicy
from cloister.attest.roots import vendor_roots
from cloister.attest.vendor_files import READERS, Files, read_vendor
from cloister.channel.handshake import Responder
from cloister.channel.wire_errors import to_wire
from cloister.crypto.bundle import BundleHeader, BundleWriter, UnverifiedHeader
from cloister.crypto.encoding import Value, encode
from cloister.crypto.hpke import HpkeKey, wrap
from cloister.crypto.keys import PartyKey
from cloister.crypto.sealing import SealingKey
from cloister.data.activations import Schema
from cloister.data.payload import write_payload
from cloister.data.tokens import Example
from cloister.errors import VerificationError
from cloister.federation.state import GlobalState
from cloister.federation.update import Expected
from cloister.jobfile.resolve import canonical_json
from tests.attest_ca import dcap_ca, snp_ca, tpm_ca
from tests.evidence import EVIDENCE, sample
from tests.fuzz.frames import pack
from tests.unit.channel import peers
from tests.unit.data.tiny_packs import random_pack
from tests.unit.federation.small import expected_of, moments_of, update_of, weights_of

POLICY = AppraisalPolicy.insecure_simulated_only(peers.MEASUREMENT)
HPKE_KEY = HpkeKey.generate()
PCRS = {pcr: bytes([pcr]) * 32 for pcr in (0, 7, 14)}
_TIME = int(peers.NOW)

_SAMPLES: dict[str, list[dict[str, str]]] = {
    "tdx": [
        {"evidence": "tdx/tdx_quote", "collateral": "tdx/tdx_quote_collateral.json"},
        {"evidence": "tdx/tdx_quote_v5_gcp.dat", "collateral": "tdx/tdx_quote_outdated_collateral.json"},
        {"evidence": "tdx/tdx_quote_with_eventlog.json"},
    ],
    "sgx": [
        {"evidence": "sgx/sgx_quote", "collateral": "sgx/sgx_quote_collateral.json"},
        {"evidence": "sgx/sgx_quote_debug.dat"},
    ],
    "sev-snp": [
        {"evidence": "snp/milan_report.bin", "endorsement": "snp/milan_vcek.der"},
        {"evidence": "snp/aws_vlek_report.bin", "endorsement": "snp/aws_vlek.der"},
        {"evidence": "snp/milan_debug_report.bin", "endorsement": "snp/milan_debug_vcek.der"},
    ],
    "nitro": [{"evidence": "nitro/nitro_prod_2025.cbor"}, {"evidence": "nitro/nitro_debug_2025.cbor"}],
    "azure-vtpm": [{"evidence": "azure/az_snp_vtpm.json"}],
    "nvidia-gpu": [{"evidence": "nvidia/hopper_gpu_evidence.json"}],
}


def _files(names: dict[str, str]) -> Files:
    return Files(**{field: sample(name) for field, name in names.items()})


def nitro_time() -> float:
    """When the genuine document was made: it says so itself."""
    if not EVIDENCE.is_dir():
        return peers.NOW
    payload = cbor2.loads(cbor2.loads(sample("nitro/nitro_prod_2025.cbor"))[2])
    return float(payload["timestamp"]) / 1000


# Evidence -------------------------------------------------------------------------------------------------------------


@cache
def _ours(kind: str) -> list[Evidence]:
    """Evidence that we can make: the simulation's and the test CAs'."""
    if kind == "simulated":
        return [InsecureSimulatedAttester(measurement=peers.MEASUREMENT, clock=lambda: peers.NOW).collect(bytes(64))]
    if kind == "tpm":
        event = b"workload"
        pcrs = {**PCRS, 14: hashlib.sha256(bytes(32) + hashlib.sha256(event).digest()).digest()}
        return [tpm_ca.quote(pcrs), tpm_ca.quote(pcrs, event_log=pack_event_log([(14, event)]))]
    return {"tdx": lambda: [dcap_ca.shared_ca().tdx()], "sgx": lambda: [dcap_ca.shared_ca().sgx()]}.get(kind, list)()


def _genuine(kind: str) -> list[Evidence]:
    if not EVIDENCE.is_dir():
        return []
    if kind == "nvidia-gpu":  # a file may hold several GPUs; the verifier takes one
        return [
            Evidence(type=kind, blob=json.dumps(gpu).encode())
            for gpu in json.loads(sample(_SAMPLES[kind][0]["evidence"]))
        ]
    if kind not in READERS:
        return []
    return [evidence for names in _SAMPLES.get(kind, []) for evidence in read_vendor(kind, _files(names))]


def of_type(kind: str) -> Callable[[], list[bytes]]:
    """(blob, collateral, event log) of every evidence of this type that we have."""

    def found() -> list[bytes]:
        return [pack(e.blob, e.collateral, e.event_log) for e in (*_genuine(kind), *_ours(kind))]

    return found


def envelopes() -> list[bytes]:
    """Evidence of every type, and one with devices."""
    known = [e for kind in ("simulated", "tpm", *_SAMPLES) for e in (*_ours(kind), *_genuine(kind))]
    with_device = Evidence(type="simulated", blob=b"1", devices=(Evidence(type="nvidia-gpu", blob=b"2"),))
    return [e.to_bytes() for e in (*known, with_device)]


def simulated_bodies() -> list[bytes]:
    return [encode({"measurement": peers.MEASUREMENT, "report_data": bytes(64), "issued_at": _TIME})]


def dcap_bodies() -> list[bytes]:
    """First byte: what `_dcap_signed` wraps it in."""
    return [
        b"\x00" + dcap_ca.tdx_body(),
        b"\x01" + dcap_ca.tdx_body(),
        b"\x85" + dcap_ca.tdx_body(mr_service_td=bytes(48)),
        b"\x82" + dcap_ca.sgx_body(),
        b"\x02" + dcap_ca.sgx_body(),
    ]


def snp_bodies() -> list[bytes]:
    return [snp_ca.SnpCa().body(version=version) for version in (2, 3, 5)]


def tpm_attests() -> list[bytes]:
    return [tpm_ca.attest(PCRS), tpm_ca.attest(PCRS, kind=tpm_ca.CERTIFY), tpm_ca.attest(PCRS, extra_data=b"")]


def tpm_publics() -> list[bytes]:
    return [tpm_ca.ecc_public(), tpm_ca.rsa_public()]


def tpm_responses() -> list[bytes]:
    """(method, answers), see `_ScriptedTpm`; the ones of PCR_Read and CreatePrimary are whole."""
    public = tpm_ca.ecc_public()
    values = b"".join(tpm_ca.b2(value) for value in PCRS.values())
    pcr_read = b"\x00" + bytes(4) + tpm_ca.select(PCRS) + (len(PCRS)).to_bytes(4, "big") + values
    made = b"\x80\0\0\0" + tpm_ca.b2(public) + tpm_ca.b2(b"") + tpm_ca.b2(b"\0" * 32) + b"\x80\x21" + bytes(6)
    created = b"\x02" + made + tpm_ca.b2(tpm_ca.name_of(public))
    refused = b"\x01" + b"\x80\x01" + (10).to_bytes(4, "big") + (0x18B).to_bytes(4, "big")
    return [
        pack(bytes([method]), *answers, *[b""] * (5 - len(answers)))
        for method, answers in enumerate(
            [[pcr_read], [created], [refused], [b"\x00\0" + bytes(8)], [refused], [refused], [refused], [created]]
        )
    ]


def enrolments() -> list[bytes]:
    ek, certificate = tpm_ca.ek_public(tpm_ca.RSA_AK), vendor_roots().intel.public_bytes(Encoding.DER)
    return [pack(ek, tpm_ca.ecc_public(), b""), pack(ek, tpm_ca.rsa_public(), certificate)]


def enrol_files() -> list[bytes]:
    """One of each kind, behind its number."""
    ek, ak = tpm_ca.ek_public(tpm_ca.RSA_AK), tpm_ca.ecc_public()
    made, pending = challenge(Identity(endorsement_key=ek, attestation_key=ak), now=_TIME)
    files = (
        encode_request(Identity(endorsement_key=ek, attestation_key=ak)), encode_challenge(made),
        encode_answer(bytes(32)), encode_pending(pending),
    )  # fmt: skip
    return [bytes([number]) + data for number, data in enumerate(files)]


def event_logs() -> list[bytes]:
    event = {"imr": 3, "event_type": RUNTIME_EVENT, "event": "app-id", "event_payload": "00ff"}
    ours = json.dumps([{**event, "digest": runtime_digest("app-id", b"\0\xff").hex()}]).encode()
    return [ours, b"[]", *(e.event_log for e in _genuine("tdx") if e.event_log)]


def vendor_files() -> list[bytes]:
    """(kind or empty, four files)"""
    envelope = _ours("simulated")[0].to_bytes()
    found = [pack(b"", envelope, b"", b"", b""), pack(b"", envelope.hex().encode(), b"", b"", b"")]
    if EVIDENCE.is_dir():
        fields = ("evidence", "collateral", "endorsement", "event_log")
        for number, kind in enumerate(READERS):
            for names in _SAMPLES.get(kind, []):
                found.append(pack(bytes([number]), *(sample(names[f]) if f in names else b"" for f in fields)))
    return found


# What parties agree to ------------------------------------------------------------------------------------------------


def _key(name: str) -> PartyKey:
    return _KEYS.setdefault(name, PartyKey.generate())


_KEYS: dict[str, PartyKey] = {}


@cache
def _manifest() -> Manifest:
    return Manifest(
        job_id=hashlib.sha256(_job()).hexdigest(),
        policy_sha256=POLICY.sha256,
        attester="simulated",
        registers={"source": peers.MEASUREMENT.hex()},
        bundles={"n": {"train": b"c" * 32, "test": b"d" * 32}},
    )


@cache
def _job() -> bytes:
    party = {"name": "n", "public_key": _key("n").public.hex()}
    return canonical_json({"job": {"job": {"name": "tiny"}, "party": [party]}, "policy_sha256": POLICY.sha256})


def manifests() -> list[bytes]:
    return [_manifest().to_bytes()]


@cache
def _chain() -> tuple[checkpoint.Seal, checkpoint.ShareRecord, checkpoint.Start]:
    """The first checkpoint of an instance, its shares, and the party's consent to its start."""
    manifest = _manifest()
    ids: dict[str, Any] = {
        "job_id": manifest.job_id, "manifest_sha256": manifest.sha256, "instance_id": b"i" * 16,
    }  # fmt: skip
    shares = checkpoint.ShareRecord(**ids, quorum=1, commitments={"n": b"s" * 32}).signed(_key("instance"))
    seal = checkpoint.Seal(
        **ids, number=1, previous=manifest.sha256, step=10, shares_sha256=shares.sha256, salt=bytes(32)
    ).signed(b"content", _key("instance"))
    beginning = checkpoint.Position(number=0, hash=manifest.sha256)
    start = checkpoint.Start(position=beginning, last=beginning).signed(_key("n"), **ids)
    return seal, shares, start


def checkpoints() -> list[bytes]:
    """First byte: which message it is."""
    seal, shares, start = _chain()
    certificate = checkpoint.Certificate(seal=seal, signatures={"n": _noted(seal)})
    return [bytes([i]) + m.to_bytes() for i, m in enumerate((seal, certificate, shares, start))]


def _noted(seal: checkpoint.Seal) -> bytes:
    return _key("n").sign(checkpoint.CHECKPOINT_LABEL, checkpoint.checkpoint_message(seal))


@cache
def receipt() -> Receipt:
    """A receipt of a job of one party; every check of it passes."""
    manifest, instance = _manifest(), _key("instance")
    seal, _, start = _chain()
    body: dict[str, Any] = {
        "job_id": manifest.job_id,
        "job": _job().decode(),
        "approvals": {"n": _key("n").sign(APPROVAL_LABEL, approval_message(manifest.job_id)).hex()},
        "manifest": manifest.to_bytes().hex(),
        "manifest_signatures": {"n": _key("n").sign(MANIFEST_LABEL, manifest.sha256).hex()},
        "history": {
            "quorum": 1,
            "earlier": [],
            "starts": [{"n": start.to_bytes().hex()}],
            "chain": [{"seal": seal.to_bytes().hex(), "signatures": {"n": _noted(seal).hex()}}],
        },
        "adapter_sha256": "00" * 32,
        "ended": _TIME,
    }

    def evidence(nonce: bytes) -> Evidence:
        keys = {"signing_key": instance.public, "hpke_key": HPKE_KEY.public}
        data = instance_report_data(job_id=manifest.job_id, instance_id=b"i" * 16, nonce=nonce, **keys)
        return InsecureSimulatedAttester(measurement=peers.MEASUREMENT, clock=lambda: peers.NOW).collect(data)

    made = make_receipt(body, instance_id=b"i" * 16, signing_key=instance, hpke_key=HPKE_KEY.public, evidence=evidence)
    return made.countersigned("n", _TIME, _key("n").sign(COUNTERSIGN_LABEL, countersign_message(made, _TIME)))


def receipts() -> list[bytes]:
    return [receipt().to_bytes()]


def policies() -> list[bytes]:
    listed = f"""[policy]
accept = ["tdx", "sev-snp", "tpm", "nvidia-gpu"]
max_age_s = 60
[[measurement]]
label = "one"
type = "tdx"
registers = {{ mr_td = "00ff", rtmr1 = "11" }}
[tdx]
statuses = ["UpToDate"]
advisories = ["INTEL-SA-00289"]
[sev-snp]
min_tcb = {{ snp = 8 }}
[tpm]
attestation_keys = ["000b{"00" * 32}"]
[nvidia-gpu]
count = 2
"""
    return [listed.encode(), b'[policy]\naccept = ["simulated"]\ninsecure_simulated = true\nmeasurements = "any"\n']


def cbor() -> list[bytes]:
    value: Value = {"a": [1, -1, 2**40, 1.5, 1e300, None, True, "ä", b"\xff"], "bb": {"c": [], "d": {}}}
    return [encode(value), *(e.to_bytes() for e in _ours("simulated")), *manifests()]


# Bundles and keys -----------------------------------------------------------------------------------------------------


@cache
def bundle_header() -> BundleHeader:
    return BundleHeader(
        job_id=peers.JOB,
        party=peers.PARTY,
        kind="train",
        schema={"activation_dtype": "float32", "hidden": 8},
        counts={"records": 1, "packs": 1, "tokens": 8},
        chunk_bytes=64,
        max_payload_bytes=4096,
        bundle_id=bytes(16),
    )


@cache
def _bundle(payload: bytes) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "b"
        with BundleWriter(path, bundle_header(), peers.KEY) as writer:
            writer.write(payload)
        return path.read_bytes()


_PAYLOADS = (b"", b"x", b"y" * 64, b"z" * 200)


def _head() -> UnverifiedHeader:
    return UnverifiedHeader.sign(bundle_header(), peers.KEY)


def bundle_heads() -> list[bytes]:
    return [_head().prefix, _bundle(_PAYLOADS[-1])]


def bundle_tails() -> list[bytes]:
    return [_bundle(payload)[len(_head().prefix) :] for payload in _PAYLOADS]


def upload_heads() -> list[bytes]:
    return [
        encode({"header": _head().encoded, "signature": _head().signature, "offset": offset}) for offset in (0, 999)
    ]


def wrapped_keys() -> list[bytes]:
    return [wrap(HPKE_KEY.public, bytes(32), b"info")]


def sealed_states() -> list[bytes]:
    return [SealingKey(bytes(32)).seal(text, salt=bytes(32), purpose=b"fuzz") for text in (b"", b"state")]


def expected_update() -> Expected:
    return expected_of(GlobalState(round=0, weights=weights_of(0)), "n")


def updates() -> list[bytes]:
    """An honest update, and one of the next round."""
    weights = weights_of(1)
    return [update_of("n", weights, moments=moments_of(weights, 1), round=number).to_bytes() for number in (1, 2)]


PACK_SCHEMA = Schema(activation_dtype="int8", hidden=8, vocabulary=97, max_tokens=40)
CODED_SCHEMA = replace(PACK_SCHEMA, activation_dtype="bfloat16-deflate")


def payloads(schema: Schema = PACK_SCHEMA) -> list[bytes]:
    """Two packs with examples; one pack without."""
    example = Example(id="a", task="t", response_bytes=3, response_role=1, choice_bytes=(2, 3), answer=0)
    found = []
    for packs, examples in (([[3, 4], [5]], [example, example, example]), ([[2]], [])):
        out = bytearray()
        write_payload(out.extend, [random_pack(p, 97, hidden=8) for p in packs], examples, schema.activation_dtype)
        found.append(bytes(out))
    return found


# Sessions -------------------------------------------------------------------------------------------------------------


@cache
def hellos() -> list[bytes]:
    return [peers.initiator().start(peers.NOW)]


def hello_bodies() -> list[bytes]:
    return [cbor2.loads(hello[1:])["body"] for hello in hellos()]


def replies() -> list[bytes]:
    """None of them is to the hello of the fuzzed party: accepted are those of `reply_bodies` only."""
    return [bytes(Responder(peers.settings()).receive(hello, peers.NOW)) for hello in hellos()]  # type: ignore[arg-type]  # HELLO is answered by bytes


def reply_bodies() -> list[bytes]:
    return [encode({"evidence": evidence.to_bytes()}) for evidence in _ours("simulated")] + [encode({"evidence": b""})]


def finish_bodies() -> list[bytes]:
    """First byte 0: the whole body; else the evidence in a body whose signature holds."""
    whole = encode({"signature": bytes(64), "evidence": b""})
    return [b"\x01", b"\0" + whole, *(b"\x01" + e.to_bytes() for e in _ours("simulated"))]


def records() -> list[bytes]:
    """Parts that begin with a kind are sealed; others are taken as they are."""
    nothing = [b""] * 7
    return [
        pack(b"\x12message", *nothing),
        pack(b"\x12one", b"\x12two", b"\x13", b"", b"", b"", b"", b""),
        pack(b"\x11not full", b"\x12", b"", b"", b"", b"", b"", b""),
        pack(b"\x00\x12" + bytes(16), *nothing),
    ]


def requests() -> list[bytes]:
    return [
        encode({"id": 1, "method": "adapter", "body": {"offset": 0}}),
        encode({"id": 2, "method": "keys", "body": {"wrapped": {"train": bytes(40)}, "signature": bytes(64)}}),
    ]


def error_reports() -> list[bytes]:
    return [encode(to_wire(VerificationError("clock", "late", where="n", hint="look"))), encode(to_wire(KeyError("x")))]


def refusals() -> list[bytes]:
    return [json.dumps(to_wire(VerificationError("job", "another job"))).encode(), b"{", b"text"]


def accelerator_requests() -> list[bytes]:
    shapes = (messages.Shape(name="g", inputs=4, outputs=2),)
    return [
        messages.request_bytes(request)
        for request in (
            messages.Hello(),
            messages.Key(secret=bytes(32)),
            messages.Begin(weights_id=bytes(32), shapes=shapes, parts=1),
            messages.Load(group="g", part=0, first_row=0, rows=2),
            messages.Complete(),
            messages.Multiply(group="g", backward=False, rows=1),
            messages.Pad(group="g", backward=True, rows=3, first_block=7),
            messages.Memory(up=4096, down=4096),
        )
    ]


def accelerator_sessions() -> list[bytes]:
    """What a client sends: the frames with their tensors; all of them, and all up to each."""
    tensors = {3: bytes(8), 5: bytes(16)}
    frames = [frame_bytes(frame) + tensors.get(i, b"") for i, frame in enumerate(accelerator_requests()[:7])]
    return [b"".join(frames[:end]) for end in range(1, len(frames) + 1)]


def accelerator_replies() -> list[bytes]:
    """The first byte says what was asked, see `targets._accelerator_reply`."""
    welcome = messages.welcome_bytes(messages.Welcome(identity=bytes(16), device="cpu"))
    return [
        b"\0" + welcome, b"\1" + messages.begun_bytes(held=True), b"\1" + messages.WAITING, b"\2" + messages.DONE,
        b"\3" + messages.product_bytes(rows=2, columns=3, parts=1), b"\3" + messages.refusal_bytes("memory"),
    ]  # fmt: skip
