"""Where each key of a TOML text stands.

`tomllib` gives values without positions; an error message needs the line. This index walks a text that `tomllib` has
already accepted, so it only has to tell headers, keys and the ends of values apart, not to validate them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

Path = tuple[str | int, ...]

_KEY = re.compile(r"""[ \t]*([A-Za-z0-9_-]+|"(?:\\.|[^"\\])*"|'[^']*')[ \t]*""")
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)+")
_VALUE_TOKEN = re.compile(
    r"""(?s)"{3}(?:\\.|[^\\])*?"{3,5}|'{3}.*?'{3,5}|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|\#[^\n]*|[\[\]{}]|\n|."""
)


@dataclass(frozen=True, kw_only=True)
class LineIndex:
    """Line numbers (from 1) by key path; a path such as ("party", 2, "name") counts array tables from 0."""

    lines: dict[Path, int] = field(default_factory=dict)

    def find(self, path: Path) -> int | None:
        """Line of `path`, or of the nearest table or key around it, or None when even its table is not in the text."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return self.lines[path[:length]]
        return None


def index_lines(text: str) -> LineIndex:
    """Index a text that `tomllib.loads` accepts. Keys inside inline tables are found at the line of their table."""
    lines: dict[Path, int] = {}
    counts: dict[Path, int] = {}
    table: Path = ()
    at = 0
    while at < len(text):
        if blank := _BLANK.match(text, at):
            at = blank.end()
            continue
        line = text.count("\n", 0, at) + 1
        if text[at] == "[":
            table, at = _header(text, at, counts)
            lines.setdefault(table, line)
        else:
            keys, at = _keys(text, at)
            for length in range(1, len(keys) + 1):
                lines.setdefault(table + keys[:length], line)
            at = _end_of_value(text, at + 1)
    return LineIndex(lines=lines)


def _header(text: str, at: int, counts: dict[Path, int]) -> tuple[Path, int]:
    """Path of the table that the header at `at` opens, and where the header ends."""
    is_array = text.startswith("[[", at)
    keys, at = _keys(text, at + (2 if is_array else 1))
    path: Path = ()
    for position, key in enumerate(keys):
        path = (*path, key)
        if is_array and position == len(keys) - 1:
            counts[path] = counts.get(path, -1) + 1
        if path in counts:
            path = (*path, counts[path])
    return path, at + (2 if is_array else 1)


def _keys(text: str, at: int) -> tuple[Path, int]:
    """A dotted key and the position of what follows it (`=` or `]`)."""
    keys: Path = ()
    while match := _KEY.match(text, at):
        word = match.group(1)
        keys = (*keys, json.loads(word) if word[0] == '"' and "\\" not in word else word.strip("'\""))
        at = match.end()
        if text[at : at + 1] != ".":
            break
        at += 1
    return keys, at


def _end_of_value(text: str, at: int) -> int:
    """Position after the value that starts at `at`: the first line end outside strings and brackets."""
    depth = 0
    for token in _VALUE_TOKEN.finditer(text, at):
        word = token.group()
        if word == "\n" and depth == 0:
            return token.end()
        depth += (word in "[{") - (word in "]}")
    return len(text)
