"""Places for calls, and the time that each of them has: who may come in, and who is cut."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from cloister.errors import BusyError

_log = logging.getLogger(__name__)


class Strangers:
    """Calls that have not shown anything signed by a party of the job.

    A newcomer takes the place of the one that has waited longest. So a crowd that stays silent keeps nobody out who has
    something to show: it only has to come before `count` others do.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._waiting: dict[object, grpc.ServicerContext] = {}
        self._lock = threading.Lock()

    @contextmanager
    def wait(self, context: grpc.ServicerContext) -> Iterator[None]:
        """A place, until the block is left or others need it, which cancels the call."""
        key, crowded_out = object(), None
        with self._lock:
            if len(self._waiting) >= self._count:
                crowded_out = self._waiting.pop(next(iter(self._waiting)))
            self._waiting[key] = context
        if crowded_out is not None:
            _log.info("connection cut: a newer one took its place")
            crowded_out.cancel()
        try:
            yield
        finally:
            with self._lock:
                self._waiting.pop(key, None)


class Places:
    """A bounded number of places; whoever finds none is refused at once."""

    def __init__(self, count: int, refusal: str) -> None:
        self._free = threading.BoundedSemaphore(count)
        self._refusal = refusal

    @contextmanager
    def take(self) -> Iterator[None]:
        """Raises: BusyError when there is none."""
        if not self._free.acquire(blocking=False):
            raise BusyError(self._refusal, hint="try again later")
        try:
            yield
        finally:
            self._free.release()


class Timer:
    """When a connection is to be cut unless something happens."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self.context = context
        self.deadline: float | None = None

    def set(self, timeout_s: float | None) -> None:
        """Start anew, or stop with None."""
        self.deadline = None if timeout_s is None else time.monotonic() + timeout_s


class Watchdog:
    """One thread that cuts connections whose timer has run out: strangers, slow readers, the silent."""

    _PERIOD_S = 0.25

    def __init__(self) -> None:
        self._timers: set[Timer] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="enclave-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    @contextmanager
    def watch(self, context: grpc.ServicerContext) -> Iterator[Timer]:
        """A timer for this connection, as long as the block runs."""
        timer = Timer(context)
        with self._lock:
            self._timers.add(timer)
        try:
            yield timer
        finally:
            with self._lock:
                self._timers.discard(timer)

    def _run(self) -> None:
        while not self._stopped.wait(self._PERIOD_S):
            now = time.monotonic()
            with self._lock:
                late = [t for t in self._timers if t.deadline is not None and t.deadline < now]
            for timer in late:
                _log.info("connection cut: too slow")
                timer.set(None)
                timer.context.cancel()
