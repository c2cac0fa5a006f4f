"""Training and test records from JSONL, CSV or Parquet files, in any of the usual layouts.

    prompt-response     {"prompt": str, "response": str}
    prompt-completion   {"prompt": str, "completion": str}, or both as lists of messages (TRL)
    messages            {"messages": [{"role": str, "content": str}, ...]}, the last one by the assistant

Optional in every layout: `id`, `task`, and `question` + `choices` + `answer` (0-based) for a record that is also
scored by choosing; `question` defaults to the prompt.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloister.errors import DataError

Message = tuple[str, str]
"""(role, content)"""

MAX_NAME = 1024
"""Characters of an id or a task; a receiver refuses longer ones."""

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One example. `prompt` is text, or a conversation that the tokenizer's chat template turns into text."""

    id: str
    task: str
    prompt: str | tuple[Message, ...]
    response: str
    question: str | None = None
    choices: tuple[str, ...] = ()
    answer: int | None = None


def load_records(path: Path, layout: str = "auto") -> list[Record]:
    """Read a whole file.

    Raises:
        DataError: the file is missing, empty or malformed; `where` names file, line and field.
    """
    if not path.is_file():
        raise DataError("there is no such file", where=str(path), hint="check train and test of the [[party]]")
    records = [_record(row, layout, f"{path}:{line}", line) for line, row in _rows(path)]
    if not records:
        raise DataError("the file holds no records", where=str(path), hint="each line is one JSON object")
    seen: dict[str, int] = {}
    for number, record in enumerate(records, start=1):
        if record.id in seen:
            raise DataError(
                f"id {record.id!r} was used before, by record {seen[record.id]}",
                where=f"{path}: record {number}: id",
                hint="ids pair scores between runs, so they must differ; leave them out to have them numbered",
            )
        seen[record.id] = number
    return records


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a data file; for Parquet the row number."""
    if path.suffix == ".parquet":
        yield from enumerate(_parquet_rows(path), start=1)
        return
    try:
        # Spreadsheets put a byte order mark before the header: "utf-8-sig" takes it away.
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _csv_rows(path, file) if path.suffix == ".csv" else _json_rows(path, file)
    except UnicodeDecodeError as exc:
        raise _not_utf8(path) from exc


def _not_utf8(path: Path) -> DataError:
    """The error for a file that is not UTF-8; it names the line, which the decoder does not know."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as exc:
                message = f"is not UTF-8 text ({exc.reason} at byte {exc.start} of the line)"
                return DataError(message, where=f"{path}:{number}", hint="save the file as UTF-8")
    return DataError("is not UTF-8 text", where=str(path), hint="save the file as UTF-8")


def _json_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as exc:
            raise DataError(f"is not JSON: {exc.msg} at column {exc.colno}", where=f"{path}:{number}") from exc
        except (ValueError, RecursionError) as exc:  # a number of thousands of digits, thousands of brackets
            raise DataError("is not JSON that can be read", where=f"{path}:{number}") from exc
        if not isinstance(row, dict):
            raise DataError(f"is a JSON {type(row).__name__}, not an object", where=f"{path}:{number}")
        yield number, row


def _csv_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(lines, strict=True)
    try:
        for row in reader:
            if None in row:
                raise DataError("has more cells than the header", where=f"{path}:{reader.line_num}", hint=_QUOTES)
            yield reader.line_num, _csv_row(row)
    except csv.Error as exc:
        raise DataError(f"is not CSV: {exc}", where=f"{path}:{reader.line_num + 1}", hint=_QUOTES) from exc


_QUOTES = "a text with commas, quotes or line ends stands in double quotes, and its own quotes are doubled"


def _csv_row(row: dict[str, Any]) -> dict[str, Any]:
    """CSV has only text: empty cells are absent, `choices` is a JSON list, `answer` a number."""
    given = {k: v for k, v in row.items() if v not in (None, "")}
    for key in ("choices", "answer", "messages"):
        if key in given:
            try:
                given[key] = json.loads(given[key])
            except (ValueError, RecursionError):
                continue  # the type check below names the field and the line
    return given


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from ({k: v for k, v in row.items() if v is not None} for row in batch.to_pylist())
    except (pa.ArrowException, OSError, UnicodeDecodeError) as exc:
        raise DataError(f"is not a Parquet file: {exc}".splitlines()[0], where=str(path)) from exc


def _record(row: dict[str, Any], layout: str, where: str, line: int) -> Record:
    prompt, response = _exchange(row, layout, where)
    choices = row.get("choices")
    if choices is not None and not (isinstance(choices, list) and len(choices) > 1 and all(map(_is_text, choices))):
        raise DataError("is not a list of two or more texts", where=f"{where}: choices")
    answer = row.get("answer") if choices else None
    if choices and not (isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices)):
        raise DataError(f"is not the 0-based index of one of the {len(choices)} choices", where=f"{where}: answer")
    question = row.get("question")
    if question is not None and not _is_text(question):
        raise DataError("is not text", where=f"{where}: question")
    for key in ("id", "task"):
        if key in row and not (isinstance(row[key], str | int) and _is_text(str(row[key]))):
            raise DataError("is not text", where=f"{where}: {key}")
        if len(str(row.get(key, ""))) > MAX_NAME:
            raise DataError(f"is longer than {MAX_NAME} characters", where=f"{where}: {key}")
    return Record(
        id=str(row.get("id", f"line-{line}")),
        task=str(row.get("task", "default")),
        prompt=prompt,
        response=response,
        question=question if choices else None,
        choices=tuple(choices or ()),
        answer=answer,
    )


def _exchange(row: dict[str, Any], layout: str, where: str) -> tuple[str | tuple[Message, ...], str]:
    """(prompt, response) of a row."""
    if layout == "auto":
        layout = "messages" if "messages" in row else "prompt-completion" if "completion" in row else "prompt-response"
    if layout == "messages":
        messages = _messages(row.get("messages"), f"{where}: messages")
        if len(messages) < 2 or messages[-1][0] != "assistant":
            raise DataError("must end with a message of the assistant, after another one", where=f"{where}: messages")
        return messages[:-1], messages[-1][1]
    key = "response" if layout == "prompt-response" else "completion"
    prompt, response = row.get("prompt"), row.get(key)
    if key == "completion" and isinstance(prompt, list):
        reply = _messages(response, f"{where}: completion")
        if len(reply) != 1 or reply[0][0] != "assistant":
            raise DataError("is not one message of the assistant", where=f"{where}: completion")
        return _messages(prompt, f"{where}: prompt"), reply[0][1]
    for name, value in (("prompt", prompt), (key, response)):
        if not _is_text(value):
            fault = "is missing" if value is None else "is not text"
            if isinstance(value, str):
                fault = "holds half of a surrogate pair" if value.strip() else "is empty"
            raise DataError(fault, where=f"{where}: {name}", hint=f"this record was read as {layout}")
    return str(prompt), str(response)


def _is_text(value: object) -> bool:
    """Not empty, and made of characters: JSON can spell half of a surrogate pair, which no encoding can write."""
    return isinstance(value, str) and bool(value.strip()) and not _SURROGATE.search(value)


def _messages(value: object, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise DataError("is not a list of messages", where=where)
    for message in value:
        if not isinstance(message, dict) or not _is_text(message.get("role")) or not _is_text(message.get("content")):
            raise DataError("holds a message without role and content as text", where=where)
    return tuple((str(m["role"]), str(m["content"])) for m in value)
