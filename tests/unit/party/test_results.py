"""What a party keeps: whole, on disk before it vouches for it, and taken up by a later start if nothing has changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cloister.adapters.files import CONFIG, WEIGHTS
from cloister.agreement.receipt import Receipt
from cloister.errors import CapacityError, ProtocolError, TransportError, VerificationError
from cloister.party.client import PartyClient, Results
from cloister.party.results import come_back, completed, keep_receipt, keep_results, kept_results
from cloister.progress import Silent
from cloister.report.outputs import Countersignature, EnclaveReport
from tests.unit.enclave.stage import PARTIES, Stage, Wire


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    (tmp_path / "stage").mkdir()
    return Stage(tmp_path / "stage")


@pytest.fixture
def results(stage: Stage) -> dict[str, Results]:
    ended = stage.perform(stage.enclave())
    return {name: r for name, r in ended.items() if isinstance(r, Results)}


def test_what_is_kept(results: dict[str, Results], tmp_path: Path) -> None:
    for name, kept in results.items():
        keep_results(tmp_path / name, kept)
        assert (tmp_path / name / "scores" / "cloister.jsonl").read_text() == f"scores of {name}"
        assert (tmp_path / name / "receipt.json").read_bytes() == kept.receipt.to_bytes()
        assert json.loads((tmp_path / name / "declared.json").read_text()) == kept.declared
    assert {path.name for path in (tmp_path / "north" / "adapter").iterdir()} == {CONFIG, WEIGHTS}
    assert not (tmp_path / "south" / "adapter").exists()


def test_scores_of_an_unknown_system_are_not_written(results: dict[str, Results], tmp_path: Path) -> None:
    """The name becomes a file's name."""
    for name in ("../../x", "local", "", "/tmp/x"):  # noqa: S108  # never written
        results["north"].scores[name] = "x"
        with pytest.raises(VerificationError) as error:
            keep_results(tmp_path / "out", results["north"])
        assert error.value.code == "scores"
        del results["north"].scores[name]
    assert not (tmp_path / "out" / "receipt.json").exists()


def test_results_are_on_disk_before_a_party_countersigns(stage: Stage, tmp_path: Path) -> None:
    """Otherwise the others, and the enclave with the only copy, could leave before it has them."""
    core, there = stage.enclave(), dict[str, bool]()
    wires = {name: Wire(core, name) for name in PARTIES}

    def take_part(name: str) -> Results:
        def alter(method: str, reply: dict[str, object]) -> dict[str, object]:
            if method == "countersign":
                there[name] = (tmp_path / name / "receipt.json").exists()
            return reply

        wires[name].alter = alter
        return stage.client(name).take_part(
            wires[name],
            stage.sealed[name],
            upload=lambda: stage.deliver(core, name),
            on_missing=lambda names: None,
            on_event=lambda event: None,
            keep=lambda results: keep_results(tmp_path / name, results),
        )

    stage.perform(core, **{name: lambda name=name: take_part(name) for name in PARTIES})
    assert there == dict.fromkeys(PARTIES, True)


def test_a_party_that_cannot_keep_its_results_does_not_vouch_for_them(stage: Stage) -> None:
    core = stage.enclave()
    wire = Wire(core, "north")

    def full(results: Results) -> None:
        raise CapacityError("no space")

    def take_part() -> Results:
        return stage.client("north").take_part(
            wire,
            stage.sealed["north"],
            upload=lambda: stage.deliver(core, "north"),
            on_missing=lambda names: None,
            on_event=lambda event: None,
            keep=full,
        )

    ended = stage.perform(core, north=take_part)
    assert isinstance(ended["north"], CapacityError)
    assert "result" in wire.methods()
    assert "countersign" not in wire.methods()


def client(stage: Stage, name: str = "north") -> PartyClient:
    return stage.client(name)


@pytest.mark.parametrize("name", PARTIES)
def test_a_later_start_takes_up_what_was_kept(
    stage: Stage, results: dict[str, Results], tmp_path: Path, name: str
) -> None:
    released = name == "north"
    assert kept_results(tmp_path, client(stage, name), released=released) is None
    keep_results(tmp_path, results[name])
    kept = kept_results(tmp_path, client(stage, name), released=released)
    assert kept is not None
    assert replace(kept, claims=results[name].claims) == results[name]
    assert kept.claims.measurement_label == results[name].claims.measurement_label
    assert kept.complete


def test_kept_results_know_whether_all_have_countersigned(
    stage: Stage, results: dict[str, Results], tmp_path: Path
) -> None:
    keep_results(tmp_path, results["north"])
    receipt = results["north"].receipt
    signed = {party: entry for party, entry in receipt.countersignatures.items() if party == "north"}
    for countersignatures in ({}, signed):
        keep_receipt(tmp_path, replace(receipt, countersignatures=countersignatures))
        kept = kept_results(tmp_path, client(stage), released=True)
        assert kept is not None
        assert not kept.complete


FILES = (
    "scores/cloister.jsonl",
    "declared.json",
    f"adapter/{CONFIG}",
    f"adapter/{WEIGHTS}",
    "kept.json",
    "receipt.json",
)


@pytest.mark.parametrize(
    "name",
    ["scores/cloister.jsonl", "declared.json", f"adapter/{CONFIG}", f"adapter/{WEIGHTS}", "kept.json", "receipt.json"],
)
def test_half_a_file_is_no_result(stage: Stage, results: dict[str, Results], tmp_path: Path, name: str) -> None:
    keep_results(tmp_path, results["north"])
    path = tmp_path / name
    content = path.read_bytes()
    for end in {0, 1, len(content) // 2, len(content) - 1}:
        path.write_bytes(content[:end])
        assert kept_results(tmp_path, client(stage), released=True) is None
    path.unlink()
    assert kept_results(tmp_path, client(stage), released=True) is None
    path.write_bytes(content)
    assert kept_results(tmp_path, client(stage), released=True) is not None


def test_results_of_another_job_or_manifest_are_not_taken_up(
    stage: Stage, results: dict[str, Results], tmp_path: Path
) -> None:
    keep_results(tmp_path, results["north"])
    assert kept_results(tmp_path, stage.client("north", job_id="0" * 64), released=True) is None
    memory = tmp_path / "other.manifest"
    memory.write_bytes(b"another")
    assert kept_results(tmp_path, stage.client("north", memory=memory), released=True) is None
    assert kept_results(tmp_path, stage.client("north", memory=tmp_path / "none"), released=True) is None


def test_results_without_the_adapter_that_belongs_to_them_are_not_taken_up(
    stage: Stage, results: dict[str, Results], tmp_path: Path
) -> None:
    keep_results(tmp_path, results["south"])
    assert kept_results(tmp_path, client(stage, "south"), released=True) is None


@pytest.mark.parametrize("whole", [True, False])
def test_an_enclave_that_is_gone_costs_only_results_that_are_damaged(
    monkeypatch: pytest.MonkeyPatch, stage: Stage, results: dict[str, Results], tmp_path: Path, whole: bool
) -> None:
    monkeypatch.setattr("cloister.party.taking_part.RECONNECT_S", 0.0)
    keep_results(tmp_path, results["north"])
    if not whole:
        (tmp_path / "adapter" / WEIGHTS).write_bytes(b"weigh")

    def attempt() -> Results:
        raise TransportError("nobody answers", hint="is it running?")

    if whole:
        found = come_back(attempt, tmp_path, client(stage), released=True, progress=Silent())
        assert found.adapter == results["north"].adapter
        return
    with pytest.raises(TransportError, match="nobody answers") as error:
        come_back(attempt, tmp_path, client(stage), released=True, progress=Silent())
    assert "damaged" in error.value.hint
    (tmp_path / "receipt.json").unlink()
    with pytest.raises(TransportError) as error:
        come_back(attempt, tmp_path, client(stage), released=True, progress=Silent())
    assert error.value.hint == "is it running?"


@pytest.fixture
def untold(results: dict[str, Results], tmp_path: Path) -> Path:
    """North has kept its results, but heard of nobody's countersignature."""
    keep_results(tmp_path / "north", results["north"])
    keep_receipt(tmp_path / "north", replace(results["north"].receipt, countersignatures={}))
    return tmp_path / "north"


def concluded(receipt: Receipt) -> EnclaveReport:
    """What an instance has noted that had all countersignatures."""
    signed = {
        party: Countersignature(time=at, signature=signature.hex())
        for party, (at, signature) in receipt.countersignatures.items()
    }
    return EnclaveReport.model_construct(receipt_body_sha256=receipt.body_sha256.hex(), countersignatures=signed)


def ask(stage: Stage, folder: Path, report: EnclaveReport | None) -> tuple[Results | None, list[str]]:
    core = stage.enclave("second")
    core.concluded = report
    wire = Wire(core, "north")
    return completed(wire, client(stage), folder, released=True), wire.methods()


def test_countersignatures_that_an_earlier_instance_had_are_taken(
    stage: Stage, results: dict[str, Results], untold: Path
) -> None:
    receipt = results["north"].receipt
    found, asked = ask(stage, untold, concluded(receipt))
    assert found is not None
    assert found.complete
    assert found.receipt == receipt
    assert asked == ["countersignatures"]
    assert (untold / "receipt.json").read_bytes() == receipt.to_bytes()
    again, asked = ask(stage, untold, None)
    assert again is not None
    assert again.complete
    assert asked == []


def test_without_them_the_party_goes_on_as_usual(stage: Stage, results: dict[str, Results], untold: Path) -> None:
    kept = (untold / "receipt.json").read_bytes()
    other = concluded(results["north"].receipt).model_copy(update={"receipt_body_sha256": "0" * 64})
    for report in (None, other):
        assert ask(stage, untold, report) == (None, ["countersignatures"])
    assert ask(stage, untold / "nothing", other) == (None, [])
    assert (untold / "receipt.json").read_bytes() == kept


def test_countersignatures_that_do_not_hold_are_refused(
    stage: Stage, results: dict[str, Results], untold: Path
) -> None:
    kept = (untold / "receipt.json").read_bytes()
    good = concluded(results["north"].receipt)
    south = good.countersignatures["south"]
    for signed in (
        {"north": good.countersignatures["north"]},
        {**good.countersignatures, "south": south.model_copy(update={"signature": "00" * 64})},
        {**good.countersignatures, "south": south.model_copy(update={"time": south.time + 1})},
        {**good.countersignatures, "west": south},
    ):
        with pytest.raises(VerificationError):
            ask(stage, untold, good.model_copy(update={"countersignatures": signed}))
    assert (untold / "receipt.json").read_bytes() == kept


@pytest.mark.parametrize("entry", [1, [], [1], ["1", b""], [1, "00"], [True, b"\0" * 64], [-1, b"\0" * 64], [1, 2, 3]])
def test_malformed_countersignatures_are_refused(stage: Stage, untold: Path, entry: object) -> None:
    wire = Wire(stage.enclave("second"), "north")
    wire.alter = lambda method, reply: {"countersignatures": {"north": entry}}
    with pytest.raises((ProtocolError, VerificationError)):
        completed(wire, client(stage), untold, released=True)
