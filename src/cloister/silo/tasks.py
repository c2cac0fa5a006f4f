"""A party's enclave at work on the server's tasks, over a session of its own, beside the one that follows the job."""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from cloister.crypto.encoding import Fields, encode
from cloister.errors import AcceleratorError, ProtocolError, TransportError
from cloister.federation.state import GlobalState
from cloister.job import Job
from cloister.party.follower import WAIT_MS, Requests
from cloister.progress import Progress, Task, task
from cloister.silo.work import SiloWork

PIECE_BYTES = 8 << 20
_MAX_STATE_BYTES = 1 << 38


class _StoppedError(Exception):
    """The session that a round belongs to is over."""


class Worker:
    """Does one task after the other until it is told to stop.

    Args:
        work: what the party computes. on_final: is given the state that was scored, when it was.
    """

    def __init__(
        self,
        work: SiloWork,
        job: Job,
        party: str,
        progress: Progress,
        *,
        on_final: Callable[[GlobalState], None] = lambda state: None,
    ) -> None:
        self._work, self._job, self._party, self._progress, self._on_final = work, job, party, progress, on_final
        self._stopping = threading.Event()
        self._failure: BaseException | None = None

    @contextmanager
    def beside(self, session: AbstractContextManager[Requests]) -> Iterator[Callable[[], None]]:
        """Work in a thread over `session` while the block runs. Its value raises what has stopped the work."""
        self._stopping.clear()
        self._failure = None
        thread = threading.Thread(target=self._run, args=(session,), name="rounds", daemon=True)
        thread.start()
        try:
            yield self._check
        finally:
            self._stopping.set()
            thread.join()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self, session: AbstractContextManager[Requests]) -> None:
        try:
            with session as requests:
                while not self._stopping.is_set():
                    self._one(requests)
        except _StoppedError:
            pass  # nobody waits for this round any more
        except BaseException as failure:  # noqa: BLE001  # raised again in the thread that looks
            self._failure = failure

    def _one(self, session: Requests) -> None:
        """Ask for a task; do it if there is one."""
        fields = Fields(session.request("task", {"wait_ms": min(WAIT_MS, 2_000)}), "task")
        number = fields.integer("number", low=0, high=2**40)
        kind = fields.text("kind")
        size = fields.integer("size", low=0, high=_MAX_STATE_BYTES)
        digest = fields.blob("sha256", max_size=32)
        fields.end()
        if number == 0:
            return
        content = self._fetch(session, number, size)
        if content is None:
            return
        if hashlib.sha256(content).digest() != digest:
            raise ProtocolError("the state of a round is not the one announced", where="enclave")
        try:
            result = self._do(kind, GlobalState.from_bytes(content))
        except TransportError as exc:
            # Coming back to the server's enclave would not help: this process has to begin anew.
            hint = "see that it runs, then start this party again: it begins the round again"
            raise AcceleratorError(exc.message, where=exc.where, hint=hint) from exc
        self._deliver(session, number, result)

    @staticmethod
    def _fetch(session: Requests, number: int, size: int) -> bytes | None:
        """The state, or None if the task was closed meanwhile."""
        content = bytearray()
        while len(content) < size:
            fields = Fields(session.request("state", {"number": number, "offset": len(content)}), "state")
            piece = fields.blob("data", max_size=PIECE_BYTES)
            fields.end()
            if not piece:
                return None
            content += piece
        return bytes(content)

    @staticmethod
    def _deliver(session: Requests, number: int, result: bytes) -> None:
        """Send a result; one that comes too late is dropped by the server."""
        for offset in range(0, len(result), PIECE_BYTES):
            body = {
                "number": number,
                "offset": offset,
                "size": len(result),
                "data": result[offset : offset + PIECE_BYTES],
            }
            fields = Fields(session.request("deliver", body), "deliver")
            accepted = fields.boolean("accepted")
            fields.end()
            if not accepted:
                return

    def _do(self, kind: str, state: GlobalState) -> bytes:
        if kind == "train":
            return self._train(state)
        if kind == "validate":
            return self._validate(state)
        if kind == "score":
            return self._score(state)
        raise ProtocolError(f"the server asks for an unknown task {kind[:40]!r}", where="enclave")

    def _train(self, state: GlobalState) -> bytes:
        rounds = self._job.federation.rounds
        with task(self._progress, f"round {state.round + 1} of {rounds}", unit="steps") as running:
            result = self._work.train(
                state.round,
                state.weights,
                state.moments,
                on_step=functools.partial(self._on_step, running),
            )
        return result.as_update(self._party, state.round, self._job.federation).to_bytes()

    def _on_step(self, running: Task, done: int, total: int, loss: float) -> None:
        running.set(done, total=total, note=f"loss {loss:.3f}")
        if self._stopping.is_set():
            raise _StoppedError

    def _validate(self, state: GlobalState) -> bytes:
        with task(self._progress, f"validating round {state.round}"):
            bits, size = self._work.validate(state.weights)
        return encode({"bits": bits, "bytes": size})

    def _score(self, state: GlobalState) -> bytes:
        with task(self._progress, "scoring", total=self._work.test_tokens, unit="tokens") as running:
            scores = self._work.score(state.weights, running.advance)
        self._on_final(state)
        return json.dumps({system: found.to_json_lines() for system, found in scores.items()}).encode()
