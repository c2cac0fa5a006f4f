"""Outputs: strict models, current schemas, errors that name the field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from cloister.errors import CloisterError, DataError, UsageError, VerificationError
from cloister.report.model import CurvePoint, RunReport, Wire
from cloister.report.outputs import OUTPUTS, ErrorReport
from cloister.report.schema import DEFAULT_FOLDER, schema_files, write_schemas

from .fake import run_report

ROOT = Path(__file__).parents[3]


def test_published_schemas_are_those_of_the_models() -> None:
    folder = ROOT / DEFAULT_FOLDER
    published = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.schema.json")}
    assert published == schema_files(), "run: python -m cloister.report.schema"


def test_a_stale_schema_file_is_removed(tmp_path: Path) -> None:
    (tmp_path / "gone.schema.json").write_text("{}")
    write_schemas(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(schema_files())


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_output_has_its_version_in_the_schema(name: str) -> None:
    schema = json.loads(schema_files()[f"{name}.schema.json"])
    assert schema["additionalProperties"] is False
    assert ("schema_version" in schema["required"]) == (name != "error")


def test_report_json_has_the_promised_keys() -> None:
    report = json.loads(run_report().to_json())
    assert {"type", "hardware"} <= set(report["attestation"])
    assert {"system", "party", "task", "examples", "bits_per_byte", "bits_per_byte_ci", "accuracy", "accuracy_ci"} <= (
        set(report["results"][0])
    )
    assert {"a", "b", "party", "metric", "delta", "ci", "p"} <= set(report["comparisons"][0])
    for entry in (report["wire"]["total"], *report["wire"]["parties"]):
        assert {"bytes_up", "bytes_down", "activation_dtype"} <= set(entry)
    assert set(report["training"]) == {"tokens", "tokens_per_s", "steps"}
    assert {"job_id", "method", "timing", "adapter_sha256", "schema_version"} <= set(report)


def test_report_survives_a_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(run_report().to_json(), encoding="utf-8")
    assert RunReport.read(path) == run_report()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"wire": None}, "wire"),
        ({"colour": "red"}, "colour"),
        ({"job_id": "abc"}, "job_id"),
        ({"schema_version": 2}, "schema_version"),
    ],
    ids=["type", "unknown key", "hash", "version"],
)
def test_a_bad_report_is_refused_by_field(tmp_path: Path, change: dict[str, object], field: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(json.loads(run_report().to_json()) | change), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        RunReport.read(path)
    assert caught.value.where == str(path)
    assert caught.value.message.startswith(field)


@pytest.mark.parametrize("text", ["", "{", "\xff"])
def test_a_file_that_is_not_json_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match="whole file"):
        RunReport.read(path)


def test_a_missing_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        RunReport.read(tmp_path / "report.json")


def test_numbers_that_json_cannot_hold_are_refused() -> None:
    with pytest.raises(ValidationError, match="finite"):
        CurvePoint(step=1, tokens=1, train_loss=float("nan"))


def test_wire_total_is_the_sum_of_the_parties() -> None:
    wire = Wire.of({"a": (10, 1), "b": (20, 2)}, "int8")
    assert (wire.total.bytes_up, wire.total.bytes_down) == (30, 3)
    assert [p.party for p in wire.parties] == ["a", "b"]


@pytest.mark.parametrize(
    "error", [UsageError("no"), DataError("bad", where="x:1", hint="fix"), VerificationError("tag", "altered")]
)
def test_errors_follow_their_schema(error: CloisterError) -> None:
    report = ErrorReport.model_validate(error.to_json())
    assert report.error.code == error.code
    assert json.loads(report.to_json()) == error.to_json()
