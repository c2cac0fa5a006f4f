"""Progress: bars for a person, lines for a parent process that reads them back, silence into a pipe."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cloister.cli.progress import open_progress
from cloister.progress import Event, JsonLines, Silent, parse_line, relay, task

BROKEN = [f'{{"progress":{event}}}\n' for event in ("3", '{"x":1}', '{"task":3}', '{"task":"t","done":"1"}')]


class Recorder:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def report(self, event: Event) -> None:
        self.events.append(event)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_task_is_announced_counted_and_ended_even_when_it_fails() -> None:
    seen = Recorder()

    def fail_half_way() -> None:
        with task(seen, "sealing", total=3, unit="packs") as running:
            running.advance()
            running.advance(note="loss 1.2")
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        fail_half_way()
    assert [(e.done, e.ended) for e in seen.events] == [(0, False), (1, False), (2, False), (2, True)]
    assert seen.events[-1] == Event(task="sealing", done=2, total=3, unit="packs", note="loss 1.2", ended=True)


def test_lines_are_few_and_lose_neither_the_first_nor_the_last_event() -> None:
    stream, clock = io.StringIO(), Clock()
    with task(JsonLines(stream, clock=clock), "training", total=1000) as running:
        for _ in range(1000):
            clock.now += 0.001
            running.advance()
    events = [parse_line(line) for line in stream.getvalue().splitlines()]
    assert len(events) <= 2 + 1.0 / 0.2
    assert events[0] == Event(task="training", total=1000)
    assert events[-1] == Event(task="training", done=1000, total=1000, ended=True)


def test_a_parent_reads_a_childs_events_and_keeps_its_other_lines() -> None:
    stream = io.StringIO()
    JsonLines(stream).report(Event(task="sealing", done=1, total=2))
    lines = ["a warning\n", *stream.getvalue().splitlines(keepends=True), *BROKEN]
    seen, log = Recorder(), list[str]()
    relay(lines, seen, who="north", other=log.append)
    assert seen.events == [Event(task="north: sealing", done=1, total=2)]
    assert log == [lines[0], *lines[2:]]


@given(st.text())
def test_any_text_of_a_child_is_an_event_or_a_line(text: str) -> None:
    assert parse_line(text) is None or text.startswith('{"progress":')


def test_bars_are_drawn_on_a_terminal_and_nothing_into_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    screen = io.StringIO()
    with open_progress("auto", console=Console(file=screen, force_terminal=True, width=100)) as progress:
        with task(progress, "north: sealing", total=2, unit="packs") as running:
            running.advance(2)
        with task(progress, "waiting"):
            pass
    assert "north: sealing" in screen.getvalue()
    assert "2/2" in screen.getvalue()
    with open_progress("auto", console=Console(file=io.StringIO())) as progress:
        assert isinstance(progress, Silent)
    with open_progress("json") as progress, task(progress, "sealing"):
        pass
    assert [json.loads(line)["progress"]["ended"] for line in capsys.readouterr().err.splitlines()] == [False, True]
