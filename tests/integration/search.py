"""All that a run leaves, searched for what must not be there: its folders, temporary folders, shared memory."""

from __future__ import annotations

import base64
import os
import secrets
import stat
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tests.unit.data.tiny_tokenizers import tiny_tokenizer

SHARED = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))  # noqa: S108  # looked into
_PIECE = 1 << 24


# What is looked for ---------------------------------------------------------------------------------------------------


def canary(name: str) -> str:
    """Text that no file holds yet, neither another session's nor a copy of these tests; always as many tokens."""
    return f"canary-{secrets.randbelow(10**6):06}-{name}"


def planted(rows: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The rows, the last of them with the text in its prompt and response."""
    last = {"id": rows[-1]["id"], "prompt": f"{text} prompt", "response": f"{text} response", "task": "answer"}
    return [*rows[:-1], last]


def forms(content: bytes) -> list[bytes]:
    """As it is, as hex, and as base64 wherever in a longer text it begins."""
    return [content, content.hex().encode(), *(base64.b64encode(bytes(n) + content)[4:-4] for n in range(3))]


def text_forms(text: str) -> list[bytes]:
    """Also as UTF-16, and as tokens in tensors of 2, 4 and 8 bytes and in lists; those at the ends may be others."""
    ids = tiny_tokenizer("bos")(text, add_special_tokens=False)["input_ids"][2:-1]
    assert len(ids) > 5
    tensors = [struct.pack(f"<{len(ids)}{kind}", *ids) for kind in "hiq"]
    return [*forms(text.encode()), text.encode("utf-16-le"), *tensors, str(ids)[1:-1].encode()]


def secrets_of(folder: Path, key: Path) -> dict[Path, bytes]:
    """What nobody but this party may have, by the file that holds it: its signing key, data keys, salts."""
    private = load_pem_private_key(key.read_bytes(), password=None)
    found = {path: path.read_bytes() for path in [*(folder / "bundles").glob("*.key"), *folder.glob("*.salt")]}
    assert {len(secret) for secret in found.values()} == {32}
    return {**found, key: private.private_bytes_raw()}  # type: ignore[union-attr]  # an Ed25519 key


def weights_of(adapter: Path) -> Iterator[bytes]:
    """Some stretches of the trained matrices as they lie in memory: six numbers that none repeats by chance."""
    for value in safetensors.numpy.load_file(adapter / "adapter_model.safetensors").values():
        flat = np.ascontiguousarray(value).reshape(-1)
        assert np.count_nonzero(flat[:6]) == 6
        yield flat[:6].tobytes()


# Where ----------------------------------------------------------------------------------------------------------------


def files_under(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def left_for_a_while(folder: Path) -> list[Path]:
    """Files and folders, at any depth, in folders for temporary files of the test's own commands."""
    return [path for temporary in folder.rglob("tmp") if temporary.is_dir() for path in temporary.rglob("*")]


def private_folders() -> set[Path]:
    """Folders in shared memory that enclaves of several processes have made, those of other programs' jobs too."""
    return set(Path("/dev/shm").glob("cloister-*"))  # noqa: S108  # looked into


def left_in_memory(before: set[Path]) -> set[Path]:
    """Private folders that were not there before and stay; those of jobs beside this test go when these end."""
    found, deadline = private_folders() - before, time.monotonic() + 120
    while any(path.exists() for path in found) and time.monotonic() < deadline:
        time.sleep(0.2)
    return {path for path in found if path.exists()}


def without(paths: Iterable[Path], *folders: Path) -> list[Path]:
    """Those that are none of these and lie in none of them."""
    return [path for path in paths if not {path, *path.parents} & set(folders)]


def left_elsewhere(since: float, *, besides: Path) -> list[Path]:
    """This user's files in folders that all programs share, at any depth, new or changed since this time.

    Args:
        besides: the test's own folder, which it searches itself.
    """
    found = []
    for folder, folders, names in (each for place in SHARED for each in os.walk(place)):
        if folder == str(besides):
            folders.clear()
            continue
        for path in (f"{folder}/{name}" for name in names):
            with suppress(FileNotFoundError):  # another program's, gone meanwhile
                is_ = os.lstat(path)
                if stat.S_ISREG(is_.st_mode) and is_.st_uid == os.geteuid() and is_.st_ctime > since - 1:
                    found.append(Path(path))
    return found


def holding(paths: Iterable[Path], *needles: bytes) -> list[Path]:
    """Those whose content has one of the needles."""
    return [path for path in paths if _holds(path, needles)]


def _holds(path: Path, needles: Sequence[bytes]) -> bool:
    """In pieces: what others leave in /tmp may be longer than memory."""
    before, overlap = b"", max(map(len, needles))
    with suppress(FileNotFoundError), path.open("rb") as file:
        while piece := file.read(_PIECE):
            seen = before + piece
            if any(needle in seen for needle in needles):
                return True
            before = seen[-overlap:]
    return False


def misplaced(paths: Iterable[Path], owned: Mapping[Path, bytes]) -> list[Path]:
    """Those that hold another file's secret, in any form. owned: secrets by the file that each belongs in."""
    needles = {own: forms(secret) for own, secret in owned.items()}
    return [path for path in paths if _holds(path, [n for own in owned if own != path for n in needles[own]])]


def core_dumps(paths: Iterable[Path]) -> list[Path]:
    """By content, since the system may give them any name: ELF files of type 4."""
    return [path for path in paths if _head(path)[:4] == b"\x7fELF" and _head(path)[16:] == b"\x04\x00"]


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(18)
