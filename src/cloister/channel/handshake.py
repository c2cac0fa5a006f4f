"""The attested handshake as a pure state machine: bytes in, bytes out, no I/O, explicit clock.

    party (initiator)                                        enclave (responder)
    1 HELLO   job, party, time, random, X25519 and ML-KEM keys; signed by the party      ->
                                          <-  2 REPLY   X25519 key, ML-KEM ciphertext, random | sealed {evidence}
    3 FINISH  sealed {signature over the transcript, evidence if it has a TEE}           ->
    records (`channel.records`), one key per direction

Guarantees, once established: both know the job and that nobody altered a byte so far; the responder knows that the
initiator holds the party's key; the initiator knows that the keys end inside the attested enclave, because the
evidence is bound to the transcript of this handshake. Secret while X25519 or ML-KEM-768 holds; fresh keys per session.

A responder makes no evidence and keeps no state for a HELLO without a fresh, valid signature of one of the job's
parties. Every failure, and every input that the state does not expect, closes the machine for good.
"""

from __future__ import annotations

import enum
import hashlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from cloister.attest.attester import Attester
from cloister.attest.binding import session_report_data
from cloister.attest.claims import Claims
from cloister.attest.evidence import MAX_EVIDENCE_BYTES, Evidence
from cloister.channel.records import Opener, Sealer
from cloister.channel.replay import ReplayGuard
from cloister.crypto.encoding import Fields, encode, join
from cloister.crypto.keys import SIGNATURE_BYTES, PartyKey, verify_signature
from cloister.errors import CloisterError, ProtocolError, TransportError, VerificationError

VERSION = 1
SUITE = "X25519+ML-KEM-768/HKDF-SHA-512/AES-256-GCM"
"""The only one. There is nothing to negotiate, hence nothing to downgrade to."""

HELLO, REPLY, FINISH = 0x01, 0x02, 0x03
MAX_HELLO_BYTES = 4096
MAX_REPLY_BYTES = MAX_EVIDENCE_BYTES + 4096
MAX_FINISH_BYTES = MAX_EVIDENCE_BYTES + 4096
CLOCK_WINDOW_S = 300
"""How far the party's clock may be off: five minutes, as Kerberos allows."""

X25519_BYTES = 32
MLKEM_PUBLIC_BYTES = 1184
MLKEM_CIPHERTEXT_BYTES = 1088
RANDOM_BYTES = 32

_HELLO_LABEL = "handshake hello"
_FINISH_LABEL = "handshake finish"
_ZERO_NONCE = bytes(12)  # each handshake key seals exactly one message

VerifyEvidence = Callable[[Evidence, bytes, float], Claims]
"""(unverified evidence, expected report data, now) -> Claims, or VerificationError: `attest.verify.verify` with the
caller's policy and permission for simulated evidence filled in."""


class State(enum.Enum):
    """Where a handshake stands."""

    START = "start"
    WAIT_HELLO = "waiting for hello"
    WAIT_REPLY = "waiting for reply"
    WAIT_FINISH = "waiting for finish"
    OPEN = "open"
    CLOSED = "closed"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Who is at the other end, as far as the handshake proved it."""

    party: str
    """The party's name; empty where the peer is the enclave."""
    public_key: bytes
    """The party's Ed25519 key; empty where the peer is the enclave."""
    claims: Claims | None
    """Accepted evidence; None for a party without a TEE."""
    evidence: bytes = b""
    """A party's accepted evidence, encoded, for the receipt."""
    bound_to: bytes = b""
    """The 64 bytes of the transcript that the party's evidence is bound to."""


@dataclass(frozen=True, kw_only=True)
class Established:
    """An open session's keys and what is known about the peer."""

    job_id: str
    peer: Peer
    transcript: bytes
    """64 bytes, equal at both ends and unique to this session."""
    sealer: Sealer = field(repr=False)
    opener: Opener = field(repr=False)


class _Machine:
    """What both sides share: state, deadline, and the rule that any failure closes."""

    def __init__(self, state: State, *, timeout_s: float) -> None:
        self.state = state
        self._timeout_s = timeout_s
        self._deadline: float | None = None

    def close(self) -> None:
        """Give up; every later input is refused."""
        self.state = State.CLOSED

    def check_deadline(self, now: float) -> None:
        """Raises: TransportError, and closes, when the handshake takes too long."""
        if self._deadline is None:
            self._deadline = now + self._timeout_s
        if now > self._deadline and self.state is not State.OPEN:
            self.close()
            raise TransportError(f"the handshake took longer than {self._timeout_s:g} s")

    def _expect(self, state: State, now: float) -> None:
        if self.state is not state:
            was = self.state
            self.close()
            raise ProtocolError(f"a handshake message came while {was.value}")
        self.check_deadline(now)


class Initiator(_Machine):
    """The party's side.

    Args:
        verify_evidence: appraises the enclave's evidence under the party's own policy.
        attester: the party's own TEE, if it has one.
    """

    def __init__(
        self,
        *,
        job_id: str,
        party: str,
        key: PartyKey,
        verify_evidence: VerifyEvidence,
        attester: Attester | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        super().__init__(State.START, timeout_s=timeout_s)
        self._job_id = job_id
        self._party = party
        self._key = key
        self._verify_evidence = verify_evidence
        self._attester = attester
        self._x25519 = X25519PrivateKey.generate()
        self._mlkem = MLKEM768PrivateKey.generate()
        self._hello = b""

    def start(self, now: float) -> bytes:
        """Return HELLO. Raises: ProtocolError, and closes, unless it is the first call."""
        self._expect(State.START, now)
        body = encode(
            {
                "version": VERSION,
                "suite": SUITE,
                "job_id": self._job_id,
                "party": self._party,
                "time": int(now),
                "random": secrets.token_bytes(RANDOM_BYTES),
                "x25519": self._x25519.public_key().public_bytes_raw(),
                "mlkem": self._mlkem.public_key().public_bytes_raw(),
            }
        )
        message = encode({"body": body, "signature": self._key.sign(_HELLO_LABEL, body)})
        self._hello = bytes([HELLO]) + message
        self.state = State.WAIT_REPLY
        return self._hello

    def receive(self, message: bytes, now: float) -> tuple[bytes, Established]:
        """Take REPLY; return FINISH and the open session.

        Raises: ProtocolError, VerificationError or TransportError; the machine is then closed.
        """
        self._expect(State.WAIT_REPLY, now)
        try:
            finish, established = self._finish(message, now)
        except CloisterError:
            self.close()
            raise
        self.state = State.OPEN
        return finish, established

    def _finish(self, message: bytes, now: float) -> tuple[bytes, Established]:
        fields = _open_envelope(message, REPLY, MAX_REPLY_BYTES, "reply")
        share, sealed = fields.blob("share", max_size=2048), fields.blob("sealed", max_size=MAX_REPLY_BYTES)
        fields.end()
        # (1) The shared secret, bound to everything that both have said.
        transcript = _hash("reply", self._hello, share)
        keys = _Keys(self._shared_secret(share), transcript)
        # (2) The enclave's evidence, bound to the same transcript, under our policy.
        evidence = _unseal_evidence(keys.unseal("enclave handshake", transcript, sealed), "reply")
        if evidence is None:
            raise VerificationError("evidence-missing", "the enclave sent no evidence")
        expected = session_report_data(role="enclave", job_id=self._job_id, transcript=transcript)
        claims = self._verify_evidence(evidence, expected, now)
        # (3) Our proof, over all of it.
        transcript = _hash("evidence", transcript, sealed)
        own = b""
        if self._attester is not None:
            report_data = session_report_data(role="party", job_id=self._job_id, transcript=transcript)
            own = self._attester.collect(report_data).to_bytes()
        body = encode({"signature": self._key.sign(_FINISH_LABEL, transcript), "evidence": own})
        finish = bytes([FINISH]) + keys.seal("party handshake", transcript, body)
        transcript = _hash("finish", transcript, finish)
        return finish, Established(
            job_id=self._job_id,
            peer=Peer(party="", public_key=b"", claims=claims),
            transcript=transcript,
            sealer=Sealer(keys.expand("party records", transcript)),
            opener=Opener(keys.expand("enclave records", transcript)),
        )

    def _shared_secret(self, share: bytes) -> bytes:
        fields = Fields.decode(share, max_bytes=2048, what="reply")
        x25519 = fields.blob("x25519", size=X25519_BYTES)
        ciphertext = fields.blob("mlkem", size=MLKEM_CIPHERTEXT_BYTES)
        fields.blob("random", size=RANDOM_BYTES)
        fields.end()
        try:
            return self._mlkem.decapsulate(ciphertext) + self._x25519.exchange(
                X25519PublicKey.from_public_bytes(x25519)
            )
        except ValueError as exc:  # a point of small order
            raise ProtocolError("the reply's key share is malformed") from exc


@dataclass(frozen=True, kw_only=True)
class ResponderSettings:
    """What an enclave's responders have in common."""

    job_id: str
    public_keys: Mapping[str, bytes]
    """Ed25519 key of each of the job's parties, by name."""
    attester: Attester
    verify_evidence: VerifyEvidence | None = None
    """Appraises a party's evidence. None: parties have no TEE in this job, and evidence from one is refused."""
    require_evidence: bool = False
    """Whether every party must bring evidence (both sides in a TEE)."""
    timeout_s: float = 30.0
    replay: ReplayGuard = field(default_factory=lambda: ReplayGuard(window_s=CLOCK_WINDOW_S))

    def __post_init__(self) -> None:
        if self.require_evidence and self.verify_evidence is None:
            raise ValueError("require_evidence needs verify_evidence")


class Responder(_Machine):
    """The enclave's side, for one connection."""

    def __init__(self, settings: ResponderSettings) -> None:
        super().__init__(State.WAIT_HELLO, timeout_s=settings.timeout_s)
        self._settings = settings
        self.on_admitted: Callable[[str], object] = lambda party: None
        """Told whose fresh, signed hello came, before anything costly is done for it; may raise CloisterError."""
        self._party = ""
        self._transcript = b""
        self._keys: _Keys | None = None

    def receive(self, message: bytes, now: float) -> bytes | Established:
        """Take HELLO and return REPLY, or take FINISH and return the open session.

        Raises: ProtocolError, VerificationError or TransportError; the machine is then closed.
        """
        if self.state is State.WAIT_HELLO:
            self.check_deadline(now)
            step: Callable[[bytes, float], bytes | Established] = self._reply
            following = State.WAIT_FINISH
        else:
            self._expect(State.WAIT_FINISH, now)
            step, following = self._establish, State.OPEN
        try:
            result = step(message, now)
        except CloisterError:
            self.close()
            raise
        self.state = following
        return result

    def _reply(self, message: bytes, now: float) -> bytes:
        x25519, mlkem = self._admit(message, now)
        self.on_admitted(self._party)
        ours = X25519PrivateKey.generate()
        try:
            exchanged = ours.exchange(X25519PublicKey.from_public_bytes(x25519))
            encapsulated, ciphertext = MLKEM768PublicKey.from_public_bytes(mlkem).encapsulate()
        except ValueError as exc:
            raise ProtocolError("the hello's key share is malformed") from exc
        share = encode(
            {
                "x25519": ours.public_key().public_bytes_raw(),
                "mlkem": ciphertext,
                "random": secrets.token_bytes(RANDOM_BYTES),
            }
        )
        transcript = _hash("reply", message, share)
        self._keys = _Keys(encapsulated + exchanged, transcript)
        report_data = session_report_data(role="enclave", job_id=self._settings.job_id, transcript=transcript)
        evidence = self._settings.attester.collect(report_data).to_bytes()
        sealed = self._keys.seal("enclave handshake", transcript, encode({"evidence": evidence}))
        self._transcript = _hash("evidence", transcript, sealed)
        return bytes([REPLY]) + encode({"share": share, "sealed": sealed})

    def _admit(self, message: bytes, now: float) -> tuple[bytes, bytes]:
        """Check HELLO; return the party's key shares. The order matters: nothing costly before the signature."""
        fields = _open_envelope(message, HELLO, MAX_HELLO_BYTES, "hello")
        body, signature = fields.blob("body"), fields.blob("signature", size=SIGNATURE_BYTES)
        fields.end()
        fields = Fields.decode(body, max_bytes=MAX_HELLO_BYTES, what="hello")
        # (1) Version and suite.
        if (fields.integer("version", low=0, high=1 << 32), fields.text("suite")) != (VERSION, SUITE):
            hint = "use the same version of cloister at both ends"
            raise VerificationError("suite", "the party speaks another version of the protocol", hint=hint)
        # (2) The job, the party, its signature.
        job_id, party = fields.text("job_id"), fields.text("party")
        if job_id != self._settings.job_id:
            hint = "compare the job files; every shared field must be equal"
            raise VerificationError("job", "the party is in another job than this enclave", hint=hint)
        if party not in self._settings.public_keys:
            raise VerificationError("party", "this party is not in the job", hint="check --party and the job file")
        verify_signature(self._settings.public_keys[party], _HELLO_LABEL, body, signature, where=party)
        # (3) Fresh: made now, and not seen before.
        made_at = fields.integer("time", low=0, high=1 << 40)
        if abs(now - made_at) > CLOCK_WINDOW_S:
            hint = f"the clocks of party and enclave differ by more than {CLOCK_WINDOW_S} s"
            raise VerificationError("clock", "the party's hello is not of now", hint=hint)
        self._settings.replay.admit(party, fields.blob("random", size=RANDOM_BYTES), made_at, now)
        x25519, mlkem = fields.blob("x25519", size=X25519_BYTES), fields.blob("mlkem", size=MLKEM_PUBLIC_BYTES)
        fields.end()
        self._party = party
        return x25519, mlkem

    def _establish(self, message: bytes, now: float) -> Established:
        keys = self._keys
        if keys is None:
            raise RuntimeError("no keys")
        if not 1 < len(message) <= MAX_FINISH_BYTES or message[0] != FINISH:
            raise ProtocolError("finish was expected")
        body = keys.unseal("party handshake", self._transcript, message[1:])
        fields = Fields.decode(body, max_bytes=MAX_FINISH_BYTES, what="finish")
        signature = fields.blob("signature", size=SIGNATURE_BYTES)
        public_key = self._settings.public_keys[self._party]
        verify_signature(public_key, _FINISH_LABEL, self._transcript, signature, where=self._party)
        evidence = _evidence(fields)
        claims = self._party_claims(evidence, now)
        transcript = _hash("finish", self._transcript, message)
        return Established(
            job_id=self._settings.job_id,
            peer=Peer(
                party=self._party,
                public_key=public_key,
                claims=claims,
                evidence=b"" if evidence is None else evidence.to_bytes(),
                bound_to=self._transcript,
            ),
            transcript=transcript,
            sealer=Sealer(keys.expand("enclave records", transcript)),
            opener=Opener(keys.expand("party records", transcript)),
        )

    def _party_claims(self, evidence: Evidence | None, now: float) -> Claims | None:
        if evidence is None:
            if self._settings.require_evidence:
                raise VerificationError("evidence-missing", "the party sent no evidence", where=self._party)
            return None
        if self._settings.verify_evidence is None:
            raise ProtocolError("the party sent evidence, which this job does not ask for", where=self._party)
        expected = session_report_data(role="party", job_id=self._settings.job_id, transcript=self._transcript)
        return self._settings.verify_evidence(evidence, expected, now)


class _Keys:
    """The key schedule: HKDF-SHA-512 over both shared secrets, salted with the transcript that they come from.

    ML-KEM's ciphertext and key and both X25519 keys are in the transcript, so the combination is safe while one of
    the two holds (as in draft-ietf-tls-hybrid-design and X-Wing).
    """

    def __init__(self, shared_secret: bytes, transcript: bytes) -> None:
        self._master = HKDF(SHA512(), 64, salt=transcript, info=b"cloister session v1 master").derive(shared_secret)

    def expand(self, label: str, transcript: bytes) -> bytes:
        """A 256-bit key for one purpose."""
        info = join(b"cloister session v1", label.encode(), transcript)
        return HKDFExpand(SHA512(), 32, info).derive(self._master)

    def seal(self, label: str, transcript: bytes, plaintext: bytes) -> bytes:
        """Seal the one message of `label`."""
        return AESGCM(self.expand(label, transcript)).encrypt(_ZERO_NONCE, plaintext, transcript)

    def unseal(self, label: str, transcript: bytes, sealed: bytes) -> bytes:
        """Raises: VerificationError("handshake") if anything in the handshake so far was altered."""
        try:
            return AESGCM(self.expand(label, transcript)).decrypt(_ZERO_NONCE, sealed, transcript)
        except (InvalidTag, ValueError) as exc:
            hint = "a message was altered on the way"
            raise VerificationError("handshake", "the handshake does not agree at both ends", hint=hint) from exc


def _open_envelope(message: bytes, kind: int, max_bytes: int, what: str) -> Fields:
    if not message or message[0] != kind:
        raise ProtocolError(f"{what} was expected")
    return Fields.decode(message[1:], max_bytes=max_bytes, max_items=64, what=what)


def _unseal_evidence(body: bytes, what: str) -> Evidence | None:
    fields = Fields.decode(body, max_bytes=MAX_REPLY_BYTES, what=what)
    return _evidence(fields)


def _evidence(fields: Fields) -> Evidence | None:
    encoded = fields.blob("evidence", max_size=MAX_EVIDENCE_BYTES)
    fields.end()
    return Evidence.from_bytes(encoded) if encoded else None


def _hash(label: str, *fields: bytes) -> bytes:
    return hashlib.sha512(join(b"cloister handshake v1", label.encode(), *fields)).digest()
