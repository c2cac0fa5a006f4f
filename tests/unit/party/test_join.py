"""Coming back after a lost connection, and what a party keeps."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cloister.errors import ProtocolError, TransportError, VerificationError
from cloister.party import taking_part
from cloister.party.client import Results
from cloister.progress import Event, Silent
from tests.unit.enclave.stage import Stage


@pytest.fixture
def results(tmp_path: Path) -> dict[str, Results]:
    (tmp_path / "stage").mkdir()
    stage = Stage(tmp_path / "stage")
    ended = stage.perform(stage.enclave())
    return {name: r for name, r in ended.items() if isinstance(r, Results)}


class Clock:
    """Time that passes only in sleep and in work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("cloister.party.taking_part.time", self)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pass_by(seconds)

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


def attempts(clock: Clock, *outcomes: tuple[float, object]) -> tuple[Callable[[], Results], list[float]]:
    """(an attempt that takes so long and ends like this each time, when attempts began)"""
    begun: list[float] = []

    def attempt() -> Results:
        seconds, outcome = outcomes[min(len(begun), len(outcomes) - 1)]
        begun.append(clock.now)
        clock.pass_by(seconds)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome  # type: ignore[return-value]

    return attempt, begun


def test_comes_back_until_it_works(monkeypatch: pytest.MonkeyPatch, results: dict[str, Results]) -> None:
    clock = Clock(monkeypatch)
    lost = (1.0, TransportError("gone"))
    attempt, begun = attempts(clock, lost, lost, lost, (1.0, results["north"]))
    assert taking_part.with_reconnect(attempt, progress=Silent()) is results["north"]
    assert begun == [0.0, 1.5, 3.5, 6.5]  # pauses of 0.5, 1 and 2 seconds


class Seen:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def report(self, event: Event) -> None:
        self.notes += [f"{event.task}: {event.note}"] * bool(event.note and not event.ended)


def test_says_that_it_waits(monkeypatch: pytest.MonkeyPatch, results: dict[str, Results]) -> None:
    clock, seen = Clock(monkeypatch), Seen()
    attempt, _ = attempts(clock, (1.0, TransportError("gone")), (1.0, results["north"]))
    taking_part.with_reconnect(attempt, progress=seen)
    assert seen.notes == ["connection lost, waiting: gone; tried for 299 s more"]


def test_gives_up_when_the_enclave_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    attempt, begun = attempts(clock, (1.0, TransportError("gone")))
    with pytest.raises(TransportError):
        taking_part.with_reconnect(attempt, progress=Silent())
    assert taking_part.RECONNECT_S - 20.0 < clock.now <= taking_part.RECONNECT_S
    assert max(b - a for a, b in itertools.pairwise(begun)) <= 16.0


def test_a_connection_that_worked_for_a_while_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    attempt, _ = attempts(clock, (10_000.0, TransportError("gone")), (1.0, TransportError("gone")))
    with pytest.raises(TransportError):
        taking_part.with_reconnect(attempt, progress=Silent())
    assert clock.now > 10_000.0 + taking_part.RECONNECT_S - 20.0


@pytest.mark.parametrize("error", [VerificationError("binding", "replayed"), ProtocolError("nonsense")])
def test_a_refusal_is_final(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    clock = Clock(monkeypatch)
    attempt, begun = attempts(clock, (1.0, error))
    with pytest.raises(type(error)):
        taking_part.with_reconnect(attempt, progress=Silent())
    assert len(begun) == 1


@pytest.mark.parametrize("complete", [True, False])
def test_what_is_kept_counts_once_the_enclave_is_gone(
    monkeypatch: pytest.MonkeyPatch, results: dict[str, Results], complete: bool
) -> None:
    """At once where every party has countersigned; otherwise the party goes on looking for the enclave."""
    clock, kept = Clock(monkeypatch), replace(results["north"], complete=complete)
    attempt, begun = attempts(clock, (1.0, TransportError("gone")))
    assert taking_part.with_reconnect(attempt, lambda: kept, progress=Silent()) is kept
    assert (len(begun) == 1) == complete
    assert (clock.now > taking_part.RECONNECT_S - 20.0) != complete
