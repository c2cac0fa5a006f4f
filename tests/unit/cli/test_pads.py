"""`cloister pads`: a store for a party's whole job, from job file to pads that can be drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cloister.agreement.job import OpenJob, open_job
from cloister.attest.policy import AppraisalPolicy, ReferenceValue
from cloister.cli import main
from cloister.crypto.keys import PartyKey
from cloister.errors import UsageError
from cloister.jobfile import load_job
from cloister.masking.store import open_store
from cloister.masking.stream import stream_weights
from cloister.progress import Silent
from cloister.report.outputs import ErrorReport
from cloister.report.plan import PadsReport
from cloister.silo.keeper import find_keeper, policy_pcrs
from tests.integration.tiny_job import records, write_lines, write_model

JOB = """
[job]
name = "tiny"
method = "{method}"
[model]
path = "model"
[training]
steps = 4
batch_tokens = 64
max_tokens = 48
evaluations = 1
[federation]
rounds = 2
[masking]
pads = "{pads}"
[enclave]
attester = "{attester}"
policy = "policy.toml"
[[party]]
name = "north"
public_key = "{key}"
train = "train.jsonl"
test = "test.jsonl"
"""
POLICY = '[policy]\naccept = ["simulated"]\ninsecure_simulated = true\nmeasurements = "any"\n'
KEY = PartyKey.generate()

Cloister = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    write_model(folder / "model")
    (folder / "policy.toml").write_text(POLICY)
    for part, count in (("train", 30), ("test", 4)):
        write_lines(folder / f"{part}.jsonl", records("north", part, count))
    return folder


def job(folder: Path, *, method: str = "slice", pads: str = "precomputed", attester: str = "simulated") -> Path:
    path = folder / f"{method}-{pads}-{attester}.toml"
    text = JOB.format(method=method, pads=pads, attester=attester, key=KEY.public.hex())
    if method == "split":
        text = text.replace('[masking]\npads = "precomputed"\n', "").replace("[federation]\nrounds = 2\n", "")
    path.write_text(text)
    return path


def opened(folder: Path) -> OpenJob:
    return open_job(load_job(job(folder)), progress=Silent())


@pytest.fixture
def cloister(capfd: pytest.CaptureFixture[str]) -> Cloister:
    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


def pads(job: Path, out: Path, *more: str) -> tuple[str | Path, ...]:
    return ("pads", job, "--party", "north", "--out", out, "--insecure-simulated", *more)


def test_from_a_job_file_to_pads(folder: Path, tmp_path: Path, cloister: Cloister) -> None:
    code, out, err = cloister(*pads(job(folder), tmp_path / "pads", "--json"))
    assert (code, err) == (0, "")
    report = PadsReport.model_validate_json(out)
    assert (report.kept_by, report.insecure, report.continued) == ("simulated", True, False)
    assert (tmp_path / "pads/products").stat().st_size == report.disk_bytes
    assert any("INSECURE" in warning for warning in report.warnings)
    this = opened(folder)
    keeper = find_keeper(this, "north", tmp_path / "pads", insecure_simulated=True)
    settings = {"party": "north", "key": keeper.key, "counter": keeper.counter}
    job_id, model = bytes.fromhex(this.resolved.job_id), this.resolved.model
    with open_store(tmp_path / "pads", job_id=job_id, **settings) as stored:  # type: ignore[arg-type]
        assert sum(stored.left().values()) == report.rows
        stream_weights(model.folder, json.loads(this.resolved.canonical)["model_files"], bits=8, sinks=[stored])
        stored.draw("model.layers.0.self_attn.q_proj+k_proj+v_proj", "forward", 48)[1]()
    code, out, _ = cloister(*pads(job(folder), tmp_path / "pads", "--json"))
    assert code == 2
    assert "partly used" in ErrorReport.model_validate_json(out).error.message
    code, out, _ = cloister(*pads(job(folder), tmp_path / "pads", "--json", "--anew"))
    assert code == 0
    assert "partly used" in PadsReport.model_validate_json(out).given_up


def test_started_again_it_continues(folder: Path, tmp_path: Path, cloister: Cloister) -> None:
    assert cloister(*pads(job(folder), tmp_path))[0] == 0
    code, out, _ = cloister(*pads(job(folder), tmp_path))
    assert code == 0
    assert "continued" in out
    assert "INSECURE" in out


def test_spare_pads(folder: Path, tmp_path: Path, cloister: Cloister) -> None:
    found = []
    for name, more in (("plain", ()), ("spare", ("--spare", "0.5"))):
        code, out, _ = cloister(*pads(job(folder), tmp_path / name, "--json", *more))
        assert code == 0
        found.append(PadsReport.model_validate_json(out).rows)
    assert found[1] == pytest.approx(1.5 * found[0], rel=0.01)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "split"}, "needs no pads"),
        ({"pads": "dual"}, "computes none beforehand"),
        ({"attester": "sgx"}, "no counter that its host cannot set back"),
        ({"attester": "auto"}, "no counter"),
    ],
)
def test_what_keeps_no_pads_is_said_so(
    folder: Path, tmp_path: Path, cloister: Cloister, settings: dict[str, str], says: str
) -> None:
    code, out, _ = cloister(*pads(job(folder, **settings), tmp_path, "--json"))
    assert code == 2
    assert says in ErrorReport.model_validate_json(out).error.message
    assert not list(tmp_path.iterdir())


def test_simulated_keys_need_a_permission(folder: Path, tmp_path: Path, cloister: Cloister) -> None:
    code, out, _ = cloister("pads", job(folder), "--party", "north", "--out", tmp_path, "--json")
    assert code == 2
    assert "--insecure-simulated" in ErrorReport.model_validate_json(out).error.hint
    with pytest.raises(UsageError, match="NOTHING"):
        find_keeper(opened(folder), "north", tmp_path, insecure_simulated=False)


def test_a_key_is_sealed_to_what_the_policy_measures_and_to_this_program() -> None:
    values = [
        ReferenceValue(label="a", type="tpm", registers={"pcr7": b"x" * 32, "pcr11": b"y" * 32}),
        ReferenceValue(label="b", type="sev-snp", registers={"measurement": b"x" * 48}),
    ]
    assert policy_pcrs(AppraisalPolicy(accept=("tpm",), reference_values=tuple(values))) == [7, 11, 14]
    assert policy_pcrs(AppraisalPolicy(accept=("tpm",))) == [14]
