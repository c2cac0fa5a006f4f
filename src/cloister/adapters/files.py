"""An adapter as files: the names of a PEFT folder, its identity, and writing it. Needs neither torch nor PEFT."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from cloister.adapters.registry import TunerType

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX_TYPES = (TunerType.PTUNING, "PREFIX_TUNING")
"""What a configuration of prefixes has for `peft_type`: our tuner's, and PEFT's own."""


def can_merge(files: Mapping[str, bytes]) -> bool:
    """Whether the adapter is a change of weights; prefixes are not."""
    return json.loads(files[CONFIG]).get("peft_type") not in PREFIX_TYPES


def adapter_sha256(files: Mapping[str, bytes]) -> str:
    """SHA-256 over the canonical configuration and the weights, hex. The base model's local path is left out."""
    config = json.loads(files[CONFIG])
    config.pop("base_model_name_or_path", None)
    digest = hashlib.sha256()
    for part in (json.dumps(config, sort_keys=True, separators=(",", ":")).encode(), files[WEIGHTS]):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


def file_hashes(files: Mapping[str, bytes]) -> dict[str, str]:
    """SHA-256 (hex) of each file's bytes by name: what a receipt vouches for, local path and all."""
    return {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files)}


def write_adapter(files: Mapping[str, bytes], folder: Path) -> None:
    """Write a PEFT folder; existing files are replaced whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        part = folder / f".{name}.part"
        part.write_bytes(content)
        part.replace(folder / name)
