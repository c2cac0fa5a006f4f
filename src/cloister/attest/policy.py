"""The appraisal policy: what a relying party accepts. Default deny; unknown keys are errors.

    [policy]
    accept = ["tdx"]              # types of evidence; an empty list accepts nothing
    max_age_s = 300               # how old dated evidence may be
    measurements = "listed"       # or "any": the workload is then NOT checked

    [[measurement]]               # a reference value; one must match
    label = "cloister 0.1"
    type = "tdx"
    registers = { mr_td = "hex", rtmr1 = "hex" }   # every register named here must be equal

    [tdx]                         # rules of one type, see `attest.rules`: tdx, sgx, sev-snp, tpm, nvidia-gpu
    statuses = ["UpToDate"]

`simulated` evidence needs `insecure_simulated = true` here, and permission from the caller as well.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from cloister.attest.rules import RULE_TABLES, RuleTables
from cloister.crypto.encoding import encode
from cloister.errors import JobError

VERSION = 1
MAX_POLICY_BYTES = 1 << 20
SIMULATED = "simulated"

_POLICY_KEYS = ("accept", "insecure_simulated", "max_age_s", "measurements")
_MEASUREMENT_KEYS = ("label", "type", "registers")
_AZURE_ANCHORS = {"snp_measurement", "snp_id_key_digest"}
_TYPE = re.compile(r"[a-z][a-z0-9-]{0,31}")
_HEX = re.compile(r"([0-9a-fA-F]{2}){1,64}")


@dataclass(frozen=True, kw_only=True)
class ReferenceValue:
    """A measurement that the policy accepts."""

    label: str
    type: str
    registers: Mapping[str, bytes]
    """At least one; all of them must be equal to the report's."""

    def __post_init__(self) -> None:
        if not self.registers:
            raise ValueError("a reference value needs at least one register")
        if self.type == "azure-vtpm" and not _AZURE_ANCHORS & self.registers.keys():
            # The PCRs are a virtual TPM's: they mean nothing unless the program that emulates it is pinned too.
            raise ValueError(f"a measurement of type azure-vtpm must name {' or '.join(sorted(_AZURE_ANCHORS))}")
        object.__setattr__(self, "registers", MappingProxyType(dict(self.registers)))


@dataclass(frozen=True, kw_only=True)
class AppraisalPolicy:
    """An immutable policy. The default value accepts nothing."""

    accept: tuple[str, ...] = ()
    insecure_simulated: bool = False
    max_age_s: int = 300
    any_measurement: bool = False
    reference_values: tuple[ReferenceValue, ...] = ()
    rules: RuleTables = field(default_factory=RuleTables)

    def __post_init__(self) -> None:
        if SIMULATED in self.accept and not self.insecure_simulated:
            raise ValueError("accepting simulated evidence needs insecure_simulated = true")
        if not 1 <= self.max_age_s < 2**31:
            raise ValueError(f"max_age_s must be from 1 to {2**31 - 1}")
        if self.any_measurement and self.reference_values:
            raise ValueError('measurements = "any" and [[measurement]] exclude each other')

    @classmethod
    def insecure_simulated_only(cls, measurement: bytes | None = None) -> AppraisalPolicy:
        """For tests and runs on one machine: simulated evidence, of one measurement or of any. Protects nothing."""
        values = () if measurement is None else (
            ReferenceValue(label="simulated", type=SIMULATED, registers={"source": measurement}),
        )  # fmt: skip
        return cls(
            accept=(SIMULATED,), insecure_simulated=True, any_measurement=measurement is None, reference_values=values
        )

    @classmethod
    def load(cls, path: Path | str) -> AppraisalPolicy:
        """Read a policy file. Raises: JobError naming file and field."""
        path = Path(path)
        try:
            with path.open("rb") as file:
                data = file.read(MAX_POLICY_BYTES + 1)
        except OSError as exc:
            raise JobError(f"cannot read the policy: {exc.strerror}", where=str(path)) from exc
        if len(data) > MAX_POLICY_BYTES:
            raise JobError(f"the policy is longer than {MAX_POLICY_BYTES} bytes", where=str(path))
        try:
            text = data.decode()
        except UnicodeDecodeError as exc:
            raise JobError("the policy is not UTF-8 text", where=str(path)) from exc
        return cls.from_toml(text, where=str(path))

    @classmethod
    def from_toml(cls, text: str, *, where: str = "policy") -> AppraisalPolicy:
        """Parse a policy's text. Raises: JobError naming `where` and the field."""
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as exc:
            raise JobError(f"not valid TOML: {exc}", where=where) from exc
        _refuse_unknown(table, ("policy", "measurement", *RULE_TABLES), where)
        policy = _expect(table.get("policy"), dict, f"{where}: [policy]")
        _refuse_unknown(policy, _POLICY_KEYS, f"{where}: [policy]")
        measurements = _expect(table.get("measurement", []), list, f"{where}: [[measurement]]")
        choice = policy.get("measurements", "listed")
        if choice not in ("any", "listed"):
            raise JobError('must be "any" or "listed"', where=f"{where}: policy.measurements")
        try:
            return cls(
                accept=_types(policy.get("accept"), f"{where}: policy.accept"),
                insecure_simulated=_expect(
                    policy.get("insecure_simulated", False), bool, f"{where}: policy.insecure_simulated"
                ),
                max_age_s=_expect(policy.get("max_age_s", 300), int, f"{where}: policy.max_age_s"),
                any_measurement=choice == "any",
                reference_values=tuple(
                    _reference_value(m, f"{where}: measurement {i + 1}") for i, m in enumerate(measurements)
                ),
                rules=_rules(table, where),
            )
        except ValueError as exc:
            raise JobError(str(exc), where=f"{where}: [policy]") from exc

    def to_bytes(self) -> bytes:
        """Canonical CBOR: equal policies have equal bytes, whatever their files looked like."""
        return encode(
            {
                "version": VERSION,
                "accept": sorted(set(self.accept)),
                "insecure_simulated": self.insecure_simulated,
                "max_age_s": self.max_age_s,
                "any_measurement": self.any_measurement,
                "measurements": sorted(
                    ({"label": v.label, "type": v.type, "registers": dict(v.registers)} for v in self.reference_values),
                    key=encode,
                ),
                "rules": self.rules.model_dump(mode="json", by_alias=True),
            }
        )

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of `to_bytes`: the policy's identity in job, manifest and receipt."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def _rules(table: Mapping[str, Any], where: str) -> RuleTables:
    given = {name: table[name] for name in RULE_TABLES if name in table}
    try:
        # As JSON: a TOML array then becomes a tuple, and nothing else is converted.
        return RuleTables.model_validate_json(json.dumps(given, default=str))
    except ValidationError as exc:
        fault = exc.errors()[0]
        section, *keys = (str(part) for part in fault["loc"])
        message = "unknown key" if fault["type"] == "extra_forbidden" else fault["msg"]
        raise JobError(message, where=f"{where}: [{section}] {'.'.join(keys)}".rstrip()) from exc


def _reference_value(table: Any, where: str) -> ReferenceValue:
    table = _expect(table, dict, where)
    _refuse_unknown(table, _MEASUREMENT_KEYS, where)
    registers = _expect(table.get("registers"), dict, f"{where}.registers")
    if not registers:
        raise JobError("name at least one register", where=f"{where}.registers")
    for name, value in registers.items():
        if not isinstance(value, str) or not _HEX.fullmatch(value):
            raise JobError("must be 1 to 64 bytes in hex", where=f"{where}.registers.{name}")
    return ReferenceValue(
        label=_expect(table.get("label"), str, f"{where}.label"),
        type=_types([table.get("type")], f"{where}.type")[0],
        registers={name: bytes.fromhex(value) for name, value in registers.items()},
    )


def _types(value: Any, where: str) -> tuple[str, ...]:
    for entry in _expect(value, list, where):
        if not isinstance(entry, str) or not _TYPE.fullmatch(entry):
            raise JobError('types of evidence are words like "tdx"', where=where)
    return tuple(value)


def _expect(value: Any, kind: type, where: str) -> Any:
    if type(value) is not kind:
        raise JobError(f"missing, or not of type {kind.__name__}", where=where)
    return value


def _refuse_unknown(table: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in known:
            raise JobError(f"unknown key {key!r}", where=where, hint=f"known keys: {', '.join(known)}")
