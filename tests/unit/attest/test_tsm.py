"""configfs-tsm, played by a folder: what the kernel does on mkdir, write and rmdir happens there too."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from cloister.attest.attester import find_attester
from cloister.attest.backends.sev_snp_certs import MAX_TABLE_ENTRIES, pack_collateral, parse_certificate_table
from cloister.attest.backends.tsm import FOLDER, TsmAttester
from cloister.attest.evidence import MAX_BLOB_BYTES, Evidence
from cloister.attest.policy import AppraisalPolicy
from cloister.attest.verify import verify
from cloister.errors import RunError, UsageError, VerificationError
from tests.attest_ca.dcap_ca import shared_ca, tdx_body
from tests.attest_ca.snp_ca import NOW, SnpCa

ASKED = bytes(range(100, 164))
SNP = SnpCa("Milan")


class Kernel:
    """Fills new entries with files, answers what is written to `inblob`, and removes entries with all their files."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.provider = b"sev_guest\n"
        self.answer: Callable[[bytes], bytes] = snp_report
        self.auxblob: bytes | None = b""
        self.generation = 5
        self.writes_of_others = 0
        self.short = False
        self.without: str | None = None
        self.entries: list[Path] = []
        self._mkdir, self._rmdir, self._write = os.mkdir, os.rmdir, os.write
        folder.mkdir(parents=True)
        monkeypatch.setattr(os, "mkdir", self.mkdir)
        monkeypatch.setattr(os, "rmdir", self.rmdir)
        monkeypatch.setattr(os, "write", self.write)

    def mkdir(self, path: Path, mode: int = 0o777) -> None:
        self._mkdir(path, mode)
        if Path(path).parent == self.folder:
            self.entries.append(Path(path))
            files = {"provider": self.provider, "inblob": b"", "outblob": b"", "generation": self._count()}
            files |= {} if self.auxblob is None else {"auxblob": self.auxblob}
            for name, content in files.items():
                if name != self.without:
                    (Path(path) / name).write_bytes(content)

    def rmdir(self, path: Path) -> None:
        if Path(path).parent == self.folder:
            for file in list(Path(path).iterdir()):
                file.unlink()
        self._rmdir(path)

    def write(self, file: int, data: bytes) -> int:
        path = Path(f"/proc/self/fd/{file}").readlink()
        if path.name != "inblob":
            return self._write(file, data)
        self.generation += 1 + self.writes_of_others
        (path.parent / "generation").write_bytes(self._count())
        (path.parent / "outblob").write_bytes(self.answer(data))
        return self._write(file, data[:63] if self.short else data)

    def _count(self) -> bytes:
        return f"{self.generation}\n".encode()


def snp_report(report_data: bytes, key: int = 0) -> bytes:
    return SNP.vcek.sign(SNP.body(key=key, patches={0x50: report_data}))


def table(**entries: bytes) -> bytes:
    """A host's table of certificates."""
    guids = {
        "vcek": "63da758d-e664-4564-adc5-f4b93be8accd", "vlek": "a8074bc2-a25a-483e-aae6-39c045a0b8a1",
        "ask": "4ab7b379-bbac-4fe4-a02f-05aef327c782", "crl": "92f81bc3-5811-4d3d-97ff-d19f88dc67ea",
    }  # fmt: skip
    head, content = b"", b""
    start = 24 * (len(entries) + 1)
    for name, value in entries.items():
        place = (start + len(content)).to_bytes(4, "little") + len(value).to_bytes(4, "little")
        head, content = head + uuid.UUID(guids[name]).bytes + place, content + value
    return head + bytes(24) + content


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(tmp_path / FOLDER, monkeypatch)


def collect(kernel: Kernel) -> Evidence:
    return TsmAttester(_root(kernel)).collect(ASKED)


def _root(kernel: Kernel) -> Path:
    return kernel.folder.parents[len(Path(FOLDER).parts) - 1]


def refused(kernel: Kernel, words: str) -> None:
    with pytest.raises(RunError, match=words):
        collect(kernel)
    assert list(kernel.folder.iterdir()) == []


def test_snp_evidence_with_the_hosts_certificates_is_accepted(kernel: Kernel) -> None:
    kernel.auxblob = table(ask=b"whatever", vcek=SNP.vcek.der, vlek=SNP.vlek.der, crl=SNP.crl([3])) + bytes(1000)
    evidence = collect(kernel)
    policy = AppraisalPolicy(accept=("sev-snp",), any_measurement=True)
    claims = verify(evidence, policy, ASKED, NOW, roots=SNP.roots)
    assert claims.tcb["signed with"] == "VCEK"
    assert not any("revocation" in warning for warning in claims.warnings)
    assert list(kernel.folder.iterdir()) == []


def test_the_certificate_is_the_one_of_the_key_that_signed(kernel: Kernel) -> None:
    kernel.auxblob = table(vcek=SNP.vcek.der, vlek=SNP.vlek.der)
    assert collect(kernel).collateral == pack_collateral(leaf=SNP.vcek.der)
    kernel.answer = lambda data: snp_report(data, key=1)
    assert collect(kernel).collateral == pack_collateral(leaf=SNP.vlek.der)
    kernel.auxblob = table(vcek=SNP.vcek.der)
    assert collect(kernel).collateral == b""


@pytest.mark.parametrize("auxblob", [None, b"", bytes(24), bytes(4096)])
def test_hosts_that_hand_out_no_certificates(kernel: Kernel, auxblob: bytes | None) -> None:
    kernel.auxblob = auxblob
    evidence = collect(kernel)
    assert (evidence.type, evidence.collateral, evidence.event_log) == ("sev-snp", b"", b"")
    assert evidence.blob[0x50:0x90] == ASKED


def test_tdx_evidence(kernel: Kernel) -> None:
    kernel.provider, kernel.auxblob = b"tdx_guest\n", None
    kernel.answer = lambda data: shared_ca().tdx_quote(body=tdx_body(report_data=data))
    evidence = collect(kernel)
    assert (evidence.type, evidence.collateral, evidence.event_log) == ("tdx", b"", b"")
    assert evidence.blob[48:][520:584] == ASKED


def test_each_request_has_an_entry_of_its_own_that_is_removed(kernel: Kernel) -> None:
    attester = TsmAttester(_root(kernel))
    attester.collect(ASKED)
    attester.collect(ASKED)
    assert len({entry.name for entry in kernel.entries}) == 2
    assert all(entry.name.startswith(f"cloister-{os.getpid()}-") for entry in kernel.entries)
    assert list(kernel.folder.iterdir()) == []


def test_the_type_is_the_kernels_and_asked_once(kernel: Kernel) -> None:
    attester = TsmAttester(_root(kernel))
    assert (attester.type, attester.type) == ("sev-snp", "sev-snp")
    assert len(kernel.entries) == 1
    assert list(kernel.folder.iterdir()) == []


def test_it_is_found_where_the_kernel_has_it(kernel: Kernel, tmp_path: Path) -> None:
    root = _root(kernel)
    assert TsmAttester.found(root) == str(root / FOLDER)
    assert TsmAttester.found(root / "elsewhere") is None
    assert find_attester("auto", root=root).attester.type == "sev-snp"
    with pytest.raises(UsageError, match="gives sev-snp evidence, not tdx"):
        find_attester("tdx", root=root)


def test_report_data_has_64_bytes(kernel: Kernel) -> None:
    with pytest.raises(ValueError, match="64 bytes"):
        TsmAttester(_root(kernel)).collect(b"short")
    assert kernel.entries == []


@pytest.mark.parametrize("others", [1, -1, 7])
def test_somebody_else_wrote_to_the_entry(kernel: Kernel, others: int) -> None:
    kernel.writes_of_others = others
    refused(kernel, "somebody else wrote")


def test_reports_about_other_data(kernel: Kernel) -> None:
    kernel.answer = lambda data: snp_report(bytes(64))
    refused(kernel, "not about our data")
    kernel.provider, kernel.auxblob = b"tdx_guest", None
    kernel.answer = lambda data: shared_ca().tdx_quote(body=tdx_body(report_data=bytes(64)))
    refused(kernel, "not about our data")


@pytest.mark.parametrize("provider", [b"sev_guest", b"tdx_guest"])
@pytest.mark.parametrize("answer", [b"", b"nonsense", bytes(1184)])
def test_reports_that_are_none(kernel: Kernel, provider: bytes, answer: bytes) -> None:
    kernel.provider, kernel.answer = provider, lambda data: answer
    refused(kernel, "no usable")


def test_a_table_that_points_beyond_its_end(kernel: Kernel) -> None:
    kernel.auxblob = table(vcek=SNP.vcek.der)[:-1]
    refused(kernel, "no usable")


@pytest.mark.parametrize("provider", [b"arm_cca_guest\n", b"", b"\xff", b"sev_guest tdx_guest"])
def test_machines_that_are_not_known(kernel: Kernel, provider: bytes) -> None:
    kernel.provider = provider
    refused(kernel, "not known here")
    with pytest.raises(RunError, match="not known here"):
        _ = TsmAttester(_root(kernel)).type


def test_answers_that_are_too_long(kernel: Kernel) -> None:
    kernel.answer = lambda data: bytes(MAX_BLOB_BYTES + 1)
    refused(kernel, "longer than")
    kernel.answer, kernel.provider = snp_report, b"x" * 65
    refused(kernel, "longer than")


@pytest.mark.parametrize("name", ["provider", "outblob", "generation", "inblob"])
def test_files_that_are_missing(kernel: Kernel, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.without = name
    if name == "outblob":
        kernel.answer = lambda data: _fail()
    refused(kernel, "cannot be used: (No such file|Input/output error)")


def _fail() -> bytes:
    raise OSError(errno.EIO, "Input/output error")


def test_a_count_that_is_no_number(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_count", lambda: b"-1\n")
    refused(kernel, "no number")


def test_a_short_write_is_not_tried_again(kernel: Kernel) -> None:
    kernel.short = True
    refused(kernel, "63 of 64")


def test_an_entry_that_cannot_be_made_or_removed(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse)
        with pytest.raises(RunError, match="not permitted"):
            collect(kernel)
    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(RunError, match="not permitted") as refused_entry:
        collect(kernel)
    assert "as root" in refused_entry.value.hint


# The table ------------------------------------------------------------------------------------------------------------


def test_tables_are_read_by_name() -> None:
    found = parse_certificate_table(table(vcek=b"one", ask=b"two", crl=b""))
    assert found == {"vcek": b"one", "4ab7b379bbac4fe4a02f05aef327c782": b"two", "crl": b""}
    assert parse_certificate_table(b"") == {}


def test_truncated_tables_hold_nothing() -> None:
    whole = table(vcek=b"one", vlek=b"two")
    for size in range(1, len(whole)):
        with pytest.raises(VerificationError) as caught:
            parse_certificate_table(whole[:size])
        assert caught.value.code == "collateral"


def test_tables_without_an_end() -> None:
    with pytest.raises(VerificationError, match="more than"):
        parse_certificate_table((b"\x01" * 16 + bytes(8)) * (MAX_TABLE_ENTRIES + 1))
