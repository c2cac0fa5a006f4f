"""The enclave's work on real payloads: what a malicious party may put into a bundle, and what everybody learns."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from cloister.agreement import APPROVAL_LABEL
from cloister.crypto.bundle import BundleHeader, BundleWriter, read_header
from cloister.crypto.keys import DataKey
from cloister.data.packing import Pack
from cloister.data.payload import write_payload
from cloister.data.tokens import RESPONSE, Example
from cloister.enclave.core import EnclaveCore
from cloister.enclave.results import Outcome
from cloister.enclave.work import train_and_score
from cloister.errors import CloisterError, ProtocolError, RunError, VerificationError
from cloister.evaluation.scores import Scores
from cloister.job import Job
from cloister.jobfile import ModelFiles, ResolvedJob
from cloister.model.cut import Latter
from cloister.progress import Silent
from tests.unit.data.tiny_packs import random_pack
from tests.unit.enclave.stage import PARTIES, Stage
from tests.unit.model.tiny import VOCABULARY, tiny_model

HIDDEN, MAX_TOKENS, CUT = 32, 32, 2
Content = Callable[[Callable[[bytes], object]], object]
"""Writes a payload through the function given."""


def job(stage: Stage) -> Job:
    return Job.model_validate(
        {
            "job": {"name": "tiny"},
            "model": {"path": "tiny", "cut": CUT},
            "data": {"validation": 0.0},
            "adapter": {"rank": 2},
            "training": {"steps": 2, "batch_tokens": 16, "max_tokens": MAX_TOKENS},
            "party": [{"name": n, "public_key": key.public.hex()} for n, key in stage.keys.items()],
            "transport": {"activation_dtype": "float32"},
            "evaluation": {"max_examples": 5},
            "checkpoint": {"count": 0},
        }
    )


def packs(seed: int, count: int = 2, *, hidden: int = HIDDEN) -> list[Pack]:
    return [
        random_pack([9, 8], VOCABULARY, seed=10 * seed + i, hidden=hidden, first_example=2 * i) for i in range(count)
    ]


def examples(party: str, count: int) -> list[Example]:
    return [
        Example(id=f"{party}-{i}", task="answer", response_bytes=5, response_role=RESPONSE, choice_bytes=())
        for i in range(count)
    ]


def honest(party: str, kind: str) -> Content:
    seed = 2 * PARTIES.index(party) + ("train", "test").index(kind)
    table = examples(party, 4) if kind == "test" else []
    return lambda write: write_payload(write, packs(seed), table, "float32")


@dataclasses.dataclass
class Played:
    core: EnclaveCore
    outcome: Outcome | None
    error: CloisterError | None


def prepare(
    tmp_path: Path, *, schema: dict[str, Any] | None = None, wrong_key: bool = False, **malicious: Content
) -> tuple[Stage, EnclaveCore]:
    """A job and its enclave up to the moment when it has all bundles and keys; see `play`."""
    tmp_path.mkdir(exist_ok=True)
    stage = Stage(tmp_path)
    core = stage.enclave()
    declared = {"activation_dtype": "float32", "hidden": HIDDEN}
    keys: dict[str, dict[str, DataKey]] = {name: {} for name in PARTIES}
    for name in PARTIES:
        core.handle(name, "approve", {"signature": stage.keys[name].sign(APPROVAL_LABEL, bytes.fromhex(stage.job_id))})
        for kind in core.kinds:
            header = BundleHeader(
                job_id=stage.job_id,
                party=name,
                kind=kind,  # type: ignore[arg-type]  # one of KINDS
                schema=(schema or declared) if name == "south" else declared,
                counts={},
                chunk_bytes=64,
                max_payload_bytes=1 << 20,
            )
            path = tmp_path / "bundle"
            with BundleWriter(path, header, stage.keys[name]) as writer:
                (malicious.get(kind, honest(name, kind)) if name == "south" else honest(name, kind))(writer.write)
            keys[name][kind] = writer.data_key
            incoming, head = core.store.expected(name, kind), read_header(path)  # type: ignore[attr-defined]
            incoming._max_payload_bytes = 1 << 20
            incoming.feed(incoming.begin(head.encoded, head.signature), path.read_bytes()[len(head.prefix) :])
    if wrong_key:
        keys["south"]["train"] = DataKey.generate()
    core.handle("north", "manifest", {"wait_ms": 0})
    for name in PARTIES:
        stage.release(core, name, data_keys=keys[name])
    core.wait_for_keys(0.0, lambda missing: None)
    return stage, core


def resolve(stage: Stage, declared: Job) -> ResolvedJob:
    return ResolvedJob(
        job=declared,
        loaded=None,  # type: ignore[arg-type]  # not looked at
        cut=CUT,
        model=ModelFiles(folder=Path("tiny"), files=()),
        canonical=stage.canonical,
        job_id=stage.job_id,
    )


def play(
    tmp_path: Path,
    *,
    schema: dict[str, Any] | None = None,
    wrong_key: bool = False,
    model: str = "llama",
    **malicious: Content,
) -> Played:
    """Collect bundles, train and score; `malicious` gives what "south" puts into its bundle of a kind."""
    stage, core = prepare(tmp_path, schema=schema, wrong_key=wrong_key, **malicious)
    resolved = resolve(stage, job(stage))
    latter = Latter(tiny_model(model), CUT)
    try:
        _, outcome = train_and_score(
            core,
            core.intake,
            resolved,
            latter,  # type: ignore[attr-defined]
            cache_bytes=1 << 20,
            progress=Silent(),
        )
    except CloisterError as error:
        core.fail(error)
        return Played(core, None, error)
    core.finish(outcome)
    return Played(core, outcome, None)


def test_scores_go_to_their_owner_and_aggregates_to_all(tmp_path: Path) -> None:
    played = play(tmp_path)
    assert played.outcome is not None
    for name in PARTIES:
        own = played.core.handle(name, "result", {})
        scores = {system: Scores.from_json_lines(lines) for system, lines in own["scores"].items()}
        assert set(scores) == {"base", "cloister"}
        assert all(s.example_id == [f"{name}-{i}" for i in range(4)] for s in scores.values())
        declared = json.loads(own["declared"])
        rows = [r for r in declared["results"] if (r["system"], r["party"], r["task"]) == ("cloister", name, "all")]
        assert rows[0]["bits_per_byte"] == pytest.approx(scores["cloister"].bits_per_byte())
        assert f"{name}-0" not in json.dumps(declared)
    receipt = played.outcome.receipt
    assert json.loads(receipt.body)["metrics"] == json.loads(played.outcome.declared)["results"]
    assert hashlib.sha256(receipt.body).digest() == receipt.body_sha256


def with_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Content:
    """A payload whose first pack has another tensor in place of an honest one, or lacks it; the index is right."""

    def write(out: Callable[[bytes], object]) -> None:
        written: list[bytes] = []
        write_payload(written.append, packs(5), examples("south", 4), "float32")
        table, first, second, index, _ = written
        tensors = safetensors.torch.load(first)
        value = change(tensors.pop(name))
        if value is not None:
            tensors[name] = value
        first = bytes(safetensors.torch.save(tensors))
        entries = safetensors.torch.load(index)
        entries["end"][1:] += len(table) + len(first) - int(entries["end"][1])
        index = bytes(safetensors.torch.save(entries))
        for part in (table, first, second, index, len(index).to_bytes(8, "little")):
            out(part)

    return write


def first_is(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def written(change: Callable[[list[bytes]], list[bytes]]) -> Content:
    """An honest payload's parts (table, packs, index, length), changed."""

    def write(out: Callable[[bytes], object]) -> None:
        parts: list[bytes] = []
        write_payload(parts.append, packs(5), examples("south", 4), "float32")
        for part in change(parts):
            out(part)

    return write


def table_of(rows: object) -> Content:
    """A payload with another table of examples, and an index that fits it."""

    def change(parts: list[bytes]) -> list[bytes]:
        table, first, second, index, _ = parts
        new = json.dumps(rows).encode()
        entries = safetensors.torch.load(index)
        entries["end"] += len(new) - len(table)
        index = bytes(safetensors.torch.save(entries))
        return [new, first, second, index, len(index).to_bytes(8, "little")]

    return written(change)


ROWS = [dataclasses.asdict(e) for e in examples("south", 4)]
FORGED: dict[str, Content] = {
    "nan": with_tensor("activation", first_is(float("nan"))),
    "infinity": with_tensor("activation", first_is(float("-inf"))),
    "too wide": with_tensor("activation", lambda t: torch.cat([t, t], dim=1)),
    "one dimension": with_tensor("activation", lambda t: t.flatten()),
    "more tokens than declared": with_tensor("activation", lambda t: torch.cat([t, t])),
    "another dtype": with_tensor("activation", lambda t: t.to(torch.float16)),
    "no activations": with_tensor("activation", lambda t: None),
    "target outside": with_tensor("target_pos_N", first_is(17)),
    "target before": with_tensor("target_pos_N", first_is(-1)),
    "token outside the vocabulary": with_tensor("target_id_N", first_is(VOCABULARY)),
    "group outside": with_tensor("target_group_N", first_is(99)),
    "position outside": with_tensor("position_T", first_is(MAX_TOKENS)),
    "document outside": with_tensor("document_T", first_is(17)),
    "integers as floats": with_tensor("position_T", lambda t: t.float()),
    "no index": written(lambda parts: parts[:-2]),
    "nothing": lambda write: None,
    "zeros": lambda write: write(bytes(5000)),
    "an index that is too long": written(lambda parts: [*parts[:-1], b"\xff" * 8]),
    "a pack less": written(lambda parts: [*parts[:2], *parts[3:]]),
    "a pack more": written(lambda parts: [*parts[:3], parts[2], *parts[3:]]),
}
FORGED_TABLES: dict[str, Content] = {
    "foreign examples": with_tensor("group_example_G", first_is(7)),
    "an example scored twice": with_tensor("group_example_G", first_is(1)),
    "a choice that is none": with_tensor("group_role_G", first_is(3)),
    "fewer examples": table_of(ROWS[:3]),
    "more examples": table_of([*ROWS, {**ROWS[0], "id": "more"}]),
    "no list": table_of({"rows": ROWS}),
    "null": table_of(None),
    "an unknown field": table_of([{**ROWS[0], "party": "north"}, *ROWS[1:]]),
    "no bytes": table_of([{**ROWS[0], "response_bytes": 0}, *ROWS[1:]]),
    "bytes that are text": table_of([{**ROWS[0], "response_bytes": "5"}, *ROWS[1:]]),
    "a name of a megabyte": table_of([{**ROWS[0], "id": "x" * (1 << 17)}, *ROWS[1:]]),
}


def told(played: Played) -> None:
    """There is no result, and every party is told the same."""
    assert played.outcome is None
    for name in PARTIES:
        for method, body in (("watch", {"after": 0, "committed": 0, "wait_ms": 0}), ("result", {})):
            with pytest.raises(CloisterError) as error:
                played.core.handle(name, method, body)
            assert error.value is played.error
    assert played.core.phase == "failed"


@pytest.mark.parametrize("kind", ["train", "test"])
@pytest.mark.parametrize("content", FORGED.values(), ids=FORGED)
def test_a_malformed_payload_ends_the_job_and_names_party_and_bundle(
    tmp_path: Path, kind: str, content: Content
) -> None:
    played = play(tmp_path, **{kind: content})  # type: ignore[arg-type]  # kind is none of the other names
    assert isinstance(played.error, ProtocolError)
    assert played.error.where.startswith(f"{kind} bundle of south")
    told(played)


@pytest.mark.parametrize("content", FORGED_TABLES.values(), ids=FORGED_TABLES)
def test_a_table_that_does_not_fit_the_packs(tmp_path: Path, content: Content) -> None:
    played = play(tmp_path, test=content)
    assert isinstance(played.error, ProtocolError)
    assert played.error.where.startswith("test bundle of south")
    told(played)


def test_more_test_examples_than_the_job_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is trained, since bundles are fixed by then."""
    monkeypatch.setattr("cloister.enclave.work.run_training", lambda *args, **more: pytest.fail("trained"))
    played = play(tmp_path, test=lambda write: write_payload(write, packs(9, count=3), examples("south", 6), "float32"))
    assert isinstance(played.error, ProtocolError)
    assert "there are 6 examples, the job takes 5" in str(played.error)
    assert "test bundle of south" in str(played.error)


def test_a_header_that_declares_something_else(tmp_path: Path) -> None:
    played = play(tmp_path, schema={"activation_dtype": "int8", "hidden": HIDDEN})
    assert isinstance(played.error, ProtocolError)
    assert played.error.where == "train bundle of south"
    assert "int8" in played.error.message
    told(played)


def test_a_data_key_of_another_bundle(tmp_path: Path) -> None:
    played = play(tmp_path, wrong_key=True)
    assert isinstance(played.error, VerificationError)
    assert (played.error.code, played.error.where) == ("tag", "train bundle of south")
    told(played)


def test_huge_activations_end_the_job_in_words(tmp_path: Path) -> None:
    """They are finite, but a layer norm's variance of them is not."""
    huge = with_tensor("activation", lambda t: t.sign() * 3e38)
    trained = play(tmp_path / "a", model="gpt2", train=huge)
    assert isinstance(trained.error, RunError)
    assert "training step" in trained.error.where
    assert trained.error.where.endswith(", train bundle of south")
    told(trained)
    scored = play(tmp_path / "b", model="gpt2", test=huge)
    assert isinstance(scored.error, ProtocolError)
    assert scored.error.where == "test bundle of south"
    told(scored)
