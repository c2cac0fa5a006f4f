"""A software TPM per test. It speaks the real protocol; what it does not have is hardware around it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cloister.errors import TransportError
from cloister.tpm.commands import Tpm


class Swtpm:
    """One machine's TPM; `restart` is a reboot."""

    def __init__(self, folder: Path, *, port: int | None, flags: str) -> None:
        self.folder = folder
        self._flags = flags
        self.socket = folder / "tpm.sock"
        self._is_tcp = port is not None
        self._server = f"type=unixio,path={self.socket}" if port is None else f"type=tcp,port={port}"
        self.address = f"swtpm:{self.socket if port is None else f'127.0.0.1:{port}'}"

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self.folder}", "--server", self._server]
        command += ["--flags", self._flags, "--log", f"file={self.folder / 'log'}"]
        self.process = subprocess.Popen(command)
        for _ in range(500):
            if self._listens():
                return
            assert self.process.poll() is None, (self.folder / "log").read_text()
            time.sleep(0.01)
        pytest.fail("swtpm does not start")

    def _listens(self) -> bool:
        if not self._is_tcp:
            return self.socket.exists()
        try:
            Tpm.open(self.address).device.close()
        except TransportError:
            return False
        return True

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)

    def restart(self) -> None:
        self.stop()
        self.start()

    def open(self) -> Tpm:
        return Tpm.open(self.address)


@contextmanager
def running(
    port: int | None = None, *, flags: str = "not-need-init,startup-clear", certified_by: Path | None = None
) -> Iterator[Swtpm]:
    """A new TPM. The path of a Unix socket must be short, so it lies directly under the temporary folder.

    certified_by: a folder in which swtpm's local CA keeps its keys and has certified this TPM's endorsement key.
    """
    with tempfile.TemporaryDirectory(prefix="swtpm") as name:
        folder = Path(name)
        if certified_by is not None:
            manufacture(folder, certified_by)
        tpm = Swtpm(folder, port=port, flags=flags)
        tpm.start()
        try:
            yield tpm
        finally:
            tpm.stop()


def manufacture(folder: Path, authority: Path) -> None:
    """swtpm_setup plays the manufacturer: it makes the endorsement keys, certifies them and stores the certificates."""
    files = {"signingkey": "signkey.pem", "issuercert": "issuer.pem", "certserial": "serial"}
    lines = [f"statedir = {authority}", *(f"{key} = {authority / name}" for key, name in files.items())]
    (authority / "ca.conf").write_text("\n".join(lines) + "\n")
    (authority / "ca.options").write_text("--platform-manufacturer Test\n--platform-version 1\n--platform-model Test\n")
    tool = shutil.which("swtpm_localca")
    assert tool, "swtpm_localca is missing: apt install swtpm-tools"
    settings = {"tool": tool, "tool_config": authority / "ca.conf", "tool_options": authority / "ca.options"}
    setup = "".join(f"create_certs_{key} = {value}\n" for key, value in settings.items())
    (authority / "setup.conf").write_text(setup + "active_pcr_banks = sha256\n")
    command = ["swtpm_setup", "--tpm2", "--tpmstate", str(folder), "--create-ek-cert", "--config"]
    subprocess.run([*command, str(authority / "setup.conf")], check=True, capture_output=True)


@pytest.fixture
def swtpm() -> Iterator[Swtpm]:
    with running() as tpm:
        yield tpm


@pytest.fixture
def other_swtpm() -> Iterator[Swtpm]:
    with running() as tpm:
        yield tpm


@pytest.fixture
def tpm(swtpm: Swtpm) -> Iterator[Tpm]:
    with swtpm.open() as opened:
        yield opened
