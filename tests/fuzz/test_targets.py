"""Every fuzzing target works: its seeds reach what they are seeds of, and a short unguided run finds nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from cloister.attest.vendor_files import READERS
from cloister.attest.verify import DEVICE_VERIFIERS, VERIFIERS
from tests.evidence import EVIDENCE, needs_evidence, sample
from tests.fuzz.__main__ import Findings
from tests.fuzz.frames import pack, unpack
from tests.fuzz.mutate import inputs
from tests.fuzz.targets import TARGETS, Target


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_accepted(name: str) -> None:
    target, seeds = TARGETS[name], TARGETS[name].seeds()
    accepted = [target.try_once(seed) for seed in seeds]
    assert all(len(seed) <= target.max_bytes for seed in seeds)
    if EVIDENCE.is_dir() or name not in {*VERIFIERS, *DEVICE_VERIFIERS}:
        assert any(accepted) == target.accepts


@pytest.mark.parametrize("name", TARGETS)
def test_only_refusals_leave(name: str) -> None:
    target = TARGETS[name]

    @settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(inputs(target.seeds(), target.max_bytes))
    def run(data: bytes) -> None:
        target.try_once(data)

    run()


def test_other_errors_are_findings() -> None:
    """What the two tests above rest on."""
    target = TARGETS["cbor"]
    with pytest.raises(AttributeError):
        type(target)(run=lambda data: data.no_such_thing, seeds=target.seeds).try_once(b"")  # type: ignore[attr-defined]  # on purpose


def test_every_reader_and_verifier_is_a_target() -> None:
    assert {*READERS, *VERIFIERS, *DEVICE_VERIFIERS} <= set(TARGETS)


def test_frames() -> None:
    assert unpack(pack(b"a", b"", b"rest"), 3) == [b"a", b"", b"rest"]
    assert unpack(b"\xff\xff\xff\xffabc", 2) == [b"abc", b""]
    assert unpack(b"", 3) == [b"", b"", b""]


@needs_evidence
def test_a_document_of_the_year_10868() -> None:
    """Found by fuzzing: its time is a number that no calendar has."""
    genuine = sample("nitro/nitro_prod_2025.cbor")
    at = genuine.index(b"itimestamp") + len(b"itimestamp")
    assert genuine[at] == 0x1B
    later = genuine[: at + 1] + (280_812_200_000_000).to_bytes(8, "big") + genuine[at + 9 :]
    assert TARGETS["nitro"].try_once(pack(genuine, b"", b""))
    assert not TARGETS["nitro"].try_once(pack(later, b"", b""))


def test_a_finding_is_kept_once_and_the_run_goes_on(tmp_path: Path) -> None:
    def broken(data: bytes) -> None:
        if len(data) < 3:
            raise KeyError(data)
        raise IndexError(data)

    target = Target(run=broken, seeds=list)
    run = Findings(target.try_once, tmp_path)
    for data in (b"a", b"bb", b"ccc", b"dddd"):
        run(data)
    assert run.executions == 4
    assert sorted(path.read_bytes() for path in tmp_path.glob("*.bin")) == [b"a", b"ccc"]
    assert len(list(tmp_path.glob("*.txt"))) == 2
