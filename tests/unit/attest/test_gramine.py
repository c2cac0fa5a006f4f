"""Gramine's pseudo-files, played by a folder that answers with quotes of the test CA."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.attest.backends.gramine import GramineAttester
from cloister.attest.evidence import MAX_BLOB_BYTES
from cloister.attest.policy import AppraisalPolicy
from cloister.attest.verify import verify
from cloister.errors import RunError, VerificationError
from tests.attest_ca.dcap_ca import NOW, REPORT_DATA, sgx_body, shared_ca, tdx_body

CA = shared_ca()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder as /, with Gramine's files and a quote for REPORT_DATA."""
    folder = tmp_path / "dev" / "attestation"
    folder.mkdir(parents=True)
    (folder / "attestation_type").write_bytes(b"dcap")
    (folder / "user_report_data").write_bytes(bytes(64))
    (folder / "quote").write_bytes(CA.sgx_quote())
    return tmp_path


@pytest.fixture
def enclave(root: Path) -> Iterator[Path]:
    """The same, but `quote` is a pipe: whoever reads it gets a quote over what `user_report_data` holds then."""
    quote = root / "dev/attestation/quote"
    quote.unlink()
    os.mkfifo(quote)

    def answer() -> None:
        with quote.open("wb") as pipe:
            report_data = (root / "dev/attestation/user_report_data").read_bytes()
            pipe.write(CA.sgx_quote(body=sgx_body(report_data=report_data)))

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    yield root
    thread.join(timeout=10)
    assert not thread.is_alive()


def refused(root: Path) -> RunError:
    with pytest.raises(RunError) as error:
        GramineAttester(root).collect(REPORT_DATA)
    return error.value


def test_what_it_collects_is_accepted_with_collateral(enclave: Path) -> None:
    asked = bytes(range(64, 128))
    evidence = GramineAttester(enclave).collect(asked)
    assert (evidence.type, evidence.collateral) == ("sgx", b"")
    policy = AppraisalPolicy(accept=("sgx",), any_measurement=True)
    with pytest.raises(VerificationError) as error:
        verify(evidence, policy, asked, NOW, roots=CA.roots)
    assert error.value.code == "collateral"
    complete = type(evidence)(type="sgx", blob=evidence.blob, collateral=CA.collateral("sgx"))
    assert verify(complete, policy, asked, NOW, roots=CA.roots).report_data == asked.hex()


def test_it_is_found_by_its_files(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert GramineAttester.found(root) == str(root / "dev/attestation")
    assert GramineAttester.found(tmp_path_factory.mktemp("empty")) is None


def test_report_data_have_64_bytes(root: Path) -> None:
    with pytest.raises(ValueError, match="64 bytes"):
        GramineAttester(root).collect(bytes(63))


@pytest.mark.parametrize("kind", [b"none", b"epid", b"", b"\xff\x1b"])
def test_only_dcap(root: Path, kind: bytes) -> None:
    (root / "dev/attestation/attestation_type").write_bytes(kind)
    error = refused(root)
    assert "not by DCAP" in error.message
    assert error.message.isprintable()
    assert "sgx.remote_attestation" in error.hint


def test_a_quote_over_other_report_data(root: Path) -> None:
    """Another thread asked for a quote at the same time."""
    (root / "dev/attestation/quote").write_bytes(CA.sgx_quote(body=sgx_body(report_data=bytes(64))))
    assert "not for our report data" in refused(root).message


@pytest.mark.parametrize("quote", [b"", CA.sgx_quote()[:-1], CA.sgx_quote() + b"x", bytes(5000)])
def test_no_quote(root: Path, quote: bytes) -> None:
    (root / "dev/attestation/quote").write_bytes(quote)
    assert "no SGX quote" in refused(root).message


def test_a_tdx_quote(root: Path) -> None:
    # A TDX report has its measurement where an SGX report has its report data.
    body = tdx_body()[:320] + REPORT_DATA + tdx_body()[384:]
    (root / "dev/attestation/quote").write_bytes(CA.tdx_quote(body=body))
    assert "not for our report data" in refused(root).message


def test_an_endless_file(root: Path) -> None:
    (root / "dev/attestation/quote").write_bytes(bytes(MAX_BLOB_BYTES + 1))
    assert "longer than" in refused(root).message


@pytest.mark.parametrize("name", ["attestation_type", "user_report_data", "quote"])
def test_a_file_that_cannot_be_used(root: Path, name: str) -> None:
    path = root / "dev/attestation" / name
    path.unlink()
    path.mkdir()
    error = refused(root)
    assert (error.where, "Gramine" in error.hint) == (str(path), True)
