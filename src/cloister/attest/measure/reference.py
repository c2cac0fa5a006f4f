"""What a measurement of an image yields, and the policy text made from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

FROM_FIRST_BOOT = "take it from `cloister attest show` after a first boot that you trust"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Reference values of one image for one type of evidence."""

    type: str
    registers: Mapping[str, bytes]
    """What was computed, by register name."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Registers without which the others prove nothing but that the image does not determine; with the reason."""
    notes: tuple[str, ...] = ()
    """What the computed values assume, and what else is worth comparing."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "registers", MappingProxyType(dict(self.registers)))
        object.__setattr__(self, "missing", MappingProxyType(dict(self.missing)))

    def to_toml(self, label: str) -> str:
        """The [[measurement]] table. A missing register stands there as text that no policy accepts as a value."""
        lines = [f"# {line}" for note in self.notes for line in note.split("\n")]
        lines += ["[[measurement]]", f"label = {json.dumps(label)}", f'type = "{self.type}"', "[measurement.registers]"]
        lines += [f'{name} = "{value.hex()}"' for name, value in self.registers.items()]
        lines += [f"{name} = {json.dumps('MISSING: ' + reason)}" for name, reason in self.missing.items()]
        return "\n".join(lines) + "\n"

    def to_policy(self, label: str) -> str:
        """A whole policy that accepts this image and nothing else."""
        return f'[policy]\naccept = ["{self.type}"]\n\n{self.to_toml(label)}'


def extend(register: bytes, digest: bytes, *, algorithm: str) -> bytes:
    """One extend operation of a TPM or a TDX runtime register: hash(old value || digest)."""
    return hashlib.new(algorithm, register + digest).digest()


def replay(digests: list[bytes], *, algorithm: str) -> bytes:
    """The value of a register that starts at zero after these digests were extended into it."""
    value = bytes(hashlib.new(algorithm).digest_size)
    for digest in digests:
        value = extend(value, digest, algorithm=algorithm)
    return value
