"""A party's bundles: taken up when they are complete, whole and its own, made anew in every other case."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cloister.agreement.job import open_job
from cloister.attest.policy import AppraisalPolicy
from cloister.crypto.bundle import SealedReader, verify_bundle
from cloister.crypto.keys import PartyKey
from cloister.errors import DataError, ModelError
from cloister.jobfile import ResolvedJob, load_job
from cloister.party.bundles import SealedParty, seal_party
from cloister.progress import Event, Silent
from tests.integration.tiny_job import PARTIES, write_job, write_lines, write_model

KEYS = {name: PartyKey.generate() for name in PARTIES}
KINDS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def resolve(folder: Path, model: Path, **job: object) -> ResolvedJob:
    folder.mkdir(exist_ok=True)
    (folder / "policy.toml").write_text(
        '[policy]\naccept = ["simulated"]\ninsecure_simulated = true\nmeasurements = "any"\n'
    )
    assert AppraisalPolicy.load(folder / "policy.toml").any_measurement
    changes: dict[str, dict[str, object]] = {
        "model": {"path": str(model)},
        "enclave": {"policy": "policy.toml"},
        "job": job,
    }
    keys = {name: {"public_key": key.public.hex()} for name, key in KEYS.items()}
    path = write_job(folder, changes, keys=keys)
    return open_job(load_job(path), progress=Silent()).resolved


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, model: Path) -> ResolvedJob:
    return resolve(tmp_path_factory.mktemp("job"), model)


@dataclass
class Tasks:
    """Which tasks were reported."""

    names: set[str] = field(default_factory=set)

    def report(self, event: Event) -> None:
        self.names.add(event.task)


def seal(job: ResolvedJob, folder: Path, party: str = "north", key: PartyKey | None = None) -> tuple[SealedParty, bool]:
    """(bundles, whether the former layers had to run)"""
    tasks = Tasks()
    sealed = seal_party(job, party, key or KEYS[party], folder, device="cpu", progress=tasks)
    return sealed, "former layers" in tasks.names


@pytest.fixture(scope="module")
def finished(job: ResolvedJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    seal(job, folder)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of finished bundles, to be spoilt."""
    return shutil.copytree(finished, tmp_path / "bundles")


def test_what_lies_in_the_folder(finished: Path) -> None:
    expected = {f"{kind}.{end}" for kind in KINDS for end in ("bundle", "key")} | {"counts.json"}
    assert {path.name for path in finished.iterdir()} == expected
    for kind in KINDS:
        assert stat.S_IMODE((finished / f"{kind}.key").stat().st_mode) == 0o600
        content = (finished / f"{kind}.bundle").read_bytes()
        assert b"north" in content[:400]  # the header is readable
        assert b"north-" not in content  # ids are not
        assert (finished / f"{kind}.key").read_bytes() not in content


def test_finished_bundles_are_taken_up(job: ResolvedJob, folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    sealed, made = seal(job, folder)
    assert not made
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sealed.records == {"train": 36, "validation": 4, "test": 6}
    assert set(sealed.bundles) == set(sealed.data_keys) == set(KINDS)


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 0x01
    path.write_bytes(data)


def edit_counts(change: Callable[[dict[str, object]], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        counts = json.loads((folder / "counts.json").read_text())
        change(counts)
        (folder / "counts.json").write_text(json.dumps(counts))

    return spoil


SPOILT: dict[str, Callable[[Path], object]] = {
    **{f"byte at {at}": (lambda f, at=at: flip(f / "train.bundle", at)) for at in (0, 0.001, 0.1, 0.5, 0.99, 1)},
    "byte of the test bundle": lambda f: flip(f / "test.bundle", 0.7),
    "truncated": lambda f: (f / "train.bundle").write_bytes((f / "train.bundle").read_bytes()[:-1]),
    "empty": lambda f: (f / "train.bundle").write_bytes(b""),
    "surplus": lambda f: (f / "train.bundle").write_bytes((f / "train.bundle").read_bytes() + b"\x00"),
    "missing": lambda f: (f / "validation.bundle").unlink(),
    "missing key": lambda f: (f / "test.key").unlink(),
    "key of another bundle": lambda f: shutil.copy(f / "train.key", f / "test.key"),
    "short key": lambda f: (f / "test.key").write_bytes(bytes(31)),
    "long key": lambda f: (f / "test.key").write_bytes(bytes(33)),
    "byte of a key": lambda f: flip(f / "train.key", 0.5),
    "no counts": lambda f: (f / "counts.json").unlink(),
    "counts cut": lambda f: (f / "counts.json").write_text('{"records"'),
    "counts of a list": lambda f: (f / "counts.json").write_text("[]"),
    "counts without a kind": edit_counts(lambda c: c["records"].pop("validation")),  # type: ignore[attr-defined]
    "counts without kinds": edit_counts(lambda c: c["records"].clear()),  # type: ignore[attr-defined]
    "counts without truncated": edit_counts(lambda c: c.pop("truncated")),
    "counts that are none": edit_counts(lambda c: c["records"].update(train="many")),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_anything_else_is_made_anew(job: ResolvedJob, folder: Path, spoil: Callable[[Path], object]) -> None:
    old = seal(job, folder)[0]
    spoil(folder)
    sealed, made = seal(job, folder)
    assert made
    for kind, bundle in sealed.bundles.items():
        assert bundle.commitment != old.bundles[kind].commitment
        assert sealed.data_keys[kind].reveal() != old.data_keys[kind].reveal()  # a key never serves two contents
        with SealedReader(bundle, sealed.data_keys[kind]) as reader:
            assert reader.read(0, 2) in (b"[]", b"[{")
    assert not list(folder.glob("*.part"))
    assert not seal(job, folder)[1]


def test_bundles_that_were_agreed_on_are_never_replaced(job: ResolvedJob, folder: Path) -> None:
    """No enclave could take others; perhaps the file can be had back."""
    call: dict[str, Any] = {"device": "cpu", "progress": Tasks(), "signed": True}
    assert seal_party(job, "north", KEYS["north"], folder, **call).records["train"] == 36
    (folder / "counts.json").write_bytes(b"{")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(DataError, match="sent or agreed to train on") as error:
        seal_party(job, "north", KEYS["north"], folder, **call)
    assert "restore" in error.value.hint
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_bundles_of_another_job_are_made_anew(job: ResolvedJob, folder: Path, model: Path, tmp_path: Path) -> None:
    other = resolve(tmp_path / "other", model, seed=2)
    assert other.job_id != job.job_id
    sealed, made = seal(other, folder)
    assert made
    assert all(bundle.header.job_id == other.job_id for bundle in sealed.bundles.values())


def test_bundles_of_another_party_or_key_are_made_anew(job: ResolvedJob, folder: Path) -> None:
    sealed, made = seal(job, folder, "south")
    assert made
    assert all(bundle.header.party == "south" for bundle in sealed.bundles.values())
    sealed, made = seal(job, folder, "south", PartyKey.generate())
    assert made


def test_a_writing_that_was_cut_leaves_no_bundle(job: ResolvedJob, model: Path, tmp_path: Path) -> None:
    """A model that gives infinities: nothing is sealed, and nothing usable is left."""
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][50:, 0] = torch.inf
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    other = resolve(tmp_path / "job", broken)
    with pytest.raises(ModelError, match="not finite") as error:
        seal(other, tmp_path / "bundles")
    assert error.value.hint
    assert not list((tmp_path / "bundles").glob("*.bundle*"))
    assert not (tmp_path / "bundles" / "counts.json").exists()


def test_malformed_data_leave_nothing_behind(model: Path, tmp_path: Path) -> None:
    job = resolve(tmp_path / "job", model)
    path = write_lines(
        tmp_path / "job" / "data" / "north-train.jsonl", [{"prompt": "a", "response": "b"}, {"prompt": "c"}]
    )
    with pytest.raises(DataError) as error:
        seal(job, tmp_path / "bundles")
    assert error.value.where == f"{path}:2: response"
    assert list((tmp_path / "bundles").iterdir()) == []


def test_one_record_cannot_be_divided(model: Path, tmp_path: Path) -> None:
    """The enclave would wait for a validation bundle that never comes."""
    job = resolve(tmp_path / "job", model)
    path = write_lines(tmp_path / "job" / "data" / "north-train.jsonl", [{"prompt": "a", "response": "b"}])
    with pytest.raises(DataError, match="validation") as error:
        seal(job, tmp_path / "bundles")
    assert error.value.where == str(path)


def test_a_bundle_verifies_for_its_owner_only(job: ResolvedJob, finished: Path) -> None:
    """Guards the tests above: the finished bundles hold."""
    for kind in KINDS:
        verify_bundle(finished / f"{kind}.bundle", job_id=job.job_id, party="north", public_key=KEYS["north"].public)
