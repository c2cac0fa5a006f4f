"""What parties and enclave really say to each other in a job that is interrupted and goes on, held against the CDDL."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import pycddl
import pytest

from cloister.crypto.encoding import encode
from cloister.enclave.core import EnclaveCore
from cloister.errors import CloisterError, RunError
from tests.unit.enclave.stage import Stage, Wire
from tests.vectors.test_cddl import CDDL

Spoken = list[tuple[str, dict[str, Any], dict[str, Any]]]
METHODS = {
    "instance", "approve", "manifest", "start", "keys", "share", "kept", "checkpoint", "watch", "result", "adapter",
    "countersign", "receipt",
}  # fmt: skip


class ListeningWire(Wire):
    """Remembers every request with its reply."""

    def __init__(self, core: EnclaveCore, party: str, spoken: Spoken) -> None:
        super().__init__(core, party)
        self.spoken = spoken
        self.certified = threading.Event()
        """Set once the party has heard that a quorum has signed a checkpoint."""

    def request(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
        reply = super().request(method, body)
        self.spoken.append((method, body, reply))
        if method == "watch" and reply["certificate"]:
            self.certified.set()
        return reply


def train(stage: Stage, core: EnclaveCore, spoken: Spoken, *, to_the_end: bool) -> None:
    """All parties and an enclave that makes a checkpoint, then is killed or ends."""

    wires = {name: ListeningWire(core, name, spoken) for name in stage.names}

    def take_part(party: str) -> None:
        try:
            stage.take_part(core, party, wires[party])
        except CloisterError as error:
            if to_the_end:
                core.fail(error)

    threads = [threading.Thread(target=take_part, args=(name,), daemon=True) for name in stage.names]
    for thread in threads:
        thread.start()
    core.wait_for_keys(20.0, lambda missing: core._raise_failure("north"))
    core.restore()
    core.lineage.add(b"state of training", 10)
    assert core.wait_for_commit(20.0)
    # An instance that ends at once may end before its parties have heard of the certificate.
    assert all(wire.certified.wait(20.0) for wire in wires.values())
    core.finish(stage.outcome(core)) if to_the_end else core.fail(RunError("killed"))
    for thread in threads:
        thread.join(20.0)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Spoken:
    stage, found = Stage(tmp_path_factory.mktemp("job")), []
    train(stage, stage.enclave(), found, to_the_end=False)
    train(stage, stage.enclave(), found, to_the_end=True)
    return found


@cache
def schema(rule: str) -> pycddl.Schema:
    return pycddl.Schema(f"root = {rule if f'{chr(10)}{rule} = ' in CDDL else 'empty'}\n{CDDL}")


def test_every_request_and_reply_is_what_the_rules_say(spoken: Spoken) -> None:
    assert {method for method, _, _ in spoken} == METHODS
    for number, (method, body, reply) in enumerate(spoken):
        schema(f"{method}-request").validate_cbor(encode(body))
        schema(f"{method}-reply").validate_cbor(encode(reply))
        schema("request").validate_cbor(encode({"id": number, "method": method, "body": body}))
        schema("reply").validate_cbor(encode({"id": number, "ok": True, "body": reply}))


def test_the_job_was_one_that_says_something(spoken: Spoken) -> None:
    """Shares were given back, checkpoints signed, certificates shown: else the rules above were hardly used."""
    by_method = {method: [(b, r) for m, b, r in spoken if m == method] for method in METHODS}
    assert any(body["share"] and body["share_from"] for body, _ in by_method["keys"])
    assert any(reply["seal"] and reply["certificates"] for _, reply in by_method["start"])
    assert any(body["certificate"] for body, _ in by_method["start"])
    assert any(reply["checkpoint"] for _, reply in by_method["watch"])
    assert any(reply["certificate"] for _, reply in by_method["watch"])
    assert any(reply["manifest"] for _, reply in by_method["manifest"])


def test_rules_refuse_other_requests(spoken: Spoken) -> None:
    for method, body, reply in spoken:
        for rule, said in ((f"{method}-request", body), (f"{method}-reply", reply)):
            if said:  # the validator takes anything for an empty map
                with pytest.raises(pycddl.ValidationError):
                    schema(rule).validate_cbor(encode({**said, "unknown": 1}))
            for left_out in said:
                with pytest.raises(pycddl.ValidationError):
                    schema(rule).validate_cbor(encode({k: v for k, v in said.items() if k != left_out}))
