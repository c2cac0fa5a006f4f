"""A verification as a numbered list of checks that people can read, up to the first that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cloister.errors import VerificationError


@dataclass(frozen=True, kw_only=True)
class Check:
    """One step of a verification."""

    n: int
    name: str
    passed: bool
    reason: str


@dataclass
class Step:
    """A check that is under way."""

    reason: str = "holds"
    """What to tell if it passes; the body may refine it."""


@dataclass
class Checks:
    """Records checks while they are made.

    with checks.step("signature") as step:
        ...                                    # raises VerificationError if it does not hold
        step.reason = "ECDSA P-384 by the VCEK over the report"
    """

    done: list[Check] = field(default_factory=list)

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Record the block as one check; a VerificationError is recorded as its failure and goes on."""
        step = Step()
        try:
            yield step
        except VerificationError as exc:
            self._add(name, False, f"{exc} ({exc.hint})" if exc.hint else str(exc))
            raise
        self._add(name, True, step.reason)

    def _add(self, name: str, passed: bool, reason: str) -> None:
        self.done.append(Check(n=len(self.done) + 1, name=name, passed=passed, reason=reason))
