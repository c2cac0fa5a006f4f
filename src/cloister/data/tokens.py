"""Records to documents of tokens, with the targets that carry loss or are scored.

A document is a small tree: a root and branches that continue it. A training document has one branch, the response.
A test record with choices has one branch per choice, so that the prompt runs through the model once, not once per
choice. A target says: the token at `target_pos` predicts `target_id`, for the account of group `target_group`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from cloister.data.records import Message, Record
from cloister.errors import DataError, ModelError
from cloister.job import DataSection

Ints = NDArray[np.int64]
RESPONSE = -1
"""The role of a group that scores the record's response; choices have the roles 0, 1, 2, ..."""

_REPLY = "<the reply goes here>"
"""Rendered in place of a reply, to see where a chat template puts it."""


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


class _Text(NamedTuple):
    """One root + branch as text."""

    root: str
    """With what separates it from the branch."""
    branch: str
    end: str
    """What follows the branch: "" where the end-of-text token is to be added."""
    prompt: tuple[int, int]
    """Where in `root` the prompt lies, in characters: truncation drops from it first."""
    chat: bool
    """A chat template has already put in every special token."""
    where: str


@dataclass(frozen=True)
class _Path:
    """One root + branch as tokens."""

    ids: list[int]
    specials: int
    """Leading tokens that stand for no text (a begin-of-text token); they survive truncation."""
    prompt: range
    """Indices of the tokens of the prompt."""
    first: int
    """Index of the first token of the branch."""
    end: int
    """Index after the last token of scored text; from here on only training looks (end-of-text)."""
    text: str
    """The scored text, without what separates it from the root."""
    text_ends: tuple[int, ...]
    """For each scored token, how many characters of `text` end with it."""

    @property
    def branch_size(self) -> int:
        return len(self.ids) - self.first

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
        paths = self._paths([self._text(r, r.prompt, r.response) for r in records])
        documents = []
        for index, path in enumerate(paths):
            fitted = self._fit([path])
            self._count([path], fitted)
            documents.append(_tree(fitted, [(index, RESPONSE)]))
        return documents

    def scoring(self, records: Sequence[Record], *, choices: bool) -> tuple[list[Document], list[Example]]:
        """Documents whose groups account for each response and, with `choices`, each choice."""
        texts: list[_Text] = []
        plan: list[list[tuple[int, int]]] = []  # per record: (index into texts, role)
        for record in records:
            question = _question(record)
            options = record.choices if choices else ()
            joint = bool(options) and question == record.prompt
            twin = options.index(record.response) if joint and record.response in options else RESPONSE
            first = len(texts)
            if twin == RESPONSE:
                texts.append(self._text(record, record.prompt, record.response))
            texts += [self._text(record, question, option) for option in options]
            roles = ([RESPONSE] if twin == RESPONSE else []) + list(range(len(options)))
            plan.append(list(zip(range(first, len(texts)), roles, strict=True)))
        # End-of-text is not scored: it need not be there.
        paths = [replace(p, ids=p.ids[: p.end]) for p in self._paths(texts)]
        documents: list[Document] = []
        examples = []
        for index, (record, branches) in enumerate(zip(records, plan, strict=True)):
            fitted: dict[int, _Path] = {}
            for tree in _by_root(branches, texts):
                for (_, role), path in zip(tree, self._fit([paths[t] for t, _ in tree]), strict=True):
                    fitted[role] = path
                documents += self._trees([(fitted[role], (index, role)) for _, role in tree])
            self._count([paths[t] for t, _ in branches], [fitted[role] for _, role in branches])
            examples.append(_example(record, fitted))
        return documents, examples

    # Texts ----------------------------------------------------------------------------------------------------------

    def _text(self, record: Record, prompt: str | tuple[Message, ...], branch: str) -> _Text:
        where = f"record {record.id}"
        if not isinstance(prompt, str):
            return self._chat_text(prompt, branch, where)
        template = self.settings.template or "{prompt} {response}"
        before, _, end = template.partition("{response}")
        start = before.index("{prompt}")
        span = (start, start + len(prompt))
        return _Text(before.replace("{prompt}", prompt), branch, end, prompt=span, chat=False, where=where)

    def _chat_text(self, conversation: tuple[Message, ...], branch: str, where: str) -> _Text:
        asked = self._render(conversation, where, add_generation_prompt=True)
        root, _, end = self._render((*conversation, ("assistant", _REPLY)), where).partition(_REPLY)
        whole = self._render((*conversation, ("assistant", branch)), where)
        # Many templates take white space from both ends of a message.
        branch = branch if whole == root + branch + end else branch.strip()
        if whole != root + branch + end or not root.startswith(asked):
            raise ModelError(
                "the chat template does not render a conversation as its prompt followed by the reply",
                where=where,
                hint="give prompt and response as text instead",
            )
        messages = self._render(conversation, where)
        span = (0, len(messages) if root.startswith(messages) else len(root))
        return _Text(root, branch, end, prompt=span, chat=True, where=where)

    def _render(self, conversation: tuple[Message, ...], where: str, *, add_generation_prompt: bool = False) -> str:
        if self.tokenizer.chat_template is None:
            raise ModelError("the tokenizer has no chat template, but the data are messages", where=where)
        messages = [{"role": role, "content": content} for role, content in conversation]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as exc:
            raise DataError(f"the chat template refuses the messages: {exc}", where=where) from exc
        return str(text)

    # Tokens ---------------------------------------------------------------------------------------------------------

    def _paths(self, texts: list[_Text]) -> list[_Path]:
        paths: dict[int, _Path] = {}
        for chat in (False, True):
            chosen = [i for i, text in enumerate(texts) if text.chat == chat]
            if not chosen:
                continue
            encoded = self.tokenizer(
                [texts[i].root + texts[i].branch + texts[i].end for i in chosen],
                add_special_tokens=not chat,
                return_offsets_mapping=True,
            )
            for index, ids, offsets in zip(chosen, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                paths[index] = _path(ids, offsets, texts[index], self.tokenizer)
        return [paths[i] for i in range(len(texts))]

    def _fit(self, paths: list[_Path]) -> list[_Path]:
        """Truncate paths that share a root to `max_tokens`, all to the same root."""
        # A quarter of the context is left to the prompt when a response alone would fill it.
        least = max(self.max_tokens // 4, paths[0].specials + 1)
        room = self.max_tokens - min(least, *(p.first for p in paths))
        paths = [_shorten_branch(p, room) for p in paths]
        drop = max(p.first for p in paths) + max(p.branch_size for p in paths) - self.max_tokens
        return [_shorten_root(p, drop, self.settings.truncation) for p in paths]

    def _count(self, whole: list[_Path], fitted: list[_Path]) -> None:
        """Take note of one record."""
        pairs = list(zip(whole, fitted, strict=True))
        self.truncated.prompts += any(f.first < w.first for w, f in pairs)
        self.truncated.responses += any(f.branch_size < w.branch_size for w, f in pairs)

    def _trees(self, branches: list[tuple[_Path, tuple[int, int]]]) -> list[Document]:
        """As few trees of at most `max_tokens` as the branches need, filled in order."""
        trees: list[list[tuple[_Path, tuple[int, int]]]] = [[]]
        for branch in branches:
            candidate = [*trees[-1], branch]
            if trees[-1] and _tree_size([p for p, _ in candidate]) > self.max_tokens:
                trees.append([branch])
            else:
                trees[-1] = candidate
        return [_tree([p for p, _ in tree], [g for _, g in tree]) for tree in trees]


def _question(record: Record) -> str | tuple[Message, ...]:
    """What the choices of a record answer."""
    if record.question is None:
        return record.prompt
    return record.question if isinstance(record.prompt, str) else (("user", record.question),)


def _by_root(branches: list[tuple[int, int]], texts: list[_Text]) -> list[list[tuple[int, int]]]:
    """Branches grouped by their root text, in order."""
    groups: dict[str, list[tuple[int, int]]] = {}
    for text, role in branches:
        groups.setdefault(texts[text].root, []).append((text, role))
    return list(groups.values())


def _tree(paths: list[_Path], groups: list[tuple[int, int]]) -> Document:
    root = _root_size(paths)
    ids, positions, branch = list(paths[0].ids[:root]), list(range(root)), [0] * root
    targets: list[tuple[int, int, int]] = []
    for number, path in enumerate(paths):
        # NOTE: a path without any token before its branch cannot predict the branch's first token.
        start = len(ids) - root  # where path index i lies in the tree: i in the root, start + i in the branch
        for index in range(max(path.first, 1), len(path.ids)):
            before = index - 1
            targets.append((before if before < root else start + before, path.ids[index], number))
        tail = path.ids[root:]
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


def _path(ids: list[int], offsets: list[tuple[int, int]], text: _Text, tokenizer: PreTrainedTokenizerBase) -> _Path:
    """Cut a tokenised text at the end of its root and of its branch, and end it with end-of-text."""
    root_end = len(text.root)
    branch_end = root_end + len(text.branch)
    while len(ids) > 1 and offsets[-1][1] == 0:  # a special token that the tokenizer itself appends
        ids, offsets = ids[:-1], offsets[:-1]
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    bos = tokenizer.bos_token_id
    specials = _first(len(ids), lambda i: ends[i] > 0 and ids[i] != bos)
    first = _first(len(ids), lambda i: ends[i] > root_end)
    # Some tokenizers trim white space from offsets: the branch's last blank then spans nothing, at its end.
    end = _first(len(ids), lambda i: i >= first and starts[i] >= branch_end < ends[i])
    if first == end:
        raise DataError(
            "a response or choice has no token of its own",
            where=text.where,
            hint="check the tokenizer and the template",
        )
    # The separator may be a token of its own or the beginning of the branch's first one: it is predicted either way.
    visible_end = len(text.root.rstrip())
    while first > specials and starts[first - 1] >= visible_end:
        first -= 1
    prompt_start = _first(first, lambda i: i >= specials and ends[i] > text.prompt[0])
    prompt_end = _first(first, lambda i: i >= prompt_start and ends[i] > text.prompt[1])
    return _Path(
        ids=ids if text.end else [*ids, int(tokenizer.eos_token_id)],
        specials=specials,
        prompt=range(prompt_start, prompt_end),
        first=first,
        end=end,
        text=text.branch,
        text_ends=tuple(min(max(e - root_end, 0), len(text.branch)) for e in ends[first:end]),
    )


def _first(count: int, fits: Callable[[int], bool]) -> int:
    """The first index below `count` that fits, else `count`."""
    return next((i for i in range(count) if fits(i)), count)


def _shorten_branch(path: _Path, room: int) -> _Path:
    """Keep the first `room` tokens of the branch."""
    length = min(len(path.ids), path.first + room)
    end = min(path.end, length)
    return replace(path, ids=path.ids[:length], end=end, text_ends=path.text_ends[: end - path.first])


def _shorten_root(path: _Path, drop: int, side: str) -> _Path:
    """Drop tokens from the root: first those of the prompt, from its `side`, then those around it.

    One token stays in any case, for the branch's first one to be predicted from.
    """
    drop = max(0, min(drop, path.first - max(path.specials, 1)))
    prompt = path.prompt if side == "left" else path.prompt[::-1]
    order = [*prompt, *range(path.specials, path.prompt.start), *range(path.prompt.stop, path.first)]
    gone = set(order[:drop])
    ids = [token for index, token in enumerate(path.ids) if index not in gone]
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
    return root + sum(len(p.ids) - root for p in paths)
