"""A store of pads kept by a TPM: it opens for this program, on this machine, after this boot, once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cloister.cli import main
from cloister.crypto.keys import PartyKey
from cloister.errors import TransportError, VerificationError
from cloister.masking.counters import TpmCounter, counter_name
from cloister.masking.store import open_store
from cloister.masking.store_keys import TpmStoreKey
from cloister.report.plan import PadsReport
from tests.integration.tiny_job import records, write_lines, write_model
from tests.tpm.conftest import Swtpm
from tests.unit.masking.small import GROUPS, JOB_ID, WEIGHTS_ID, Chip, make_store, used_store

pytestmark = pytest.mark.tpm

NAME = counter_name(JOB_ID, "north")
POLICY = f"""
[policy]
accept = ["tpm"]
[[measurement]]
label = "this boot"
type = "tpm"
registers = {{ pcr7 = "{bytes(32).hex()}" }}
[tpm]
attestation_keys = ["{"00" * 34}"]
"""


def kept_by(swtpm: Swtpm) -> dict[str, object]:
    return {"key": TpmStoreKey(swtpm.address, [7, 14]), "counter": TpmCounter(swtpm.address, name=NAME)}


def draw(folder: Path, swtpm: Swtpm, rows: int = 5) -> set[tuple[int, ...]]:
    with used_store(folder, Chip(), **kept_by(swtpm)) as pads:
        pad, reply = pads.draw("q+k", "forward", rows)
        reply()
    return {tuple(row.tolist()) for row in pad}


def test_a_counter_only_grows_whatever_becomes_of_it(swtpm: Swtpm) -> None:
    counter = TpmCounter(swtpm.address, name=NAME)
    with pytest.raises(VerificationError, match="gone") as refused:
        counter.read()
    assert refused.value.code == "pad-rollback"
    first = counter.start()
    assert counter.start() == counter.read() == first
    assert counter.increment() == first + 1
    swtpm.restart()
    assert counter.read() == first + 1
    with swtpm.open() as tpm:
        tpm.nv_undefine(counter._index)
    with pytest.raises(VerificationError, match="gone"):
        counter.read()
    assert counter.start() > first + 1


def test_starts_on_one_machine_share_a_store(tmp_path: Path, swtpm: Swtpm) -> None:
    make_store(tmp_path / "s", Chip(), **kept_by(swtpm))
    first = draw(tmp_path / "s", swtpm)
    swtpm.restart()
    second = draw(tmp_path / "s", swtpm)
    assert len(first | second) == 10


def test_an_older_copy_is_refused(tmp_path: Path, swtpm: Swtpm) -> None:
    make_store(tmp_path / "s", Chip(), **kept_by(swtpm))
    shutil.copytree(tmp_path / "s", tmp_path / "copy")
    draw(tmp_path / "s", swtpm)
    for folder in ("copy", "s", "copy"):
        if folder == "s":
            draw(tmp_path / folder, swtpm)
            continue
        with pytest.raises(VerificationError, match="older than their counter"):
            draw(tmp_path / folder, swtpm)


def test_a_removed_counter_does_not_bring_pads_back(tmp_path: Path, swtpm: Swtpm) -> None:
    make_store(tmp_path / "s", Chip(), **kept_by(swtpm))
    shutil.copytree(tmp_path / "s", tmp_path / "copy")
    draw(tmp_path / "s", swtpm)
    counter = TpmCounter(swtpm.address, name=NAME)
    with swtpm.open() as tpm:
        tpm.nv_undefine(counter._index)
    with pytest.raises(VerificationError, match="gone"):
        draw(tmp_path / "copy", swtpm)
    counter.start()
    with pytest.raises(VerificationError, match="older than their counter"):
        draw(tmp_path / "copy", swtpm)


CHILD = """
import sys
from pathlib import Path
from cloister.errors import VerificationError
from cloister.masking.counters import TpmCounter
from cloister.masking.store import open_store
from cloister.masking.store_keys import TpmStoreKey
from tests.unit.masking.small import GROUPS, JOB_ID, WEIGHTS_ID
from tests.tpm.test_pads import NAME
folder, address = sys.argv[1:]
key, counter = TpmStoreKey(address, [7, 14]), TpmCounter(address, name=NAME)
try:
    with open_store(Path(folder), job_id=JOB_ID, party="north", key=key, counter=counter) as pads:
        print("looked", flush=True)
        sys.stdin.readline()
        pads.begin(WEIGHTS_ID, GROUPS, 1)
        pad, reply = pads.draw("q+k", "forward", 5)
        print(pad.flatten()[0].item(), flush=True)
except VerificationError as exc:
    print(exc.code, flush=True)
"""


def test_two_processes_from_one_cloned_disk(tmp_path: Path, swtpm: Swtpm) -> None:
    """Both have found the counter right before either counts; swtpm serves one client at a time, as a chip does."""
    make_store(tmp_path / "one", Chip(), **kept_by(swtpm))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", CHILD]
    children = []
    for name in ("one", "two"):
        child = subprocess.Popen(
            [*command, str(tmp_path / name), swtpm.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
        )
        children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "looked\n"
    outcomes = [child.communicate("go\n")[0].strip() for child in children]
    assert outcomes[1] == "pad-rollback"
    assert outcomes[0].lstrip("-").isdigit()


def test_another_program_boot_or_machine_has_no_key(tmp_path: Path, swtpm: Swtpm, other_swtpm: Swtpm) -> None:
    make_store(tmp_path, Chip(), **kept_by(swtpm))
    with pytest.raises(VerificationError, match="another TPM") as refused:
        draw(tmp_path, other_swtpm)
    assert refused.value.code == "pad-store"
    settings = {**kept_by(swtpm), "key": TpmStoreKey(swtpm.address, [14])}
    with pytest.raises(VerificationError, match="the job asks for"), used_store(tmp_path, Chip(), **settings):
        pass
    with swtpm.open() as tpm:
        tpm.pcr_extend(14, b"d" * 32)
    with pytest.raises(VerificationError, match="another program or boot"):
        draw(tmp_path, swtpm)
    maker = make_store(tmp_path, Chip(), **kept_by(swtpm))
    assert "another program" in maker.given_up
    draw(tmp_path, swtpm)


def test_a_tpm_that_does_not_answer_gives_no_pads(tmp_path: Path, swtpm: Swtpm) -> None:
    make_store(tmp_path, Chip(), **kept_by(swtpm))

    def use() -> None:
        with open_store(tmp_path, job_id=JOB_ID, party="north", **kept_by(swtpm)) as pads:  # type: ignore[arg-type]
            swtpm.stop()
            pads.begin(WEIGHTS_ID, GROUPS, 1)

    with pytest.raises(TransportError):
        use()


def test_the_command(tmp_path: Path, swtpm: Swtpm, capfd: pytest.CaptureFixture[str]) -> None:
    from tests.unit.cli.test_pads import JOB

    write_model(tmp_path / "model")
    for part, count in (("train", 30), ("test", 4)):
        write_lines(tmp_path / f"{part}.jsonl", records("north", part, count))
    (tmp_path / "policy.toml").write_text(POLICY)
    text = JOB.format(method="slice", pads="precomputed", attester="tpm", key=PartyKey.generate().public.hex())
    (tmp_path / "job.toml").write_text(text.replace("[enclave]\n", f'[enclave]\ntpm = "{swtpm.address}"\n'))
    command = ["pads", str(tmp_path / "job.toml"), "--party", "north", "--out", str(tmp_path / "pads"), "--json"]
    for continued in (False, True):
        assert main(command) == 0
        report = PadsReport.model_validate(json.loads(capfd.readouterr().out))
        assert (report.kept_by, report.insecure, report.continued) == ("tpm", False, continued)
