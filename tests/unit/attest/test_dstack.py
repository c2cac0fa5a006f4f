"""Collecting from dstack, with a guest agent made of paper that hands out genuine quotes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cloister.attest.backends.dstack import SOCKETS, DstackAttester
from cloister.errors import RunError, UsageError
from tests.evidence import needs_evidence, sample

REPORT_DATA = bytes(64)


@dataclasses.dataclass
class Answer:
    quote: str
    event_log: str = "[]"


class Agent:
    """What `DstackClient` is to the collector."""

    def __init__(self, answer: Answer | Exception) -> None:
        self.answer, self.asked = answer, b""

    def __call__(self, socket: str) -> Agent:
        self.socket = socket
        return self

    def get_quote(self, report_data: bytes) -> Answer:
        self.asked = report_data
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "var/run").mkdir(parents=True)
    (tmp_path / "var/run/dstack.sock").touch()
    return tmp_path


def genuine_quote() -> tuple[bytes, bytes]:
    """A TDX quote and its report data."""
    quote = sample("tdx/tdx_quote")
    return quote, quote[48 + 520 : 48 + 584]


@needs_evidence
def test_collected(root: Path) -> None:
    quote, report_data = genuine_quote()
    agent = Agent(Answer(quote=quote.hex(), event_log='[{"imr": 3}]'))
    evidence = DstackAttester(root, collateral=b"from a cache", connect=agent).collect(report_data)
    assert (evidence.type, evidence.blob, evidence.event_log) == ("tdx", quote, b'[{"imr": 3}]')
    assert evidence.collateral == b"from a cache"
    assert (agent.asked, agent.socket) == (report_data, str(root / "var/run/dstack.sock"))
    assert DstackAttester(root, connect=agent).collect(report_data).collateral == b""


@needs_evidence
def test_a_quote_for_somebody_else_is_noticed(root: Path) -> None:
    quote, report_data = genuine_quote()
    with pytest.raises(RunError, match="not for our"):
        DstackAttester(root, connect=Agent(Answer(quote=quote.hex()))).collect(report_data[::-1])


@needs_evidence
def test_an_sgx_quote_is_none_of_dstacks(root: Path) -> None:
    agent = Agent(Answer(quote=sample("sgx/sgx_quote").hex()))
    with pytest.raises(RunError, match="not for our"):
        DstackAttester(root, connect=agent).collect(REPORT_DATA)


@needs_evidence
def test_an_event_log_that_is_too_long(root: Path) -> None:
    quote, report_data = genuine_quote()
    agent = Agent(Answer(quote=quote.hex(), event_log=" " * (1 << 20)))
    with pytest.raises(RunError, match="too long"):
        DstackAttester(root, connect=agent).collect(report_data)


@pytest.mark.parametrize("answer", [Answer(quote="no hex"), OSError("refused"), ValueError("bad")])
def test_no_answer(root: Path, answer: Answer | Exception) -> None:
    with pytest.raises(RunError, match="gave no quote"):
        DstackAttester(root, connect=Agent(answer)).collect(REPORT_DATA)


def test_no_quote(root: Path) -> None:
    with pytest.raises(RunError, match="no TDX quote"):
        DstackAttester(root, connect=Agent(Answer(quote="00" * 700))).collect(REPORT_DATA)


def test_errors_of_the_sdks_http_library(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("httpx")
    module.HTTPError = type("HTTPError", (Exception,), {})
    monkeypatch.setitem(sys.modules, "httpx", module)
    with pytest.raises(RunError, match="gave no quote: timed out"):
        DstackAttester(root, connect=Agent(module.HTTPError("timed out"))).collect(REPORT_DATA)
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(RunError, match="refused"):
        DstackAttester(root, connect=Agent(OSError("refused"))).collect(REPORT_DATA)


def test_found(tmp_path: Path) -> None:
    assert DstackAttester.found(tmp_path) is None
    with pytest.raises(RunError, match="no socket") as caught:
        DstackAttester(tmp_path).collect(REPORT_DATA)
    assert "mount" in caught.value.hint
    for name in reversed(SOCKETS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        assert DstackAttester.found(tmp_path) == str(tmp_path / name)


def test_the_sdk_is_used_if_there_and_named_if_not(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dstack_sdk", None)
    with pytest.raises(UsageError, match="dstack-sdk") as caught:
        DstackAttester(root).collect(REPORT_DATA)
    assert "cloister[dstack]" in caught.value.hint
    sdk: Any = ModuleType("dstack_sdk")
    agent = Agent(OSError("reached"))
    sdk.DstackClient = lambda endpoint, *, timeout: agent(endpoint)
    monkeypatch.setitem(sys.modules, "dstack_sdk", sdk)
    with pytest.raises(RunError, match="reached"):
        DstackAttester(root).collect(REPORT_DATA)


def test_report_data_has_64_bytes(root: Path) -> None:
    with pytest.raises(ValueError, match="64"):
        DstackAttester(root).collect(b"short")
