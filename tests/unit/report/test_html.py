"""The report page: nothing hostile gets in, nothing is fetched, nothing is left out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from cloister.report import summary
from cloister.report.html import render_html, write_html
from cloister.report.model import ALL, RunReport

from .fake import run_report

HOSTILE = "<script>alert(1)</script>\"'><img src=http://evil.example/x onerror=alert(2)>&{{ 7*7 }}</style>"
LOADING = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; checks that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += data


def names(page: Page) -> set[str]:
    return {tag for tag, _ in page.tags}


def hostile_report() -> RunReport:
    """Every free string of a report is hostile."""
    report = run_report(names=(HOSTILE, "b"))
    sample = report.samples[0]
    strings = {"prompt": HOSTILE, "response": HOSTILE, "reference": HOSTILE}
    return report.model_copy(
        update={
            "job_name": HOSTILE,
            "command": HOSTILE,
            "model": HOSTILE,
            "cut": HOSTILE,
            "warnings": [HOSTILE],
            "released_to": [HOSTILE],
            "timing": {HOSTILE: 1.0},
            "curves": {HOSTILE: report.curves["cloister"], f"local:{HOSTILE}": report.curves["central"]},
            "samples": [sample.model_copy(update=strings)],
            "attestation": report.attestation.model_copy(update={"type": HOSTILE, "measurement": HOSTILE}),
            "results": [
                row.model_copy(update={"task": HOSTILE if row.task == "answer" else row.task}) for row in report.results
            ],
        }
    )


def test_hostile_strings_stay_text() -> None:
    page, plain = Page(render_html(hostile_report())), Page(render_html(run_report(names=("a", "b"))))
    assert names(page) <= names(plain)
    assert not names(page) & {"script", "img", "iframe", "object", "link", "base"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count("alert(1)") >= 10
    assert "{{ 7*7 }}" in page.text


def test_nothing_is_loaded_from_anywhere() -> None:
    text = render_html(run_report())
    page = Page(text)
    assert not [(tag, a) for tag, attributes in page.tags for a in attributes if a in LOADING]
    style = text.split("<style>")[1].split("</style>")[0]
    assert not re.search(r"url\(|@import|@font-face|https?:", style)
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) == {"http://www.w3.org/2000/svg"}
    assert [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"] == [
        "default-src 'none'; style-src 'unsafe-inline'"
    ]


def test_drawings_are_well_formed_and_have_titles() -> None:
    drawings = re.findall(r"<svg xmlns.*?</svg>", render_html(hostile_report()), flags=re.DOTALL)
    assert len(drawings) >= 5
    for drawing in drawings:
        root = ET.fromstring(drawing)  # noqa: S314 - our own text
        assert root.find("{http://www.w3.org/2000/svg}title") is not None


def test_same_report_gives_the_same_bytes_in_another_process() -> None:
    code = "import sys; from tests.unit.report.fake import run_report; from cloister.report.html import render_html;"
    code += "sys.stdout.buffer.write(render_html(run_report()).encode())"
    root = Path(__file__).parents[3]
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "TZ": "Asia/Tokyo", "PYTHONPATH": str(root)}
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment, cwd=root)
        assert out.stdout.decode() == render_html(run_report())


def test_every_score_and_interval_of_the_table_is_on_the_page() -> None:
    report = run_report()
    text = Page(render_html(report)).text
    for row in report.results:
        if row.task == ALL:
            assert summary.rate(row.bits_per_byte) in text
            assert summary.span(row.bits_per_byte_ci) in text
            assert summary.percent_span(row.accuracy_ci) in text
    for fact in (report.job_id, report.adapter_sha256, report.attestation.measurement, report.warnings[0]):
        assert fact in text


@pytest.mark.parametrize(
    ("kind", "hardware", "confidential", "word"),
    [
        ("simulated", False, False, "SIMULATED"),
        ("tpm", False, False, "NOT CONFIDENTIAL"),
        ("tpm", True, False, "NOT CONFIDENTIAL"),
        ("tdx", True, True, None),
    ],
)
def test_an_unprotected_run_cannot_be_mistaken(kind: str, hardware: bool, confidential: bool, word: str | None) -> None:
    report = run_report()
    changes = {"type": kind, "hardware": hardware, "confidential": confidential}
    attestation = report.attestation.model_copy(update=changes)
    page = Page(render_html(report.model_copy(update={"attestation": attestation})))
    alarms = [a for _, a in page.tags if a.get("role") == "alert"]
    assert bool(alarms) == (word is not None)
    assert ("readable" in page.text) == (word is not None)
    found = {w for w in ("SIMULATED", "NOT CONFIDENTIAL") if w in page.text}
    assert found == ({word} if word else set())


def test_the_insecure_command_is_shown_for_simulated_runs_only() -> None:
    assert "--insecure-simulated" in render_html(run_report())
    assert "--insecure-simulated" not in render_html(run_report(hardware=True))


@pytest.mark.parametrize("parties", [1, 2, 5, 12])
def test_any_number_of_parties_is_drawn(parties: int) -> None:
    report = run_report(names=tuple(f"party-{i}" for i in range(parties)))
    text = Page(render_html(report)).text
    assert all(f"party-{i}" in text for i in range(parties))
    assert ("more parties" in text) == (parties > 6)


def test_a_report_with_only_what_is_required_is_drawn() -> None:
    report = run_report(names=("alone",))
    bare = report.model_copy(
        update={
            "results": [
                r.model_copy(update={"accuracy": None, "accuracy_ci": None, "bits_per_byte_ci": None})
                for r in report.results
                if r.system == "cloister" and r.task == ALL
            ],
            "local_cross": [],
            "comparisons": [],
            "curves": {},
            "samples": [],
            "warnings": [],
            "timing": {},
            "receipt": None,
        }
    )
    page = Page(render_html(bare))
    assert "no interval" in page.text
    assert "Accuracy" not in page.text
    assert not re.search(r"\bNone\b|nan", page.text)
    unscored = Page(render_html(bare.model_copy(update={"results": []})))
    assert "no scores" in unscored.text


def test_page_is_written_as_utf8(tmp_path: Path) -> None:
    write_html(run_report(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes().decode("utf-8") == render_html(run_report())


def test_devices_and_warnings_of_the_evidence_are_shown_as_text() -> None:
    report = run_report()
    device = {"type": "nvidia-gpu", "identity": "ab" * 32, "driver": HOSTILE}
    attestation = report.attestation.model_copy(update={"devices": [device], "warnings": [f"old firmware {HOSTILE}"]})
    text = render_html(report.model_copy(update={"attestation": attestation}))
    page = Page(text)
    assert f"identity {'ab' * 32}, driver {HOSTILE}" in page.text
    assert f"old firmware {HOSTILE}" in page.text
    assert "<script>alert(1)" not in text
