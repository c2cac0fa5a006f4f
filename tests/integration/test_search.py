"""Guards the searches of other tests: what they look for is found in any form, wherever a program may leave it."""

from __future__ import annotations

import base64
import struct
import tempfile
import time
from pathlib import Path

import pytest

from cloister.crypto.keys import PartyKey
from cloister.data.prepare import prepare
from cloister.jobfile import load_job
from tests.integration.search import (
    SHARED,
    canary,
    core_dumps,
    files_under,
    holding,
    left_elsewhere,
    misplaced,
    planted,
    secrets_of,
    text_forms,
)
from tests.integration.tiny_job import records, write_job, write_lines
from tests.unit.data.tiny_tokenizers import tiny_tokenizer

TEXT = canary("train")


@pytest.mark.parametrize("place", [place for place in SHARED if place.is_dir()], ids=str)
def test_what_lies_deep_in_a_shared_folder_is_found(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    since = time.time()
    monkeypatch.setattr("tests.integration.search.SHARED", [place])
    with tempfile.TemporaryDirectory(dir=place) as name:
        deep = Path(name, "a", "b", "file")
        deep.parent.mkdir(parents=True)
        deep.write_bytes(bytes(1 << 20) + TEXT.encode())
        assert holding(left_elsewhere(since, besides=Path()), TEXT.encode()) == [deep]


def test_what_is_older_or_the_tests_own_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.integration.search.SHARED", [tmp_path])
    path = tmp_path / "own" / "a" / "file"
    path.parent.mkdir(parents=True)
    path.touch()
    assert left_elsewhere(time.time() - 60, besides=tmp_path / "other") == [path]
    assert left_elsewhere(time.time() - 60, besides=tmp_path / "own") == []
    assert left_elsewhere(time.time() + 60, besides=tmp_path / "other") == []


@pytest.mark.parametrize("shift", range(3))
def test_text_in_base64(tmp_path: Path, shift: int) -> None:
    (tmp_path / "log").write_bytes(base64.b64encode(b"." * shift + f"{TEXT} prompt".encode()))
    assert holding(files_under(tmp_path), *text_forms(TEXT)) == [tmp_path / "log"]


@pytest.mark.parametrize("kind", "hiq")
def test_tokens_as_training_has_them(tmp_path: Path, kind: str) -> None:
    write_lines(tmp_path / "data" / "north-train.jsonl", planted(records("north", "train", 40), TEXT))
    job = load_job(write_job(tmp_path, {"data": {"validation": 0.0}})).job
    files = [tmp_path / "data" / f"north-{part}.jsonl" for part in ("train", "test")]
    packs = prepare(job, tiny_tokenizer("bos"), *files).parts["train"].packs
    ids = [token for pack in packs for token in pack.given.reshape(-1).tolist()]
    (tmp_path / "dump").write_bytes(struct.pack(f"<{len(ids)}{kind}", *ids))
    assert holding([tmp_path / "dump"], *text_forms(TEXT)) == [tmp_path / "dump"]
    (tmp_path / "dump").write_text(str(ids))
    assert holding([tmp_path / "dump"], *text_forms(TEXT)) == [tmp_path / "dump"]


def test_what_lies_across_two_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.integration.search._PIECE", 8)
    (tmp_path / "file").write_text(f"some {TEXT}")
    assert holding(files_under(tmp_path), TEXT.encode()) == [tmp_path / "file"]


def test_secrets_that_are_not_in_their_own_file(tmp_path: Path) -> None:
    own, copy = tmp_path / "party.key", tmp_path / "copy.pem"
    PartyKey.generate().save(own)
    (tmp_path / "commitment.salt").write_bytes(bytes(range(32)))
    owned = secrets_of(tmp_path, own)
    assert misplaced(list(files_under(tmp_path)), owned) == []
    copy.write_bytes(own.read_bytes())
    (tmp_path / "log").write_text(bytes(range(32)).hex())
    assert sorted(misplaced(list(files_under(tmp_path)), owned)) == [copy, tmp_path / "log"]


def test_core_dumps_are_known_by_their_content(tmp_path: Path) -> None:
    (tmp_path / "any").write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x04\x00" + bytes(40))
    (tmp_path / "program").write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00" + bytes(40))
    (tmp_path / "core").touch()
    assert core_dumps(files_under(tmp_path)) == [tmp_path / "any"]
