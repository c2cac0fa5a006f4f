"""What attests a machine: found by looking, named in words, and never the simulation unless it was asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest

from cloister.attest.attester import BACKENDS, AttesterKind, WithCollateral, find_attester
from cloister.attest.backends.simulated import InsecureSimulatedAttester
from cloister.attest.evidence import MAX_COLLATERAL_BYTES, Evidence
from cloister.errors import UsageError
from cloister.job import EnclaveSection


class FakeAttester:
    """A backend that finds its device in `present`."""

    present: frozenset[str] = frozenset()
    name = ""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.device = ""

    @property
    def type(self) -> str:
        return {"tsm": "sev-snp", "gramine": "sgx", "nsm": "nitro", "dstack": "tdx"}.get(self.name, self.name)

    @classmethod
    def found(cls, root: Path) -> str | None:
        return f"{root}/{cls.name}" if cls.name in cls.present else None

    @classmethod
    def open(cls, device: str) -> FakeAttester:
        attester = cls(Path("/"))
        attester.device = device
        return attester

    def collect(self, report_data: bytes) -> Evidence:
        return Evidence(type=self.type, blob=report_data)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> type[FakeAttester]:
    """Every backend replaced by a fake; set `present` to say which devices there are."""
    base = type("Machine", (FakeAttester,), {})
    for backend in BACKENDS:
        module = ModuleType(f"cloister.attest.backends.{backend.module}")
        setattr(module, backend.attester, type(backend.attester, (base,), {"name": backend.module}))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return base


def test_the_job_file_and_the_registry_know_the_same_names() -> None:
    kinds = get_args(AttesterKind)
    assert get_args(EnclaveSection.model_fields["attester"].annotation) == kinds
    assert {"auto", "simulated"} | {kind for backend in BACKENDS for kind in backend.kinds} == set(kinds)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.module)
def test_every_backend_is_there_and_finds_nothing_in_an_empty_folder(backend: object, tmp_path: Path) -> None:
    attester_class = backend.load()  # type: ignore[attr-defined]
    assert attester_class.found(tmp_path) is None


def test_auto_takes_the_first_in_the_order_of_the_table(machine: type[FakeAttester], tmp_path: Path) -> None:
    order = [backend.module for backend in BACKENDS]
    assert order[-1] == "tpm"  # it hides nothing, so anything that does comes before it
    for first in range(len(order)):
        machine.present = frozenset(order[first:])
        found = find_attester("auto", root=tmp_path)
        assert found.attester.type == machine.__subclasses__()[first](tmp_path).type
        assert found.how == f"{BACKENDS[first].name} ({tmp_path}/{order[first]})"


@pytest.mark.parametrize("allow_simulated", [True, False])
def test_auto_never_falls_back_to_the_simulation(
    machine: type[FakeAttester], tmp_path: Path, allow_simulated: bool
) -> None:
    with pytest.raises(UsageError, match="no TEE found") as refused:
        find_attester("auto", allow_simulated=allow_simulated, root=tmp_path)
    assert all(backend.looks_for in refused.value.message for backend in BACKENDS)


def test_auto_on_this_machine_without_devices(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no TEE found"):
        find_attester("auto", allow_simulated=True, root=tmp_path)


def test_a_named_kind_is_taken_or_refused(machine: type[FakeAttester], tmp_path: Path) -> None:
    machine.present = frozenset({"tsm", "tpm"})
    assert find_attester("sev-snp", root=tmp_path).attester.type == "sev-snp"
    assert find_attester("tpm", root=tmp_path).attester.type == "tpm"
    with pytest.raises(UsageError, match="gives sev-snp evidence, not tdx") as other:
        find_attester("tdx", root=tmp_path)
    assert '"sev-snp"' in other.value.hint
    with pytest.raises(UsageError, match=r"looked for AWS Nitro enclave \(/dev/nsm\)$"):
        find_attester("nitro", root=tmp_path)
    with pytest.raises(ValueError, match="unknown"):
        find_attester("vtpm")  # type: ignore[arg-type]  # the point of the test


def test_a_local_key_chooses_the_tpm(machine: type[FakeAttester], tmp_path: Path) -> None:
    found = find_attester("tpm", root=tmp_path, tpm="swtpm:/run/tpm.sock")
    assert isinstance(found.attester, FakeAttester)
    assert (found.attester.device, found.how) == ("swtpm:/run/tpm.sock", "TPM 2.0 (swtpm:/run/tpm.sock)")


def test_the_simulation_needs_permission() -> None:
    with pytest.raises(UsageError, match="not allowed"):
        find_attester("simulated")
    found = find_attester("simulated", allow_simulated=True)
    assert (found.attester.type, "protects nothing" in found.how) == ("simulated", True)
    with pytest.raises(ValueError, match="64 bytes"):
        found.attester.collect(b"short")


def test_collateral_is_added_and_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "collateral.json"
    attester = find_attester("simulated", allow_simulated=True, collateral=path).attester
    assert attester.type == "simulated"
    with pytest.raises(UsageError, match="cannot use the collateral") as missing:
        attester.collect(bytes(64))
    assert "attest fetch" in missing.value.hint
    for content in (b"first", b"second"):
        path.write_bytes(content)
        assert attester.collect(bytes(64)).collateral == content
    path.write_bytes(bytes(MAX_COLLATERAL_BYTES + 1))
    with pytest.raises(UsageError, match="longer than"):
        attester.collect(bytes(64))


def test_gpus_attest_with_their_machine(machine: type[FakeAttester], tmp_path: Path) -> None:
    machine.present = frozenset({"tsm"})
    found = find_attester("auto", root=tmp_path, gpus=True)
    assert type(found.attester).__name__ == "WithGpus"
    assert (found.attester.type, found.how.endswith(", with its GPUs")) == ("sev-snp", True)


def test_collateral_of_the_attester_itself_is_kept(machine: type[FakeAttester], tmp_path: Path) -> None:
    class Complete(InsecureSimulatedAttester):
        def collect(self, report_data: bytes) -> Evidence:
            return Evidence(type="sev-snp", blob=report_data, collateral=b"its own")

    assert WithCollateral(Complete(), tmp_path / "absent").collect(bytes(64)).collateral == b"its own"
