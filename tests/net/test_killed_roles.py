"""What roles leave behind when they are killed or crash in the middle of their work, and when they then finish."""

from __future__ import annotations

import json
import resource
import signal
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tests.integration.test_faults import deployment
from tests.integration.test_leaks import weights_of
from tests.integration.test_run import files_under, holding
from tests.integration.tiny_job import PARTIES, Command, records, started, write_job, write_lines, write_model
from tests.unit.data.tiny_tokenizers import tiny_tokenizer

pytestmark = [pytest.mark.net, pytest.mark.timeout(900)]

PROMPT, RESPONSE = "canary-4Wd-prompt", "canary-4Wd-response"
FLAGS = ("--insecure-simulated", "--json", "--progress", "json")


@pytest.fixture
def core_dumps_on() -> Iterator[None]:
    """As far as a process does not turn them off itself."""
    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_CORE, before)


def start(stack: ExitStack, folder: Path, job: Path, keys: dict[str, Path], attempt: int) -> dict[str, Command]:
    """Enclave and parties."""
    out = folder / "enclave"
    (out / "address").unlink(missing_ok=True)
    call = ("enclave", job, "--listen", "127.0.0.1:0", "--out", out)
    roles = {"enclave": stack.enter_context(started(*call, *FLAGS, folder=folder / f"enclave-{attempt}"))}
    roles["enclave"].wait_for((out / "address").exists, "address", 300)
    address = json.loads((out / "address").read_text())["address"]
    for name in PARTIES:
        call = ("join", job, "--party", name, "--key", keys[name], "--out", folder / name)
        command = started(*call, "--enclave", address, *FLAGS, folder=folder / f"{name}-{attempt}")
        roles[name] = stack.enter_context(command)
    return roles


def secrets_of(folder: Path, party: str, key: Path) -> dict[str, bytes]:
    """What nobody else may have, by name."""
    found = {str(path.name): path.read_bytes() for path in (folder / party / "bundles").glob("*.key")}
    assert len(found) == 3
    private = load_pem_private_key(key.read_bytes(), password=None)
    found["signing key"] = private.private_bytes_raw()  # type: ignore[union-attr]  # an Ed25519 key
    return found


def token_forms(text: str) -> list[bytes]:
    """A text's tokens as integers of 4 and 8 bytes, as they lie in tensors."""
    ids = tiny_tokenizer("bos")(text, add_special_tokens=False)["input_ids"][2:-1]
    assert len(ids) > 5
    return [struct.pack(f"<{len(ids)}{kind}", *ids) for kind in "iq"]


def shared_files() -> set[Path]:
    places = [Path("/dev/shm"), Path("/tmp"), Path.cwd()]  # noqa: S108
    return {path for place in places for path in place.iterdir() if path.is_file()}


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGABRT], ids=["killed", "crashed"])
@pytest.mark.usefixtures("core_dumps_on")
def test_nothing_secret_is_left(tmp_path: Path, ending: signal.Signals) -> None:
    before = shared_files()

    def make(changes: dict[str, dict[str, Any]], **more: Any) -> Path:
        row = {"id": "secret", "prompt": PROMPT, "response": RESPONSE, "task": "answer"}
        write_lines(tmp_path / "job" / "data" / "north-train.jsonl", [*records("north", "train", 60), row])
        return write_job(tmp_path / "job", {**changes, "model": {"path": str(write_model(tmp_path / "model"))}}, **more)

    job, keys = deployment(make, tmp_path, {"training": {"steps": 100}, "checkpoint": {"count": 10}})
    with ExitStack() as stack:
        roles = start(stack, tmp_path, job, keys, 1)
        checkpoints = tmp_path / "enclave" / "checkpoints"
        roles["enclave"].wait_for(lambda: checkpoints.is_dir() and any(checkpoints.iterdir()), "checkpoint", 300)
        for role in ("north", "enclave", "south"):
            roles[role].process.send_signal(ending)
            roles[role].process.wait(60)
    _search(tmp_path, keys, before)
    with ExitStack() as stack:
        roles = start(stack, tmp_path, job, keys, 2)
        for name in (*PARTIES, "enclave"):
            assert roles[name].end(300) == 0, roles[name].stdout + roles[name].stderr[-2000:]
    _search(tmp_path, keys, before)
    adapter = tmp_path / "north" / "adapter"
    for stretch in weights_of(adapter):
        others = [p for p in [*files_under(tmp_path), *(shared_files() - before)] if adapter not in p.parents]
        assert holding(others, stretch) == []
    assert safetensors.numpy.load_file(adapter / "adapter_model.safetensors")


def _search(folder: Path, keys: dict[str, Path], before: set[Path]) -> None:
    """Every file but the party's own: no text, no tokens of it, no key; and nothing left in temporary folders."""
    new = shared_files() - before
    everything = [*files_under(folder), *new]
    assert [p for p in everything if p.name.startswith("core")] == []
    assert [p for p in files_under(folder) if p.parent.name == "tmp"] == []
    own_inputs = {folder / "job", folder / "model"}
    found = [p for p in everything if not own_inputs & set(p.parents)]
    for needle in (PROMPT.encode(), RESPONSE.encode(), *token_forms(RESPONSE)):
        assert holding(found, needle) == []
    for party in PARTIES:
        mine = {keys[party], *(folder / party / "bundles").glob("*.key")}
        for name, secret in secrets_of(folder, party, keys[party]).items():
            for form in (secret, secret.hex().encode()):
                assert holding([p for p in found if p not in mine], form) == [], f"{party}: {name}"
