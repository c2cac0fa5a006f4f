"""Every layout and file type gives the same records; every fault names file, line and field."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from cloister.data.records import Record, load_records
from cloister.errors import DataError

ASK, REPLY = "Is it flu?", "Yes, it is."
USER = [{"role": "user", "content": ASK}]
ASSISTANT = [{"role": "assistant", "content": REPLY}]
CHOICE = {"id": "q7", "task": "triage", "question": "Flu?", "choices": ["no", "yes"], "answer": 1}


def _jsonl(folder: Path, *rows: object) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _csv(folder: Path, *rows: dict[str, Any]) -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    path = folder / "data.csv"
    path.write_bytes(text.getvalue().encode())
    return path


def _parquet(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "data.parquet"
    parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


PLAIN = Record(id="line-1", task="default", prompt=ASK, response=REPLY)
CHAT = Record(id="line-1", task="default", prompt=(("user", ASK),), response=REPLY)
LAYOUTS: list[tuple[dict[str, Any], str, Record]] = [
    ({"prompt": ASK, "response": REPLY}, "prompt-response", PLAIN),
    ({"prompt": ASK, "completion": REPLY}, "prompt-completion", PLAIN),
    ({"prompt": USER, "completion": ASSISTANT}, "prompt-completion", CHAT),
    ({"messages": USER + ASSISTANT}, "messages", CHAT),
]


@pytest.mark.parametrize("named", [True, False], ids=["named", "auto"])
@pytest.mark.parametrize("write", [_jsonl, _parquet])
@pytest.mark.parametrize(("row", "layout", "record"), LAYOUTS)
def test_every_layout_is_read(
    tmp_path: Path, row: dict[str, Any], layout: str, record: Record, write: Any, named: bool
) -> None:
    assert load_records(write(tmp_path, row), layout if named else "auto") == [record]


@pytest.mark.parametrize(("row", "record"), [(LAYOUTS[0][0], PLAIN), (LAYOUTS[1][0], PLAIN), (LAYOUTS[3][0], CHAT)])
def test_csv_is_read(tmp_path: Path, row: dict[str, Any], record: Record) -> None:
    (read,) = load_records(_csv(tmp_path, row))
    assert (read.prompt, read.response) == (record.prompt, record.response)


@pytest.mark.parametrize("write", [_jsonl, _csv, _parquet])
def test_choices_are_read(tmp_path: Path, write: Any) -> None:
    (read,) = load_records(write(tmp_path, {"prompt": ASK, "response": REPLY, **CHOICE}))
    assert read == Record(
        id="q7", task="triage", prompt=ASK, response=REPLY, question="Flu?", choices=("no", "yes"), answer=1
    )


@pytest.mark.parametrize("write", [_jsonl, _csv, _parquet])
def test_records_keep_file_order_and_text(tmp_path: Path, write: Any) -> None:
    replies = ["täglich 2-mal 5 mg", 'a "quoted", word', "two\nlines", "日本語 🩺"]
    read = load_records(write(tmp_path, *({"prompt": ASK, "response": r} for r in replies)))
    assert [r.response for r in read] == replies
    assert len({r.id for r in read}) == 4


def test_rows_with_and_without_choices_mix(tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"prompt": ASK, "response": "yes", **CHOICE}
    plain = {**dict.fromkeys(chosen, ""), "prompt": ASK, "response": REPLY}
    assert [len(r.choices) for r in load_records(_csv(tmp_path, plain, chosen))] == [0, 2]
    assert [len(r.choices) for r in load_records(_parquet(tmp_path, chosen, GOOD))] == [2, 0]


def test_blank_lines_and_a_byte_order_mark_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(LAYOUTS[0][0]).encode() + b"\r\n\r\n  \n")
    assert load_records(path) == [PLAIN]
    table = tmp_path / "data.csv"
    table.write_bytes(b"\xef\xbb\xbfprompt,response\r\n" + f'{ASK},"{REPLY}"\r\n'.encode())
    assert load_records(table)[0].response == REPLY


GOOD = {"prompt": ASK, "response": REPLY}
FAULTS: list[tuple[str, dict[str, Any], str, str]] = [
    ("auto", {"prompt": ASK}, "response", "is missing"),
    ("auto", {"response": REPLY}, "prompt", "is missing"),
    ("auto", {"prompt": None, "response": REPLY}, "prompt", "is missing"),
    ("auto", {"prompt": "", "response": REPLY}, "prompt", "is empty"),
    ("auto", {"prompt": ASK, "response": " \n"}, "response", "is empty"),
    ("auto", {"prompt": ASK, "response": 3}, "response", "is not text"),
    ("auto", {"prompt": ["a"], "response": REPLY}, "prompt", "is not text"),
    ("auto", {"prompt": ASK, "response": "\ud83e"}, "response", "half of a surrogate pair"),
    ("prompt-completion", GOOD, "completion", "is missing"),
    ("prompt-response", {"prompt": ASK, "completion": REPLY}, "response", "is missing"),
    ("auto", {"prompt": USER, "completion": REPLY}, "completion", "not a list of messages"),
    ("auto", {"prompt": USER, "completion": USER}, "completion", "not one message of the assistant"),
    ("auto", {"prompt": [], "completion": ASSISTANT}, "prompt", "not a list of messages"),
    ("auto", {"messages": "hello"}, "messages", "not a list of messages"),
    ("auto", {"messages": USER}, "messages", "must end with a message of the assistant"),
    ("auto", {"messages": ASSISTANT}, "messages", "after another one"),
    ("auto", {"messages": [{"role": "user"}, *ASSISTANT]}, "messages", "without role and content"),
    ("auto", {"messages": [{"role": "user", "content": 1}, *ASSISTANT]}, "messages", "without role and content"),
    ("auto", {"messages": ["hello", *ASSISTANT]}, "messages", "without role and content"),
    ("messages", GOOD, "messages", "not a list of messages"),
    ("auto", {**GOOD, "choices": ["only"], "answer": 0}, "choices", "two or more texts"),
    ("auto", {**GOOD, "choices": "ab", "answer": 0}, "choices", "two or more texts"),
    ("auto", {**GOOD, "choices": ["a", 2], "answer": 0}, "choices", "two or more texts"),
    ("auto", {**GOOD, "choices": ["a", ""], "answer": 0}, "choices", "two or more texts"),
    ("auto", {**GOOD, "choices": ["a", "b"]}, "answer", "0-based index of one of the 2 choices"),
    ("auto", {**GOOD, "choices": ["a", "b"], "answer": 2}, "answer", "0-based index"),
    ("auto", {**GOOD, "choices": ["a", "b"], "answer": -1}, "answer", "0-based index"),
    ("auto", {**GOOD, "choices": ["a", "b"], "answer": True}, "answer", "0-based index"),
    ("auto", {**GOOD, "choices": ["a", "b"], "answer": "b"}, "answer", "0-based index"),
    ("auto", {**GOOD, "question": 3}, "question", "is not text"),
    ("auto", {**GOOD, "id": [1]}, "id", "is not text"),
    ("auto", {**GOOD, "id": ""}, "id", "is not text"),
    ("auto", {**GOOD, "task": 1.5}, "task", "is not text"),
    ("auto", {**GOOD, "task": "t" * 1025}, "task", "longer than 1024"),
]


@pytest.mark.parametrize(("layout", "row", "field", "message"), FAULTS)
def test_a_faulty_record_is_refused_with_file_line_and_field(
    tmp_path: Path, layout: str, row: dict[str, Any], field: str, message: str
) -> None:
    first = {"auto": GOOD, "prompt-response": GOOD, "messages": LAYOUTS[3][0], "prompt-completion": LAYOUTS[1][0]}
    path = _jsonl(tmp_path, first[layout], row)
    with pytest.raises(DataError, match=message) as refused:
        load_records(path, layout)
    assert refused.value.where == f"{path}:2: {field}"


def test_csv_and_parquet_faults_name_the_row(tmp_path: Path) -> None:
    for path, line in (
        (_csv(tmp_path, GOOD, {"prompt": ASK, "response": ""}), 3),  # the header is line 1
        (_parquet(tmp_path, GOOD, {"prompt": ASK, "response": None}), 2),
    ):
        with pytest.raises(DataError, match="is missing") as refused:
            load_records(path)
        assert refused.value.where == f"{path}:{line}: response"
    path = _csv(tmp_path, {**GOOD, "choices": "yes, no", "answer": "1"})
    with pytest.raises(DataError, match="two or more texts"):
        load_records(path)


BROKEN: list[tuple[str, bytes, str, str]] = [
    ("data.jsonl", b"", "", "no records"),
    ("data.jsonl", b"\n \n", "", "no records"),
    ("data.csv", b"", "", "no records"),
    ("data.csv", b"prompt,response\n", "", "no records"),
    ("data.jsonl", b'{"prompt": "a", "response": "b"}\n{"prompt": \n', ":2", "is not JSON"),
    ("data.jsonl", b"hello\n", ":1", "is not JSON"),
    ("data.jsonl", b"[1]\n", ":1", "is a JSON list, not an object"),
    ("data.jsonl", b"[" * 100_000 + b"\n", ":1", "is not JSON"),
    ("data.jsonl", b'{"id": ' + b"1" * 5000 + b"}\n", ":1", "is not JSON"),
    ("data.jsonl", b'{"prompt": "a", "response": "b"}\n' * 3 + b'{"prompt": "\xff"}\n', ":4", "not UTF-8.*byte 12"),
    ("data.csv", b"prompt,response\na,caf\xe9\n", ":2", "not UTF-8"),
    ("data.csv", b"prompt,response\na,b,c\n", ":2", "more cells than the header"),
    ("data.csv", b'prompt,response\n"a"b,c\n', ":2", "is not CSV"),
    ("data.csv", b"prompt,response\na," + b"x" * 140_000 + b"\n", ":2", "is not CSV.*field limit"),
    ("data.parquet", b"", "", "not a Parquet file"),
    ("data.parquet", b"PAR1 nothing PAR1", "", "not a Parquet file"),
]


@pytest.mark.parametrize(("name", "content", "line", "message"), BROKEN)
def test_a_broken_file_is_refused_with_its_place(
    tmp_path: Path, name: str, content: bytes, line: str, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as refused:
        load_records(path)
    assert refused.value.where == f"{path}{line}"


def test_a_parquet_file_damaged_anywhere_is_records_or_a_data_error(tmp_path: Path) -> None:
    path = _parquet(tmp_path, *({"id": str(i), "prompt": ASK, "response": REPLY * i} for i in range(1, 9)))
    whole = path.read_bytes()
    for start in range(0, len(whole), 7):
        path.write_bytes(whole[:start] + b"\xff" * 3 + whole[start + 3 :])
        try:
            load_records(path)
        except DataError as exc:
            assert exc.where.startswith(str(path))  # noqa: PT017 - both outcomes are right


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError, match="no such file") as refused:
            load_records(path)
        assert refused.value.where == str(path)


def test_an_id_used_twice_is_refused(tmp_path: Path) -> None:
    path = _jsonl(tmp_path, {**GOOD, "id": "a"}, {**GOOD, "id": 1}, {**GOOD, "id": "1"})
    with pytest.raises(DataError, match=r"id '1' was used before, by record 2") as refused:
        load_records(path)
    assert refused.value.where == f"{path}: record 3: id"
