"""The core's waiting, news and phases. What it refuses is in tests/attacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cloister.agreement import APPROVAL_LABEL
from cloister.agreement.receipt import Receipt
from cloister.attest.verify import MAX_CLOCK_SKEW_S
from cloister.enclave.core import EnclaveCore
from cloister.errors import ProtocolError, RunError
from tests.unit.enclave.stage import NOW, Stage


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def approve(stage: Stage, core: EnclaveCore, party: str) -> None:
    signature = stage.keys[party].sign(APPROVAL_LABEL, bytes.fromhex(stage.job_id))
    core.handle(party, "approve", {"signature": signature})


def missing(core: EnclaveCore, party: str = "north") -> Any:
    return core.handle(party, "manifest", {"wait_ms": 0})["missing"]


def test_what_is_still_missing_in_words(stage: Stage) -> None:
    core = stage.enclave()
    assert missing(core) == ["north (approval)", "south (approval)"]
    approve(stage, core, "north")
    assert missing(core) == ["north (train, test bundle)", "south (approval)"]
    stage.deliver(core, "north")
    assert missing(core) == ["north (data keys)", "south (approval)"]
    assert (core.phase, core.manifest) == ("collecting", None)
    approve(stage, core, "south")
    stage.deliver(core, "south")
    assert missing(core) == []
    assert core.phase == "agreeing"
    with pytest.raises(ProtocolError, match=r"north \(data keys\), south \(data keys\)") as error:
        core.wait_for_keys(0.0, lambda names: None)
    assert error.value.hint


def test_events_come_once_and_in_order(stage: Stage) -> None:
    core = stage.enclave()
    for step in range(300):
        core.announce({"step": step})
    seen: list[dict[str, Any]] = []
    while len(seen) < 300:
        reply = core.handle("north", "watch", {"after": len(seen), "committed": 0, "wait_ms": 0})
        assert len(reply["events"]) <= 256
        seen += reply["events"]
    assert [event["step"] for event in seen] == list(range(300))
    assert core.handle("north", "watch", {"after": 300, "committed": 0, "wait_ms": 0})["events"] == []


def test_a_wait_is_bounded(stage: Stage) -> None:
    core = stage.enclave()
    for wait_ms in (-1, 3_600_001, 0.5, True):
        with pytest.raises(ProtocolError, match="wait_ms"):
            core.handle("north", "watch", {"after": 0, "committed": 0, "wait_ms": wait_ms})


def test_everybody_must_leave(stage: Stage) -> None:
    core = stage.enclave()
    core.handle("north", "leave", {})
    assert not core.wait_until_left(0.0)
    core.handle("south", "leave", {})
    assert core.wait_until_left(0.0)


def test_a_party_that_was_told_of_a_failure_need_not_leave(stage: Stage) -> None:
    core = stage.enclave()
    core.fail(RunError("the loss is nan", where="training step 3"))
    for name in stage.names:
        assert not core.wait_until_left(0.0)
        with pytest.raises(RunError, match="the loss is nan"):
            core.handle(name, "watch", {"after": 0, "committed": 0, "wait_ms": 0})
    assert core.wait_until_left(0.0)


def test_queries_go_to_the_service_once_the_model_is_trained(stage: Stage) -> None:
    asked: list[tuple[str, str]] = []
    core = stage.enclave(query=lambda party, method, fields: asked.append((party, method)) or {"ok": True})  # type: ignore[func-returns-value]
    stage.perform(core)
    assert core.handle("south", "query.open", {}) == {"ok": True}
    assert asked == [("south", "query.open")]


def test_two_instances_share_nothing(stage: Stage) -> None:
    first, second = stage.enclave(), stage.enclave()
    assert first.instance_id != second.instance_id
    assert first.signing_key.public != second.signing_key.public
    assert first.hpke_key.public != second.hpke_key.public


def test_the_last_countersignature_is_noted_before_any_party_hears_of_it(stage: Stage) -> None:
    core, noted = stage.enclave(), list[tuple[list[str], list[str]]]()
    finish = core.finish

    def note(receipt: Receipt) -> None:
        assert core.outcome is not None
        noted.append((sorted(receipt.countersignatures), sorted(core.outcome.receipt.countersignatures)))

    core.finish = lambda outcome: finish(outcome, note)  # type: ignore[method-assign, misc]
    stage.perform(core)
    [(then, told)] = noted
    assert then == ["north", "south"]
    assert len(told) == 1


@pytest.mark.parametrize("by", [-3600.0, 1.0 - MAX_CLOCK_SKEW_S, MAX_CLOCK_SKEW_S - 1.0, 86400.0])
def test_a_clock_that_was_set_is_not_attested(stage: Stage, by: float) -> None:
    """The receipt's times would be wrong, and parties could not countersign it. A machine may sleep, though."""
    offset = slept = 0.0
    core = stage.enclave(clock=lambda: NOW + slept + offset, steady=lambda: slept)
    slept = 7200.0
    core.check_clock()
    offset = by
    if abs(by) < MAX_CLOCK_SKEW_S:
        core.check_clock()
        return
    with pytest.raises(RunError, match="forward by 86400" if by > 0 else "back by 3600") as error:
        core.check_clock()
    assert error.value.hint


def test_training_does_not_begin_with_a_clock_that_was_set(stage: Stage) -> None:
    core = stage.enclave()
    stage.perform(core)
    core._clock = lambda: NOW + 3600.0
    with pytest.raises(RunError, match="clock"):
        core.restore()
