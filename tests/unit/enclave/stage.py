"""A job without processes: parties and an enclave that talk through a session in memory, and real sealed bundles."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloister.adapters.files import CONFIG, WEIGHTS, adapter_sha256, file_hashes
from cloister.agreement import KEYS_LABEL, MANIFEST_LABEL, keys_message, wrap_info
from cloister.agreement.checkpoint import KEPT_LABEL, Position, ShareRecord, Start
from cloister.agreement.receipt import make_receipt
from cloister.attest.attester import Attester
from cloister.attest.backends.simulated import InsecureSimulatedAttester
from cloister.attest.claims import Claims
from cloister.attest.policy import AppraisalPolicy
from cloister.attest.verify import verify
from cloister.crypto.bundle import BundleHeader, BundleWriter, IncomingStore, read_header, verify_bundle
from cloister.crypto.hpke import wrap
from cloister.crypto.keys import DataKey, PartyKey
from cloister.enclave.checkpoints import CheckpointFolder
from cloister.enclave.core import EnclaveCore
from cloister.enclave.intake import BundleIntake
from cloister.enclave.results import Outcome
from cloister.errors import CloisterError
from cloister.jobfile.resolve import canonical_json
from cloister.party.bundles import SealedParty
from cloister.party.client import PartyClient, Results

PARTIES = ("north", "south")
KINDS = ("train", "test")
MEASUREMENT = b"m" * 32
NOW = 1_800_000_000
POLICY = AppraisalPolicy.insecure_simulated_only(MEASUREMENT)
ADAPTER = {CONFIG: b'{"r": 8, "base_model_name_or_path": "tiny"}', WEIGHTS: b"weights"}


def now() -> float:
    return float(NOW)


def attester(measurement: bytes = MEASUREMENT) -> InsecureSimulatedAttester:
    return InsecureSimulatedAttester(measurement=measurement, clock=now)


def claims_of(source: Attester, policy: AppraisalPolicy = POLICY) -> Claims:
    return verify(source.collect(bytes(64)), policy, bytes(64), now(), allow_simulated=True)


def canonical_job(
    keys: dict[str, PartyKey], *, name: str = "tiny", policy: AppraisalPolicy = POLICY, quorum: int | None = None
) -> bytes:
    parties = [{"name": party, "public_key": key.public.hex()} for party, key in keys.items()]
    job = {"job": {"name": name}, "party": parties, "checkpoint": {"quorum": quorum}}
    return canonical_json({"job": job, "policy_sha256": policy.sha256})


@dataclass
class Wire:
    """A session in memory, as the one party it belongs to. `asked` keeps requests; `alter` may change replies."""

    core: EnclaveCore
    party: str
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    alter: Callable[[str, dict[str, Any]], dict[str, Any]] = lambda method, reply: reply

    def request(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
        self.asked.append((method, body))
        quick = {**body, "wait_ms": min(50, body["wait_ms"])} if "wait_ms" in body else body
        return self.alter(method, self.core.handle(self.party, method, quick))

    def methods(self) -> list[str]:
        return [method for method, _ in self.asked]


@dataclass
class Stage:
    """One job's parties with their keys and bundles, and enclave instances for it."""

    folder: Path
    names: tuple[str, ...] = PARTIES
    quorum: int | None = None
    keys: dict[str, PartyKey] = field(default_factory=dict)
    sealed: dict[str, SealedParty] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.keys = {name: PartyKey.generate() for name in self.names}
        self.canonical = canonical_job(self.keys, quorum=self.quorum)
        self.job_id = hashlib.sha256(self.canonical).hexdigest()
        self.parties = {name: key.public for name, key in self.keys.items()}
        for name in self.names:
            self.seal(name, f"secret of {name}".encode())

    def seal(self, party: str, content: bytes, *, key: PartyKey | None = None, job_id: str = "") -> SealedParty:
        """Make a party's bundles anew."""
        key, job_id, bundles, data_keys = key or self.keys[party], job_id or self.job_id, {}, {}
        for kind in KINDS:
            path = self.folder / f"{party}-{kind}"
            header = BundleHeader(
                job_id=job_id,
                party=party,
                kind=kind,  # type: ignore[arg-type]  # one of KINDS
                schema={"activation_dtype": "float32", "hidden": 8},
                counts={"packs": 1},
                chunk_bytes=64,
                max_payload_bytes=4096,
            )
            with BundleWriter(path, header, key) as writer:
                writer.write(content + kind.encode())
            bundles[kind] = verify_bundle(path, job_id=job_id, party=party, public_key=key.public)
            data_keys[kind] = writer.data_key
        counts = dict.fromkeys(KINDS, 1)
        self.sealed[party] = SealedParty(bundles=bundles, data_keys=data_keys, records=counts, truncated={})
        return self.sealed[party]

    def enclave(self, store: str = "store", **changes: Any) -> EnclaveCore:
        """A fresh instance; one with another `store` has received nothing yet."""
        (self.folder / store).mkdir(exist_ok=True)
        source = changes.pop("attester", attester())
        incoming = IncomingStore(
            self.folder / store, job_id=self.job_id, public_keys=self.parties, chunk_bytes=64, max_payload_bytes=4096
        )
        values: dict[str, Any] = {
            "job_id": self.job_id,
            "parties": self.parties,
            "intake": BundleIntake(incoming, KINDS),
            "attester": source,
            "claims": changes.get("claims") or claims_of(source),
            "recipients": frozenset({"north"}),
            "checkpoints": CheckpointFolder(self.folder / store / "checkpoints"),
            "quorum": self.quorum or len(self.names),
            "query": lambda party, method, fields: {},
            "clock": now,
        }
        core = EnclaveCore(**(values | changes))
        core.store, core.intake = incoming, values["intake"]  # type: ignore[attr-defined]  # for tests
        return core

    def client(self, party: str, **changes: Any) -> PartyClient:
        values: dict[str, Any] = {
            "job_id": self.job_id,
            "name": party,
            "key": self.keys[party],
            "parties": self.parties,
            "policy": POLICY,
            "allow_simulated": True,
            "memory": self.folder / f"{party}.manifest",
            "clock": now,
            "quorum": self.quorum,
        }
        return PartyClient(**(values | changes))

    def deliver(self, core: EnclaveCore, party: str) -> None:
        """What an upload does."""
        for kind, bundle in self.sealed[party].bundles.items():
            head = read_header(bundle.path)
            incoming = core.store.expected(party, kind)  # type: ignore[attr-defined]
            offset = incoming.begin(head.encoded, head.signature)
            if incoming.bundle is None:
                incoming.feed(offset, bundle.path.read_bytes()[offset:])

    def take_part(self, core: EnclaveCore, party: str, wire: Wire | None = None, **changes: Any) -> Results:
        """One party's whole way."""
        return self.client(party, **changes).take_part(
            wire or Wire(core, party),
            self.sealed[party],
            upload=lambda: self.deliver(core, party),
            on_missing=lambda names: None,
            on_event=lambda event: None,
        )

    def release(self, core: EnclaveCore, party: str, **changes: Any) -> None:
        """What a party does from the manifest to its share, one request after the other; needs no other party."""
        core.handle(party, "keys", key_release(self, core, party, **changes))
        self.keep_share(core, party)

    def keep_share(self, core: EnclaveCore, party: str) -> None:
        record = ShareRecord.from_bytes(core.handle(party, "share", {"wait_ms": 0})["record"])
        core.handle(party, "kept", {"signature": self.keys[party].sign(KEPT_LABEL, record.sha256)})

    def outcome(self, core: EnclaveCore) -> Outcome:
        """What training would hand over, with a receipt of this instance."""
        metrics = [{"system": "cloister", "bits_per_byte": 1.5}]
        assert core.manifest is not None
        body = {
            "job_id": self.job_id,
            "job": self.canonical.decode(),
            "approvals": {name: s.hex() for name, s in core.approvals().items()},
            "manifest": core.manifest.to_bytes().hex(),
            "manifest_signatures": {name: s.hex() for name, s in core.manifest_signatures().items()},
            "history": core.history(),
            "adapter_sha256": adapter_sha256(ADAPTER),
            "adapter_files": file_hashes(ADAPTER),
            "metrics": metrics,
            "started": NOW - 10,
            "ended": NOW,
        }
        receipt = make_receipt(
            body,
            instance_id=core.instance_id,
            signing_key=core.signing_key,
            hpke_key=core.hpke_key.public,
            evidence=core.evidence,
        )
        return Outcome(
            declared=json.dumps({"results": metrics}).encode(),
            private={name: {"cloister": f"scores of {name}"} for name in self.names},
            adapter=ADAPTER,
            receipt=receipt,
        )

    def perform(self, core: EnclaveCore, **special: Callable[[], Results]) -> dict[str, Results | CloisterError]:
        """Everybody at once, until all have ended; `special` replaces what a party does. Results or errors by party."""
        ended: dict[str, Results | CloisterError] = {}

        def play(name: str, act: Callable[[], Results]) -> None:
            try:
                ended[name] = act()
            except CloisterError as error:
                ended[name] = error
                core.fail(error)  # nobody need wait for this one

        acts = {name: special.get(name, lambda name=name: self.take_part(core, name)) for name in self.names}
        threads = [threading.Thread(target=play, args=item, daemon=True) for item in acts.items()]
        for thread in threads:
            thread.start()
        try:
            core.wait_for_keys(20.0, lambda missing: core._raise_failure("north"))
            core.restore()
            core.finish(self.outcome(core))
        except CloisterError:
            pass  # a party's error, which is in `ended`
        for thread in threads:
            thread.join(20.0)
            assert not thread.is_alive()
        return ended


def key_release(
    stage: Stage,
    core: EnclaveCore,
    party: str = "north",
    *,
    digest: bytes | None = None,
    instance_id: bytes | None = None,
    hpke_key: bytes | None = None,
    named: str = "",
    signer: PartyKey | None = None,
    data_keys: dict[str, DataKey] | None = None,
    position: Position | None = None,
) -> dict[str, Any]:
    """The body of a "keys" request, with anything in it replaced."""
    assert core.manifest is not None
    digest, instance_id = digest or core.manifest.sha256, instance_id or core.instance_id
    signer = signer or stage.keys[party]
    wrapped = {
        kind: wrap(
            hpke_key or core.hpke_key.public,
            key.reveal(),
            wrap_info(manifest_sha256=digest, instance_id=instance_id, party=named or party, kind=kind),
        )
        for kind, key in (data_keys or stage.sealed[party].data_keys).items()
    }
    message = keys_message(manifest_sha256=digest, instance_id=instance_id, wrapped=wrapped)
    place = position or core.lineage.offered
    start = Start(position=place, last=place).signed(
        signer, job_id=stage.job_id, manifest_sha256=digest, instance_id=instance_id
    )
    return {
        "manifest_signature": signer.sign(MANIFEST_LABEL, digest),
        "wrapped": wrapped,
        "signature": signer.sign(KEYS_LABEL, message),
        "start": start.to_bytes(),
        "share_from": b"",
        "share": b"",
    }
