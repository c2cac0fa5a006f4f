"""Remembering recent hellos, so that a recorded one buys nobody another piece of evidence."""

from __future__ import annotations

import threading
from collections import OrderedDict

from cloister.errors import CapacityError, VerificationError

MAX_PER_PARTY = 4096


class ReplayGuard:
    """The random values of each party's hellos within the clock window; safe to share between threads.

    Only hellos with a valid signature come here, so only a party itself can fill its own quota.
    """

    def __init__(self, *, window_s: float, max_per_party: int = MAX_PER_PARTY) -> None:
        self._window_s = window_s
        self._max = max_per_party
        self._seen: dict[str, OrderedDict[bytes, float]] = {}
        self._lock = threading.Lock()

    def admit(self, party: str, random: bytes, made_at: float, now: float) -> None:
        """Take note of a hello.

        Raises: VerificationError("replay") if it was here before; CapacityError if the party sends too many.
        """
        with self._lock:
            seen = self._seen.setdefault(party, OrderedDict())
            # Forget only what the clock check refuses by now: a hello is acceptable until made_at + window.
            for old in [r for r, until in seen.items() if until < now]:
                del seen[old]
            if random in seen:
                raise VerificationError("replay", "this hello was used before", where=party)
            if len(seen) >= self._max:
                raise CapacityError("too many hellos in a short time", where=party, hint="wait some minutes")
            seen[random] = made_at + self._window_s
