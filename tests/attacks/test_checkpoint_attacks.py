"""Attacks on restarts: old checkpoints, other programs, left instances, forged or foreign shares, restored memories."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cloister.agreement import APPROVAL_LABEL, approval_message
from cloister.agreement.checkpoint import (
    CHECKPOINT_LABEL,
    Certificate,
    Position,
    Seal,
    ShareRecord,
    Start,
    checkpoint_message,
    lineage_nonce,
    share_info,
)
from cloister.agreement.receipt import Receipt, body_bytes, verify_receipt
from cloister.attest.binding import instance_report_data
from cloister.attest.policy import AppraisalPolicy
from cloister.crypto.hpke import wrap
from cloister.crypto.keys import PartyKey
from cloister.crypto.sealing import SealingKey
from cloister.enclave.checkpoints import CheckpointFolder, Stored
from cloister.enclave.core import EnclaveCore
from cloister.errors import CloisterError, ProtocolError, VerificationError
from cloister.party.client import Results, VerifiedInstance
from cloister.party.memory import Memory
from tests.unit.enclave.stage import NOW, POLICY, Stage, Wire, attester, claims_of, key_release

STATES = (b"state one", b"state two", b"state three")


class KilledError(Exception):
    """kill -9."""


def wires(core: EnclaveCore, stage: Stage, **special: Wire) -> dict[str, Wire]:
    return {name: special.get(name, Wire(core, name)) for name in stage.names}


def play(
    stage: Stage,
    core: EnclaveCore,
    *,
    states: tuple[bytes, ...] = (),
    finish: bool = False,
    all_sign: bool = True,
    special: dict[str, Wire] | None = None,
    clients: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Parties and an instance at once: it restores, seals `states` one by one, then finishes or is killed.

    Returns what each party ended with: results or an error; and under "restored" what the instance went on from.
    """
    ended: dict[str, Any] = {}
    lines = wires(core, stage, **(special or {}))
    dead = threading.Event()

    for wire in lines.values():
        wire.alter = _mortal(wire.alter, dead)

    def take_part(name: str) -> None:
        try:
            ended[name] = stage.take_part(core, name, lines[name], **(clients or {}).get(name, {}))
        except KilledError:
            ended[name] = None
        except CloisterError as error:
            ended[name] = error

    threads = [threading.Thread(target=take_part, args=(name,), daemon=True) for name in stage.names]
    for thread in threads:
        thread.start()
    try:
        core.wait_for_keys(20.0, _Patience(ended, len(stage.names)))
        ended["restored"] = core.restore()
        for number, state in enumerate(states):
            core.lineage.add(state, number)
            assert not all_sign or core.wait_for_commit(10.0)
        if finish:
            core.finish(stage.outcome(core))
    except CloisterError as error:
        ended["enclave"] = error
        core.fail(error)
    if not finish:
        dead.set()
        core.announce({"killed": True})
    for thread in threads:
        thread.join(20.0)
        assert not thread.is_alive()
    return ended


def _mortal(
    alter: Callable[[str, dict[str, Any]], dict[str, Any]], dead: threading.Event
) -> Callable[[str, dict[str, Any]], dict[str, Any]]:
    def changed(method: str, reply: dict[str, Any]) -> dict[str, Any]:
        if dead.is_set():
            raise KilledError
        return alter(method, reply)

    return changed


class _Patience:
    """Ends the wait for parties once all have refused, or one has and the others have had time to."""

    def __init__(self, ended: dict[str, Any], names: int) -> None:
        self._ended, self._names, self._first = ended, names, 0.0

    def __call__(self, missing: list[str]) -> None:
        refused = [error for error in self._ended.values() if isinstance(error, CloisterError)]
        if refused:
            self._first = self._first or time.monotonic()
            if len(refused) == self._names or time.monotonic() - self._first > 1.5:
                raise ProtocolError("a party has left", where="enclave")


def state_of(stage: Stage, party: str, core: EnclaveCore) -> Any:
    assert core.manifest is not None
    return Memory(stage.client(party).memory_file, core.manifest.sha256).read()


def folder_of(stage: Stage, store: str = "store") -> Path:
    return stage.folder / store / "checkpoints"


def collect(stage: Stage, core: EnclaveCore) -> None:
    """Approvals and bundles, as far as the manifest."""
    for name in stage.names:
        approval = stage.keys[name].sign(APPROVAL_LABEL, approval_message(stage.job_id))
        core.handle(name, "approve", {"signature": approval})
        stage.deliver(core, name)
    core.handle(stage.names[0], "manifest", {"wait_ms": 0})


def copy_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put_back(folder: Path, copy: dict[str, bytes]) -> None:
    for path in folder.iterdir():
        path.unlink()
    for name, content in copy.items():
        (folder / name).write_bytes(content)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def killed_after(stage: Stage, *states: bytes, **more: Any) -> EnclaveCore:
    """An instance that was killed when all had signed its last checkpoint."""
    core = stage.enclave()
    ended = play(stage, core, states=states, **more)
    assert [ended[name] for name in stage.names] == [None] * len(stage.names), ended
    return core


# Nothing is attacked --------------------------------------------------------------------------------------------------


def test_two_restarts_to_a_receipt_of_three_instances(stage: Stage) -> None:
    first = killed_after(stage, *STATES[:2])
    second = stage.enclave()
    ended = play(stage, second, states=STATES[2:])
    assert ended["restored"] == STATES[1]
    third = stage.enclave()
    ended = play(stage, third, finish=True)
    assert ended["restored"] == STATES[2]
    results = ended["north"]
    assert isinstance(results, Results), results
    verdict = verify_receipt(results.receipt.to_bytes(), policy=POLICY, adapter_sha256=None, allow_simulated=True)
    assert verdict.passed, verdict.checks
    reasons = {check.name: check.reason for check in verdict.checks}
    assert reasons["checkpoints"] == "3 checkpoints in one chain by 3 instances; 3 of them signed by a quorum of 2"
    assert reasons["earlier instances"] == "the evidence of 2 earlier instances holds"
    listed = [entry["id"] for entry in json.loads(results.receipt.body)["history"]["earlier"]]
    assert listed == [first.instance_id.hex(), second.instance_id.hex()]
    assert state_of(stage, "north", third).position.number == 3
    assert set(state_of(stage, "north", third).shares) == {c.instance_id.hex() for c in (first, second, third)}


def test_a_restart_before_the_first_checkpoint(stage: Stage) -> None:
    killed_after(stage)
    ended = play(stage, stage.enclave(), finish=True)
    assert ended["restored"] is None
    assert isinstance(ended["north"], Results)


@pytest.mark.parametrize("signed_by", [(), ("north",)])
def test_a_crash_between_write_and_signature_neither_loses_nor_locks(stage: Stage, signed_by: tuple[str, ...]) -> None:
    """The last checkpoint is on disk; nobody, or not everybody, has signed it."""
    core = stage.enclave()

    def deaf(method: str, reply: dict[str, Any]) -> dict[str, Any]:
        seal = reply.get("checkpoint") if method == "watch" else None
        return {**reply, "checkpoint": b""} if seal and Seal.from_bytes(seal).number == 2 else reply

    special = {name: Wire(core, name, alter=deaf) for name in stage.names if name not in signed_by}
    original = core.lineage.is_committed
    core.lineage.is_committed = lambda: original() or _signers(core) == set(signed_by)  # type: ignore[method-assign]
    ended = play(stage, core, states=STATES[:2], special=special)
    assert ended["north"] is None
    assert {name: state_of(stage, name, core).position.number for name in stage.names} == {
        name: 2 if name in signed_by else 1 for name in stage.names
    }
    ended = play(stage, stage.enclave(), finish=True)
    assert ended["restored"] == STATES[1]
    assert isinstance(ended["north"], Results)


def _signers(core: EnclaveCore) -> set[str]:
    seal, signatures = core.lineage.history.chain[-1]
    return set(signatures) if seal.number == 2 else {"nobody yet"}


def test_a_crash_while_writing_leaves_the_checkpoint_before(stage: Stage) -> None:
    killed_after(stage, STATES[0])
    (folder_of(stage) / "00000002.sealed.part").write_bytes(b"half")
    ended = play(stage, stage.enclave(), states=STATES[1:2])
    assert ended["restored"] == STATES[0]
    assert isinstance(ended["restored"], bytes)


def test_an_instance_that_died_before_training_is_of_no_consequence(stage: Stage) -> None:
    """North had released its keys to it; it never trained."""
    killed_after(stage, STATES[0])
    lost = stage.enclave()

    def dies(method: str, reply: dict[str, Any]) -> dict[str, Any]:
        if method == "keys":
            raise KilledError
        return reply

    collect(stage, lost)
    with pytest.raises(KilledError):
        stage.take_part(lost, "north", Wire(lost, "north", alter=dies))
    assert state_of(stage, "north", lost).current == lost.instance_id
    ended = play(stage, stage.enclave(), finish=True)
    assert ended["restored"] == STATES[0]
    assert isinstance(ended["south"], Results)


# 14. Sealed state -----------------------------------------------------------------------------------------------------


def refusal(ended: dict[str, Any], party: str = "north") -> str:
    error = ended[party]
    assert isinstance(error, VerificationError), error
    assert error.exit_code == 3
    return error.code


def test_an_old_checkpoint_put_back_is_refused(stage: Stage) -> None:
    killed_after(stage, STATES[0])
    old = copy_of(folder_of(stage))
    assert play(stage, stage.enclave(), states=STATES[1:])["restored"] == STATES[0]
    put_back(folder_of(stage), old)
    core = stage.enclave()
    wire = Wire(core, "north")
    ended = play(stage, core, special={"north": wire})
    assert refusal(ended) == refusal(ended, "south") == "rollback"
    assert "keys" not in wire.methods()
    assert state_of(stage, "north", core).position.number == 3
    assert core.instance_id not in {i.id for i in state_of(stage, "north", core).instances}


def test_checkpoints_deleted_are_an_old_state_too(stage: Stage) -> None:
    killed_after(stage, *STATES)
    put_back(folder_of(stage), {})
    assert refusal(play(stage, stage.enclave())) == "rollback"


def test_going_back_needs_everybodys_word_and_is_noted(stage: Stage) -> None:
    killed_after(stage, STATES[0])
    old = copy_of(folder_of(stage))
    core = stage.enclave()
    play(stage, core, states=STATES[1:2])
    target = CheckpointFolder(folder_of(stage))
    put_back(folder_of(stage), old)
    stored = target.newest()
    assert stored is not None
    accept = {"accept": stored.seal.hash}
    assert refusal(play(stage, stage.enclave(), clients={"north": accept}), "south") == "rollback"
    wrong = {"accept": bytes(32)}
    assert refusal(play(stage, stage.enclave(), clients={"north": wrong, "south": wrong}), "south") == "rollback"
    core = stage.enclave()
    ended = play(stage, core, clients={"north": accept, "south": accept}, finish=True)
    assert ended["restored"] == STATES[0]
    results = ended["south"]
    assert isinstance(results, Results)
    assert len(state_of(stage, "south", core).authorised) == 1
    verdict = verify_receipt(results.receipt.to_bytes(), policy=POLICY, adapter_sha256=None, allow_simulated=True)
    assert verdict.passed
    reason = next(check.reason for check in verdict.checks if check.name == "checkpoints")
    assert "explicitly allowed by" in reason
    assert reason.endswith("south")
    # After that the newer branch is the past: nobody takes it for a memory that was restored.
    assert isinstance(play(stage, stage.enclave(), finish=True)["north"], Results)


def altered(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def _verify(found: Stored, key: bytes) -> None:
    found.seal.verify(key)
    found.record.verify(key)


def test_an_altered_checkpoint_is_passed_over_and_then_missed(stage: Stage) -> None:
    """Every part of the file; the operator gains no more than by deleting it."""
    core = killed_after(stage, *STATES)
    path = folder_of(stage) / "00000003.sealed"
    content, key = path.read_bytes(), core.signing_key.public
    for at in range(0, len(content), 7):
        path.write_bytes(altered(content, at))
        found = CheckpointFolder(folder_of(stage)).newest()
        if found is not None and found.seal.number == 3:  # signatures, which only parties can check
            with pytest.raises(VerificationError):
                _verify(found, key)
        else:
            assert found is not None
            assert found.seal.number == 2
    assert refusal(play(stage, stage.enclave())) == "rollback"


def test_content_that_its_operator_sealed(stage: Stage) -> None:
    """With hashes that fit: only the instance could have signed the seal."""
    core = killed_after(stage, STATES[0])
    stored = CheckpointFolder(folder_of(stage)).newest()
    assert stored is not None
    forged = SealingKey.generate().seal(b"mine", salt=stored.seal.salt, purpose=stored.seal.purpose())
    for key in (PartyKey.generate(), stage.keys["south"]):
        seal = replace(stored.seal, number=2, previous=stored.seal.hash).signed(forged, key)
        CheckpointFolder(folder_of(stage)).write(seal, stored.record, forged)
        assert refusal(play(stage, stage.enclave())) == "checkpoint"
    assert state_of(stage, "north", core).position.number == 1


def test_another_program_asks_for_the_keys(stage: Stage) -> None:
    killed_after(stage, STATES[0])
    other = attester(b"x" * 32)
    lax = AppraisalPolicy.insecure_simulated_only()
    core = stage.enclave(attester=other, claims=claims_of(other, lax))
    assert refusal(play(stage, core)) == "measurement"
    # Even a party whose policy takes any program gives nothing for another manifest than the one it has signed.
    core = stage.enclave(store="other", attester=other, claims=claims_of(other, lax))
    ended = play(stage, core, clients={name: {"policy": lax} for name in stage.names})
    assert refusal(ended) in ("manifest-policy", "manifest-changed")


def test_another_manifest_does_not_open_it(stage: Stage) -> None:
    """Some other bundles: the enclave itself takes the checkpoint for another history."""
    killed_after(stage, STATES[0])
    for name in stage.names:
        stage.client(name).memory.unlink()
        stage.client(name).memory_file.unlink()
    stage.seal("south", b"other records")
    (stage.folder / "store" / "south.train.bundle").unlink()
    (stage.folder / "store" / "south.test.bundle").unlink()
    ended = play(stage, stage.enclave())
    assert refusal(ended, "enclave") == "checkpoint"
    assert "manifest" in ended["enclave"].message


def test_the_checkpoint_of_another_job(stage: Stage, tmp_path: Path) -> None:
    killed_after(stage, STATES[0])
    (tmp_path / "other").mkdir()
    other = Stage(tmp_path / "other")
    (other.folder / "store" / "checkpoints").mkdir(parents=True)
    put_back(folder_of(other), copy_of(folder_of(stage)))
    with pytest.raises(VerificationError) as error:
        other.enclave()
    assert error.value.code == "checkpoint"
    assert "another job" in error.value.message


# 16. Restart games ----------------------------------------------------------------------------------------------------


def test_a_restart_with_other_bundles_gets_nothing(stage: Stage) -> None:
    """All others and the operator want the difference that south's bundle makes."""
    killed_after(stage, STATES[0])
    stage.seal("south", b"nothing at all")
    core = stage.enclave(store="empty store")
    wire = Wire(core, "north")
    assert refusal(play(stage, core, special={"north": wire})) == "manifest-changed"
    assert "start" not in wire.methods()


def test_the_old_instance_is_left(stage: Stage) -> None:
    """Two instances at once: what the parties have released to the second ends the first."""
    first = stage.enclave()
    play(stage, first, states=STATES[:1])
    second = stage.enclave()
    play(stage, second, states=STATES[1:2])
    before = first.lineage.history.chain[-1][0].number
    wire = Wire(first, "north")
    with pytest.raises(VerificationError) as error:
        stage.take_part(first, "north", wire)
    assert error.value.code == "lease"
    assert wire.methods() == ["instance"]
    assert before == 1


def test_a_session_that_is_still_open_signs_nothing_more_for_the_old_instance(stage: Stage) -> None:
    first = stage.enclave()
    play(stage, first, states=STATES[:1])
    client, line = stage.client("north"), Wire(first, "north")
    instance = client.verify_instance(line)
    assert first.manifest is not None
    follower = client.follower(instance, first.manifest.sha256)
    assert follower.check().position.number == 1
    seal = first.lineage.add(STATES[1], 2)
    second = stage.enclave(store="store")
    play(stage, second)
    for act in (lambda: follower.sign(line, seal.to_bytes()), follower.check, lambda: follower.note(b"")):
        with pytest.raises(CloisterError) as error:
            act()
        assert error.value.code in ("lease", "protocol")
    with pytest.raises(VerificationError):
        follower.sign(line, seal.to_bytes())
    assert "checkpoint" not in line.methods()


def test_what_the_left_instance_still_writes_is_refused(stage: Stage) -> None:
    """Both instances wrote into the folder; the first one's newest is not where the parties are."""
    first = stage.enclave()
    play(stage, first, states=STATES[:1])
    second = stage.enclave()
    play(stage, second)
    first.lineage.add(b"of the left instance", 2)
    assert refusal(play(stage, stage.enclave())) == "lease"


def test_the_old_instances_keys_do_not_open_for_the_new_one(stage: Stage) -> None:
    """Recorded shares and consents name the instance that they are for."""
    killed_after(stage, STATES[0])
    second = stage.enclave()
    line = Wire(second, "north")
    play(stage, second, special={"north": line})
    body = dict(line.asked)["keys"]
    third = stage.enclave()
    collect(stage, third)
    with pytest.raises(VerificationError) as error:
        third.handle("north", "keys", body)
    assert error.value.code == "signature"


def asking_for_keys(stage: Stage) -> tuple[EnclaveCore, Callable[..., dict[str, Any]]]:
    """An instance after a restart, and north's honest answer to it, of which parts can be replaced."""
    core = stage.enclave()
    collect(stage, core)
    assert core.manifest is not None
    digest = core.manifest.sha256

    def answer(share: bytes, made_by: bytes, **changes: Any) -> dict[str, Any]:
        info = share_info(
            manifest_sha256=digest, instance_id=core.instance_id, made_by=made_by, party=changes.pop("named", "north")
        )
        sealed = wrap(core.hpke_key.public, share, info)
        return {**key_release(stage, core, **changes), "share_from": made_by, "share": sealed}

    return core, answer


def test_wrong_and_foreign_shares_are_put_down_to_their_holder(stage: Stage) -> None:
    first = killed_after(stage, STATES[0])
    shares = {name: state_of(stage, name, first).shares[first.instance_id.hex()] for name in stage.names}
    core, answer = asking_for_keys(stage)
    for share, made_by, code in (
        (altered(shares["north"], 5), first.instance_id, "share"),
        (shares["south"], first.instance_id, "share"),
        (b"", first.instance_id, "share"),
        (shares["north"], b"e" * 16, "share-epoch"),
    ):
        with pytest.raises(VerificationError) as error:
            core.handle("north", "keys", answer(share, made_by))
        assert (error.value.code, error.value.where) == (code, "north")
    with pytest.raises(VerificationError) as error:
        core.handle("north", "keys", answer(shares["north"], first.instance_id, named="south"))
    assert error.value.code == "unwrap"
    assert core.manifest_signatures() == {}
    core.handle("north", "keys", answer(shares["north"], first.instance_id))


def test_a_share_of_an_earlier_key(stage: Stage) -> None:
    first = killed_after(stage, STATES[0])
    old = state_of(stage, "north", first).shares[first.instance_id.hex()]
    play(stage, stage.enclave(), states=STATES[1:2])
    core, answer = asking_for_keys(stage)
    with pytest.raises(VerificationError) as error:
        core.handle("north", "keys", answer(old, first.instance_id))
    assert error.value.code == "share-epoch"


def test_too_few_shares_open_nothing(stage: Stage) -> None:
    first = killed_after(stage, STATES[0])
    state = state_of(stage, "south", first)
    core = stage.enclave()
    Memory(stage.client("south").memory_file, state.manifest_sha256).write(replace(state, shares={}))
    collect(stage, core)
    threads = [
        threading.Thread(target=lambda name=name: _ignore(lambda: stage.take_part(core, name)), daemon=True)
        for name in stage.names
    ]
    for thread in threads:
        thread.start()
    with pytest.raises(ProtocolError, match=r"south \(its share of the checkpoint's key, 1 of 2 are here\)"):
        core.wait_for_keys(2.0, lambda missing: None)
    with pytest.raises(VerificationError) as error:
        core.restore()
    assert error.value.code == "share"
    core.fail(ProtocolError("the end", where="enclave"))
    for thread in threads:
        thread.join(20.0)


def _ignore(act: Callable[[], object]) -> None:
    try:
        act()
    except CloisterError:
        return


def test_a_quorum_opens_it_when_one_party_has_lost_its_memory_of_shares(tmp_path: Path) -> None:
    stage = Stage(tmp_path, names=("north", "south", "west"), quorum=2)
    first = stage.enclave()
    play(stage, first, states=STATES[:1])
    state = state_of(stage, "west", first)
    Memory(stage.client("west").memory_file, state.manifest_sha256).write(replace(state, shares={}))
    ended = play(stage, stage.enclave(), finish=True)
    assert ended["restored"] == STATES[0]
    assert isinstance(ended["west"], Results), ended["west"]


def test_an_instance_that_shares_its_key_otherwise(stage: Stage) -> None:
    """Fewer shares would open it than the parties have agreed on."""
    core = stage.enclave(quorum=1)
    assert refusal(play(stage, core)) == "share"
    for name in stage.names:
        stage.client(name).memory_file.unlink()
    core = stage.enclave(store="second")

    def another(method: str, reply: dict[str, Any]) -> dict[str, Any]:
        return {**reply, "share": altered(reply["share"], 9)} if method == "share" else reply

    wire = Wire(core, "north", alter=another)
    assert refusal(play(stage, core, special={"north": wire})) == "share"
    assert "kept" not in wire.methods()


# A party's own memory -------------------------------------------------------------------------------------------------


def test_a_party_whose_memory_was_restored_notices(stage: Stage) -> None:
    """Its folder comes from a copy; the others have not forgotten what it signed."""
    first = killed_after(stage, STATES[0])
    old = stage.client("north").memory_file.read_bytes()
    put = copy_of(folder_of(stage))
    play(stage, stage.enclave(), states=STATES[1:])
    stage.client("north").memory_file.write_bytes(old)
    core = stage.enclave()
    wire = Wire(core, "north")
    ended = play(stage, core, special={"north": wire})
    assert refusal(ended) == "memory"
    assert "restored from a copy" in ended["north"].hint
    assert "keys" not in wire.methods()
    # The operator puts an equally old checkpoint back and hides what the folder knows: south's proof is left.
    put_back(folder_of(stage), put)
    south = {"accept": CheckpointFolder(folder_of(stage)).newest().seal.hash}  # type: ignore[union-attr]
    core = stage.enclave()
    wire = Wire(core, "north")
    ended = play(stage, core, special={"north": wire}, clients={"south": south})
    assert refusal(ended) == "memory"
    assert "kept" not in wire.methods()
    assert first.instance_id == state_of(stage, "north", first).instances[0].id


def test_a_counter_that_is_behind_within_one_instance(stage: Stage) -> None:
    core = killed_after(stage, STATES[0])
    old = stage.client("north").memory_file.read_bytes()
    core = stage.enclave()
    play(stage, core, states=STATES[1:2])
    middle = stage.client("north").memory_file.read_bytes()
    assert len(middle) > 0
    state = state_of(stage, "north", core)
    behind = replace(state, position=Position(number=1, hash=state.position.hash), certificate=b"")
    Memory(stage.client("north").memory_file, state.manifest_sha256).write(behind)
    assert refusal(play(stage, stage.enclave())) == "memory"
    assert len(old) > 0


def test_a_memory_that_is_gone(stage: Stage) -> None:
    killed_after(stage, STATES[0])
    stage.client("north").memory_file.unlink()
    assert refusal(play(stage, stage.enclave())) == "memory"
    for path in folder_of(stage).glob("*.certificate"):
        path.unlink()
    stage.client("south").memory_file.unlink()  # nobody remembers: still not taken on the operator's word
    assert refusal(play(stage, stage.enclave())) == "checkpoint"


# What parties sign ----------------------------------------------------------------------------------------------------


def test_a_party_signs_only_what_follows_by_the_hand_of_its_instance(stage: Stage) -> None:
    core = stage.enclave()
    play(stage, core, states=STATES[:1])
    client, line = stage.client("north"), Wire(core, "north")
    assert core.manifest is not None
    follower = client.follower(client.verify_instance(line), core.manifest.sha256)
    seal = core.lineage.add(STATES[1], 2)
    for changes in (
        {"number": 1},
        {"previous": bytes(32)},
        {"instance_id": b"i" * 16},
        {"job_id": "00" * 32},
        {"manifest_sha256": bytes(32)},
    ):
        forged = replace(seal, **changes).signed(b"", core.signing_key)  # type: ignore[arg-type]
        with pytest.raises(VerificationError) as error:
            follower.sign(line, forged.to_bytes())
        assert error.value.code == "checkpoint"
    with pytest.raises(VerificationError) as error:
        follower.sign(line, replace(seal, step=9).signed(b"", PartyKey.generate()).to_bytes())
    assert error.value.code == "checkpoint"
    assert "checkpoint" not in line.methods()
    assert follower.check().position.number == 1
    follower.sign(line, seal.to_bytes())
    assert follower.check().position == seal.position
    follower.sign(line, seal.to_bytes())  # again, after the answer was lost
    assert line.methods().count("checkpoint") == 2


def test_a_signature_of_another_party_or_checkpoint_does_not_count(stage: Stage) -> None:
    core = stage.enclave()
    play(stage, core, states=STATES[:1])
    seal = core.lineage.add(STATES[1], 2)
    message = checkpoint_message(seal)
    for name, label, said in (
        ("south", CHECKPOINT_LABEL, message),
        ("north", "manifest", message),
        ("north", CHECKPOINT_LABEL, checkpoint_message(core.lineage.history.chain[0][0])),
    ):
        with pytest.raises(VerificationError) as error:
            core.handle("north", "checkpoint", {"number": 2, "signature": stage.keys[name].sign(label, said)})
        assert error.value.code == "signature"
    with pytest.raises(ProtocolError, match="no checkpoint 7"):
        core.handle("north", "checkpoint", {"number": 7, "signature": bytes(64)})
    assert not core.lineage.is_committed()


def test_a_certificate_needs_a_quorum_of_the_jobs_parties(stage: Stage) -> None:
    core = killed_after(stage, STATES[0])
    certificate = next(CheckpointFolder(folder_of(stage)).certificates())
    assert core.manifest is not None
    ids = {"job_id": stage.job_id, "manifest_sha256": core.manifest.sha256}
    certificate.verify(stage.parties, quorum=2, **ids)  # type: ignore[arg-type]
    both = dict(certificate.signatures)
    for signatures in (
        {"north": both["north"]},
        {**both, "stranger": both["north"]},
        {**both, "south": both["north"]},
        {},
    ):
        with pytest.raises(VerificationError):
            Certificate(seal=certificate.seal, signatures=signatures).verify(stage.parties, quorum=2, **ids)  # type: ignore[arg-type]
    follower = stage.client("north").follower(
        stage.client("north").verify_instance(Wire(core, "north")), core.manifest.sha256
    )
    with pytest.raises(VerificationError):
        follower.note(Certificate(seal=certificate.seal, signatures={"north": both["north"]}).to_bytes())


def test_consent_to_another_place_or_by_another_party(stage: Stage) -> None:
    killed_after(stage, STATES[0])
    core, _ = asking_for_keys(stage)
    elsewhere = Position(number=2, hash=bytes(32))
    with pytest.raises(VerificationError) as error:
        core.handle("north", "keys", key_release(stage, core, position=elsewhere))
    assert error.value.code == "checkpoint"
    body = key_release(stage, core)
    body["start"] = key_release(stage, core, "south")["start"]
    with pytest.raises(VerificationError) as error:
        core.handle("north", "keys", body)
    assert error.value.code == "signature"
    start = Start.from_bytes(key_release(stage, core)["start"])
    for changed in (replace(start, authorised=True), replace(start, last=elsewhere)):
        with pytest.raises(VerificationError):
            core.handle("north", "keys", {**key_release(stage, core), "start": changed.to_bytes()})


# 17. The history in a receipt -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def restarted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stage, Receipt]:
    stage = Stage(tmp_path_factory.mktemp("restarted"))
    killed_after(stage, *STATES[:2])
    ended = play(stage, stage.enclave(), states=STATES[2:], finish=True)
    assert isinstance(ended["north"], Results)
    return stage, ended["north"].receipt


def _drop(name: str, at: int) -> Callable[[dict[str, Any]], object]:
    return lambda history: history[name].pop(at)


def _seal(change: Callable[[Seal], Seal], at: int = 1) -> Callable[[dict[str, Any]], object]:
    def apply(history: dict[str, Any]) -> None:
        link = history["chain"][at]
        link["seal"] = change(Seal.from_bytes(bytes.fromhex(link["seal"]))).to_bytes().hex()

    return apply


@pytest.mark.parametrize(
    "change",
    [
        _drop("chain", 0),
        _drop("chain", 1),
        _drop("earlier", 0),
        _drop("starts", 0),
        _drop("starts", 1),
        lambda history: history["starts"].reverse(),
        lambda history: history["chain"].reverse(),
        lambda history: history.update(quorum=1),
        lambda history: history["starts"][1].pop("north"),
        lambda history: history["starts"][1].update(north=history["starts"][0]["north"]),
        lambda history: history["chain"][0]["signatures"].update(stranger="00" * 64),
        lambda history: history["chain"][0]["signatures"].update(north="00" * 64),
        lambda history: history["earlier"].append(history["earlier"][0]),
        _seal(lambda seal: replace(seal, step=7)),
        lambda history: (
            _seal(lambda seal: replace(seal, step=7), 2)(history),
            history["chain"][2].update(signatures={}),
        ),
        _seal(lambda seal: replace(seal, content=bytes(32))),
        _seal(lambda seal: replace(seal, job_id="00" * 32)),
    ],
)
def test_a_history_that_is_not_one_chain(
    restarted: tuple[Stage, Receipt], change: Callable[[dict[str, Any]], object]
) -> None:
    """Even if the instance itself had signed it."""
    stage, receipt = restarted
    body = json.loads(receipt.body)
    change(body["history"])
    forged = replace(receipt, body=body_bytes(body))
    verdict = verify_receipt(forged.to_bytes(), policy=POLICY, adapter_sha256=None, allow_simulated=True)
    assert "checkpoints" in [check.name for check in verdict.checks if not check.passed]
    assert stage.names


def test_consent_to_another_place_in_the_chain(restarted: tuple[Stage, Receipt]) -> None:
    stage, receipt = restarted
    body = json.loads(receipt.body)
    sha256 = hashlib.sha256(bytes.fromhex(body["manifest"])).digest()
    start = Start.from_bytes(bytes.fromhex(body["history"]["starts"][1]["north"]))
    first = Seal.from_bytes(bytes.fromhex(body["history"]["chain"][0]["seal"])).position
    assert start.position.number == 2
    for place, expected in ((start.position, []), (first, ["checkpoints"])):
        consent = replace(start, position=place).signed(
            stage.keys["north"], job_id=stage.job_id, manifest_sha256=sha256, instance_id=receipt.instance.id
        )
        body["history"]["starts"][1]["north"] = consent.to_bytes().hex()
        forged = replace(receipt, body=body_bytes(body))
        verdict = verify_receipt(forged.to_bytes(), policy=POLICY, adapter_sha256=None, allow_simulated=True)
        assert [c.name for c in verdict.checks if not c.passed and c.name == "checkpoints"] == expected


def test_an_earlier_instance_of_another_program_under_a_policy_that_takes_any(
    restarted: tuple[Stage, Receipt],
) -> None:
    _, receipt = restarted
    body = json.loads(receipt.body)
    entry = body["history"]["earlier"][0]
    report_data = instance_report_data(
        job_id=body["job_id"],
        instance_id=bytes.fromhex(entry["id"]),
        signing_key=bytes.fromhex(entry["signing_key"]),
        hpke_key=bytes.fromhex(entry["hpke_key"]),
        nonce=lineage_nonce(hashlib.sha256(bytes.fromhex(body["manifest"])).digest()),
    )
    lax = AppraisalPolicy.insecure_simulated_only()
    for measurement, passes in ((b"m" * 32, True), (b"x" * 32, False)):
        entry["evidence"] = attester(measurement).collect(report_data).to_bytes().hex()
        forged = replace(receipt, body=body_bytes(body))
        verdict = verify_receipt(forged.to_bytes(), policy=lax, adapter_sha256=None, allow_simulated=True)
        assert next(check for check in verdict.checks if check.name == "earlier instances").passed == passes


def test_an_earlier_instance_that_ran_something_else_or_at_another_time(restarted: tuple[Stage, Receipt]) -> None:
    _, receipt = restarted
    for changes in (
        {"time": NOW + 10_000},
        {"hpke_key": "00" * 1216},
        {"evidence": attester(b"x" * 32).collect(bytes(64)).to_bytes().hex()},
        {"evidence": ""},
    ):
        body = json.loads(receipt.body)
        body["history"]["earlier"][0].update(changes)
        forged = replace(receipt, body=body_bytes(body))
        verdict = verify_receipt(forged.to_bytes(), policy=POLICY, adapter_sha256=None, allow_simulated=True)
        assert "earlier instances" in [check.name for check in verdict.checks if not check.passed]


def test_a_party_vouches_for_its_own_instances_only(restarted: tuple[Stage, Receipt]) -> None:
    stage, receipt = restarted
    client = stage.client("north")
    sha256 = hashlib.sha256(bytes.fromhex(json.loads(receipt.body)["manifest"])).digest()
    claims = claims_of(attester())
    instance = VerifiedInstance(
        id=receipt.instance.id, signing_key=receipt.instance.signing_key, hpke_key=b"", claims=claims
    )
    follower = client.follower(instance, sha256)
    follower.check_history(receipt)
    for change in (
        lambda history: history["earlier"][0].update(id="00" * 16),
        lambda history: history["earlier"][0].update(signing_key="00" * 32),
        lambda history: history["earlier"][0].update(time=NOW - 1000),
        lambda history: history["earlier"][0].update(time=NOW + 1000),
        lambda history: history["chain"].pop(),
    ):
        body = json.loads(receipt.body)
        change(body["history"])
        with pytest.raises(VerificationError) as error:
            follower.check_history(replace(receipt, body=body_bytes(body)))
        assert error.value.code == "receipt-history"


def test_records_of_shares_are_canonical() -> None:
    record = ShareRecord(job_id="00" * 32, manifest_sha256=bytes(32), instance_id=bytes(16), quorum=1, commitments={})
    signed = record.signed(PartyKey.generate())
    assert ShareRecord.from_bytes(signed.to_bytes()) == signed
    for broken in (b"", signed.to_bytes()[:-1], signed.to_bytes() + b"\x00"):
        with pytest.raises(ProtocolError):
            ShareRecord.from_bytes(broken)
