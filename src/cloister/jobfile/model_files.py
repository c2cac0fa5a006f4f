"""The files that make a model folder what it is, and their hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cloister.errors import ModelError

_BLOCK_BYTES = 1 << 20

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Any one of these makes a tokenizer."""

_PATTERNS = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "*.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
"""Everything that transformers may read from the folder to make model, tokenizer, chat template or generation rules.
A file outside this list (README, pickled weights) is never read by Cloister and so is not part of the job."""

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A complete model folder. `files` are names relative to it, sorted, with `/` between folders."""

    folder: Path
    files: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum((self.folder / name).stat().st_size for name in self.files)

    def digests(self, count: Callable[[int], object] = lambda _: None) -> dict[str, str]:
        """SHA-256 (hex) of each file by name, read in blocks; `count` is told the size of each block.

        Raises:
            ModelError: a file cannot be read.
        """
        return {name: self._digest(name, count) for name in self.files}

    def config(self) -> dict[str, object]:
        """The object in config.json.

        Raises:
            ModelError: it holds no JSON object.
        """
        return _json_object(self.folder / "config.json")

    def _digest(self, name: str, count: Callable[[int], object]) -> str:
        digest = hashlib.sha256()
        try:
            with (self.folder / name).open("rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
                    count(len(block))
        except OSError as exc:
            raise ModelError(f"cannot read {name}: {exc.strerror}", where=str(self.folder)) from exc
        return digest.hexdigest()


def find_model(folder: Path, *, where: str = "") -> ModelFiles:
    """Check that a folder holds a configuration, safetensors weights and a tokenizer.

    Args:
        where: the place in the job file that named the folder, for messages.

    Raises:
        ModelError: something is missing; the message says what.
    """
    where = where or str(folder)
    if not folder.is_dir():
        fault = "is a file, not a folder" if folder.exists() else "does not exist"
        hint = "paths are relative to the folder of the job file; models are never downloaded"
        raise ModelError(f"the model folder {fault}: {folder}", where=where, hint=hint)
    if not (folder / "config.json").is_file():
        hint = "give the folder that save_pretrained wrote"
        raise ModelError(f"the model folder has no config.json: {folder}", where=where, hint=hint)
    _json_object(folder / "config.json")
    _check_weights(folder, where)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        hint = "save the tokenizer beside the model: AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)"
        raise ModelError(f"the model folder has no tokenizer: {folder}", where=where, hint=hint)
    found = {path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return ModelFiles(folder=folder, files=tuple(sorted(path.relative_to(folder).as_posix() for path in found)))


def _check_weights(folder: Path, where: str) -> None:
    present = {path.name for path in folder.glob("*.safetensors")}
    if not present:
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        hint = "load it on a machine where you trust it and call save_pretrained(FOLDER, safe_serialization=True)"
        found = f"only {pickled[0]}, a pickle, which is never loaded" if pickled else "no weights at all"
        raise ModelError(
            f"the model folder has no .safetensors files but {found}: {folder}",
            where=where,
            hint=hint if pickled else "copy the weights into it",
        )
    for index in folder.glob("*.safetensors.index.json"):
        shards = _json_object(index).get("weight_map")
        needed = {str(shard) for shard in shards.values()} if isinstance(shards, dict) else set()
        if missing := sorted(needed - present):
            message = f"the model folder lacks {len(missing)} of {len(needed)} weight files, such as {missing[0]}"
            raise ModelError(f"{message}: {folder}", where=where, hint=f"{index.name} names them; copy them as well")


def _json_object(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ModelError(f"cannot read the file: {exc.strerror}", where=str(path)) from exc
    except ValueError as exc:
        raise ModelError(f"is not JSON: {exc}", where=str(path)) from exc
    if not isinstance(content, dict):
        raise ModelError("is not a JSON object", where=str(path))
    return content
