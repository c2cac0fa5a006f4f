"""Records to documents of tokens, with the targets that carry loss or are scored.

A document is a small tree: a root and branches that continue it. A training document has one branch, the response.
A test record with choices has one branch per choice, so that the prompt runs through the model once, not once per
choice. A target says: the token at `target_pos` predicts `target_id`, for the account of group `target_group`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from cloister.data.records import Record
from cloister.errors import DataError, ModelError
from cloister.job import DataSection

Ints = NDArray[np.int64]
RESPONSE = -1
"""The role of a group that scores the record's response; choices have the roles 0, 1, 2, ..."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """Tokens of one tree (T) and what they predict (N). `groups` are (example, role) pairs that targets refer to."""

    id_T: Ints
    position_T: Ints
    branch_T: Ints
    target_pos_N: Ints
    target_id_N: Ints
    target_group_N: Ints
    groups: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.id_T)


@dataclass(frozen=True, kw_only=True)
class Example:
    """What must be known of a test record to score it: byte counts of its texts and which choice is right."""

    id: str
    task: str
    response_bytes: int
    response_role: int
    """RESPONSE, or the choice whose text is the response (its branch then serves both)."""
    choice_bytes: tuple[int, ...] = ()
    answer: int = -1


@dataclass
class Truncation:
    """How many records did not fit `max_tokens`, and which part was dropped."""

    prompts: int = 0
    responses: int = 0

    def __str__(self) -> str:
        return f"{self.prompts} prompts and {self.responses} responses truncated"


@dataclass(frozen=True)
class _Path:
    """One root + branch as tokens."""

    ids: list[int]
    specials: int
    """Leading tokens that stand for no text (a begin-of-text token); they survive truncation."""
    first: int
    """Index of the first token of the branch."""
    end: int
    """Index after the last token of scored text; from here on only training looks (end-of-text)."""
    text: str
    """The scored text, without what separates it from the root."""
    text_ends: tuple[int, ...]
    """For each scored token, how many characters of `text` end with it."""

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the scored text that is still there."""
        return len(self.text[: self.text_ends[-1]].encode())


@dataclass(kw_only=True)
class Encoder:
    """Turns records into documents for one job."""

    tokenizer: PreTrainedTokenizerBase
    settings: DataSection
    max_tokens: int
    truncated: Truncation = field(default_factory=Truncation)

    def training(self, records: Sequence[Record]) -> list[Document]:
        """One document per record; every token of the response and the end-of-text token is a target."""
        paths = self._paths([self._texts(r, self._prompt(r), r.response) for r in records])
        return [self._tree([self._fit([path])[0]], [(i, RESPONSE)], scored_only=False) for i, path in enumerate(paths)]

    def scoring(self, records: Sequence[Record], *, choices: bool) -> tuple[list[Document], list[Example]]:
        """Documents whose groups account for each response and, with `choices`, each choice."""
        texts: list[tuple[str, str, str]] = []
        plan: list[list[tuple[int, int]]] = []  # per tree: (index into texts, role)
        for record in records:
            prompt = self._prompt(record)
            question = record.question or prompt
            options = record.choices if choices else ()
            joint = bool(options) and question == prompt
            twin = options.index(record.response) if joint and record.response in options else RESPONSE
            first = len(texts)
            if twin == RESPONSE:
                texts.append(self._texts(record, prompt, record.response))
            texts += [self._texts(record, question, option) for option in options]
            roles = ([RESPONSE] if twin == RESPONSE else []) + list(range(len(options)))
            branches = list(zip(range(first, len(texts)), roles, strict=True))
            plan.append(branches)
        paths = self._paths(texts)
        documents: list[Document] = []
        examples = []
        for index, (record, branches) in enumerate(zip(records, plan, strict=True)):
            fitted: dict[int, _Path] = {}
            for tree in self._by_root(branches, texts):
                for (_, role), path in zip(tree, self._fit([paths[t] for t, _ in tree]), strict=True):
                    fitted[role] = path
                documents += self._trees([(fitted[role], (index, role)) for _, role in tree])
            examples.append(_example(record, fitted))
        return documents, examples

    # Texts ----------------------------------------------------------------------------------------------------------

    def _prompt(self, record: Record) -> str:
        if isinstance(record.prompt, str):
            return record.prompt
        if self.tokenizer.chat_template is None:
            raise ModelError(
                "the tokenizer has no chat template, but the data are messages", where=f"record {record.id}"
            )
        messages = [{"role": m[0], "content": m[1]} for m in record.prompt]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _texts(self, record: Record, prompt: str, branch: str) -> tuple[str, str, str]:
        """(root with its separator, branch, end) texts."""
        if not isinstance(record.prompt, str):
            return self._chat_texts(record, prompt, branch)
        if self.settings.template is None:
            return prompt + " ", branch, ""
        start = self.settings.template.index("{response}")
        before, after = self.settings.template[:start], self.settings.template[start + len("{response}") :]
        return before.replace("{prompt}", prompt), branch, after

    def _chat_texts(self, record: Record, prompt: str, branch: str) -> tuple[str, str, str]:
        messages = [{"role": m[0], "content": m[1]} for m in (*record.prompt, ("assistant", branch))]
        whole = str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        body = whole.removeprefix(prompt)
        if not whole.startswith(prompt) or branch not in body:
            raise ModelError(
                "the chat template does not render a conversation as its prompt followed by the reply",
                where=f"record {record.id}",
                hint="give prompt and response as text instead",
            )
        start = body.index(branch)
        return prompt + body[:start], branch, body[start + len(branch) :]

    # Tokens ---------------------------------------------------------------------------------------------------------

    def _paths(self, texts: list[tuple[str, str, str]]) -> list[_Path]:
        if not texts:
            return []
        chat = bool(texts[0][2]) and self.settings.template is None
        encoded = self.tokenizer(
            ["".join(parts) for parts in texts], add_special_tokens=not chat, return_offsets_mapping=True
        )
        rows = zip(encoded["input_ids"], encoded["offset_mapping"], texts, strict=True)
        return [_path(ids, offsets, parts, self.tokenizer.eos_token_id) for ids, offsets, parts in rows]

    def _fit(self, paths: list[_Path]) -> list[_Path]:
        """Truncate paths that share a root to `max_tokens`, all to the same root."""
        longest_branch = max(len(p.ids) - p.first for p in paths)
        # A quarter of the context is left to the prompt when a response alone would fill it.
        room = self.max_tokens - min(paths[0].first, self.max_tokens // 4)
        if longest_branch > room:
            self.truncated.responses += sum(len(p.ids) - p.first > room for p in paths)
            paths = [_shorten_branch(p, room) for p in paths]
            longest_branch = room
        root_room = self.max_tokens - longest_branch
        if max(p.first for p in paths) > root_room:
            self.truncated.prompts += 1
            paths = [_shorten_root(p, root_room, self.settings.truncation) for p in paths]
        return paths

    def _by_root(
        self, branches: list[tuple[int, int]], texts: list[tuple[str, str, str]]
    ) -> list[list[tuple[int, int]]]:
        """Branches grouped by their root text, in order."""
        groups: dict[str, list[tuple[int, int]]] = {}
        for text, role in branches:
            groups.setdefault(texts[text][0], []).append((text, role))
        return list(groups.values())

    def _trees(self, branches: list[tuple[_Path, tuple[int, int]]]) -> list[Document]:
        """As few trees of at most `max_tokens` as the branches need, filled in order."""
        trees: list[list[tuple[_Path, tuple[int, int]]]] = [[]]
        for branch in branches:
            candidate = [*trees[-1], branch]
            if trees[-1] and _tree_size([p for p, _ in candidate]) > self.max_tokens:
                trees.append([branch])
            else:
                trees[-1] = candidate
        return [self._tree([p for p, _ in tree], [g for _, g in tree], scored_only=True) for tree in trees]

    def _tree(self, paths: list[_Path], groups: list[tuple[int, int]], *, scored_only: bool) -> Document:
        root = _root_size(paths)
        ids, positions, branch = list(paths[0].ids[:root]), list(range(root)), [0] * root
        targets: list[tuple[int, int, int]] = []
        for number, path in enumerate(paths):
            # NOTE: a path without any token before its branch cannot predict the branch's first token.
            stop = path.end if scored_only else len(path.ids)
            start = len(ids) - root  # where path index i lies in the tree: i in the root, start + i in the branch
            for index in range(max(path.first, 1), stop):
                before = index - 1
                targets.append((before if before < root else start + before, path.ids[index], number))
            tail = path.ids[root:stop]
            ids += tail
            positions += range(root, root + len(tail))
            branch += [number + 1] * len(tail)
        if not targets:
            raise DataError("a response of one token without any prompt cannot be predicted", where=f"{groups}")
        pos, target, group = (np.array(column, dtype=np.int64) for column in zip(*targets, strict=True))
        return Document(
            id_T=np.array(ids, dtype=np.int64),
            position_T=np.array(positions, dtype=np.int64),
            branch_T=np.array(branch, dtype=np.int64),
            target_pos_N=pos,
            target_id_N=target,
            target_group_N=group,
            groups=tuple(groups),
        )


def _example(record: Record, fitted: dict[int, _Path]) -> Example:
    response_role = RESPONSE if RESPONSE in fitted else record.choices.index(record.response)
    response = fitted[response_role]
    choices = record.choices if len(fitted) > 1 else ()
    return Example(
        id=record.id,
        task=record.task,
        response_bytes=response.bytes,
        response_role=response_role,
        choice_bytes=tuple(fitted[k].bytes for k in range(len(choices))),
        answer=record.answer if choices and record.answer is not None else -1,
    )


def _path(ids: list[int], offsets: list[tuple[int, int]], texts: tuple[str, str, str], eos: int) -> _Path:
    """Cut a tokenised text at the end of its root and of its branch, and end it with end-of-text."""
    root_end = len(texts[0])
    branch_end = root_end + len(texts[1])
    while len(ids) > 1 and offsets[-1][1] == 0:  # a special token that the tokenizer itself appends
        ids, offsets = ids[:-1], offsets[:-1]
    specials = next((i for i, (_, end) in enumerate(offsets) if end > 0), len(ids))
    # The separator may be a token of its own or the beginning of the branch's first one: it is predicted either way.
    visible_end = len(texts[0].rstrip())
    first = next((i for i, (_, end) in enumerate(offsets) if end > visible_end), len(ids))
    end = next((i for i, (start, _) in enumerate(offsets) if i >= first and start >= branch_end), len(ids))
    if first == end:
        raise DataError("a response or choice has no token of its own", hint="check the tokenizer and the template")
    text_ends = tuple(min(max(e - root_end, 0), len(texts[1])) for _, e in offsets[first:end])
    ids = [*ids, eos] if not texts[2] else ids
    return _Path(ids=ids, specials=specials, first=first, end=end, text=texts[1], text_ends=text_ends)


def _shorten_branch(path: _Path, room: int) -> _Path:
    dropped = len(path.ids) - path.first - room
    if dropped <= 0:
        return path
    length = len(path.ids) - dropped
    end = min(path.end, length)
    return replace(path, ids=path.ids[:length], end=end, text_ends=path.text_ends[: end - path.first])


def _shorten_root(path: _Path, room: int, side: str) -> _Path:
    drop = path.first - room
    if drop <= 0:
        return path
    kept = slice(path.specials + drop, path.first) if side == "left" else slice(path.specials, path.first - drop)
    ids = [*path.ids[: path.specials], *path.ids[kept], *path.ids[path.first :]]
    return replace(path, ids=ids, first=path.first - drop, end=path.end - drop)


def _root_size(paths: list[_Path]) -> int:
    """Tokens that all paths share before any of them begins to be scored."""
    size = min(p.first for p in paths)
    for index in range(size):
        if any(p.ids[index] != paths[0].ids[index] for p in paths[1:]):
            return index
    return size


def _tree_size(paths: list[_Path]) -> int:
    root = _root_size(paths)
    return root + sum(p.end - root for p in paths)
