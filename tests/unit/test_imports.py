"""Which part of the package may use which, read from the import statements of every file; drawn in README.

The two rules behind the table: what protects (crypto, attest, channel, agreement) knows nothing of models, and what
computes (data, model, adapters, training, evaluation) knows nothing of keys and connections. Only enclave and party
bring both together.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "cloister"

_PROTECTS = {"crypto", "tpm", "attest", "channel", "agreement"}
_COMPUTES = {"data", "model", "adapters", "training", "evaluation", "federation"}
_SIDE = {"errors", "job", "jobfile", "progress", "report", *_PROTECTS, "data", "model", "adapters"}

ALLOWED: dict[str, set[str]] = {
    "": {"adapters"},  # cloister/__init__.py, of adapters only what tells PEFT of them
    "errors": set(),
    "progress": set(),
    "private": set(),
    "job": set(),
    "jobfile": {"errors", "job"},
    "crypto": {"errors"},
    "tpm": {"errors"},
    "attest": {"errors", "crypto", "tpm"},
    "channel": {"errors", "crypto", "attest"},
    "agreement": {"errors", "progress", "jobfile", "crypto", "attest"},
    "masking": {"errors", "crypto", "tpm", "model"},  # sealing and counters, for pads that lie on a disk
    "federation": {"errors", "job"},
    "accelerator": {"errors", "crypto", "masking"},  # of crypto the encoding of its frames, and keys for TLS
    "model": {"errors"},
    "data": {"errors", "job", "model"},
    "adapters": {"errors", "job", "model"},
    "training": {"errors", "job", "model", "data", "adapters"},
    "evaluation": {"errors", "model", "data", "training", "report"},
    "report": {"errors", "attest"},  # of attest only `claims`, see below
    "party": _SIDE,
    "enclave": _SIDE | {"private", "training", "evaluation", "federation"},
    "silo": _SIDE | {"training", "evaluation", "federation", "masking", "accelerator", "party"},
    "methods": _SIDE - {"channel"}
    | {"training", "evaluation", "accelerator", "federation", "masking"}
    | {"party", "silo"},
    "bench": {"errors", "progress", "job", "jobfile", "data", "model", "adapters", "training", "evaluation", "masking"}
    | {"accelerator", "methods", "report"},
    "cli": {"errors", "private", "progress", "jobfile", "crypto", "evaluation", "report"}
    | {"accelerator", "bench", "enclave", "party", "methods"},
    "__main__": {"cli"},
}

_CONNECTIONS = {"socket", "socketserver", "ssl", "http", "urllib", "grpc", "asyncio", "requests", "httpx", "aiohttp"}
_NUMBERS = {"torch", "transformers", "peft", "safetensors", "numpy", "scipy"}
_UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
_LINUX_ONLY = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports, wherever the statement stands; "from a import b" counts as a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ("cloister", *path.relative_to(SOURCE).parent.parts)
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (start, node.module)))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def part(path: Path) -> str:
    """The package or module directly under cloister/ that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py").replace("__init__", "")


FILES = sorted(SOURCE.rglob("*.py"))
OUTSIDE = {path: {name.partition(".")[0] for name in imports(path)} - {"cloister"} for path in FILES}
INSIDE = {
    path: {name.split(".")[1] for name in imports(path) if name.startswith("cloister.")} & (set(ALLOWED) - {part(path)})
    for path in FILES
}


def files_of(*parts: str) -> list[Path]:
    found = [path for path in FILES if part(path) in parts]
    assert found
    return found


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(SOURCE).as_posix() for path in paths]


def test_every_part_is_in_the_table() -> None:
    assert {part(path) for path in FILES} == set(ALLOWED)


@pytest.mark.parametrize("name", [name for name in ALLOWED if name])
def test_imports_point_one_way(name: str) -> None:
    used = {other for path in files_of(name) for other in INSIDE[path]}
    assert used - ALLOWED[name] == set()


def test_the_table_has_no_circle_and_nothing_that_is_not_used() -> None:
    left = {name: set(allowed) for name, allowed in ALLOWED.items()}
    while left:
        free = {name for name, allowed in left.items() if not allowed & set(left)}
        assert free, f"a circle among {sorted(left)}"
        left = {name: allowed for name, allowed in left.items() if name not in free}
    used = {name: {o for p in FILES if part(p) == name for o in INSIDE[p]} for name in ALLOWED}
    assert {name: ALLOWED[name] - used[name] for name in _PROTECTS | _COMPUTES if ALLOWED[name] - used[name]} == {}


def test_what_computes_knows_no_keys_and_no_connections() -> None:
    forbidden = _CONNECTIONS | {"cryptography", "cbor2", "dcap_qvl"}
    assert names([path for path in files_of(*_COMPUTES) if OUTSIDE[path] & forbidden]) == []
    assert not any(ALLOWED[name] & (_PROTECTS | {"enclave", "party"}) for name in _COMPUTES)


def test_what_protects_knows_no_models() -> None:
    assert names([path for path in files_of(*_PROTECTS) if OUTSIDE[path] & _NUMBERS]) == []
    assert not any(ALLOWED[name] & _COMPUTES for name in _PROTECTS)


def test_reports_know_of_attestation_only_what_was_claimed() -> None:
    taken = {n for path in files_of("report") for n in imports(path) if n.startswith("cloister.attest")}
    assert taken <= {"cloister.attest.claims", "cloister.attest.claims.Claims"}
    assert names([path for path in files_of("report") if OUTSIDE[path] & (_CONNECTIONS | {"cryptography"})]) == []


def test_only_the_channel_carries_bytes() -> None:
    """`grpc` is the one way out; a command may look whether a port answers, and a software TPM sits at a socket. What
    fetches the vendors' endorsements is for one command: nothing that verifies, and no role of a job, comes near it. An
    accelerator has sockets of its own: it attests nothing, and what it is sent means nothing to whoever listens.
    Between the processes of one enclave torch carries gradients; `group.py` only lets nobody else into its sockets."""
    fetches, shuts = SOURCE / "attest" / "collateral.py", SOURCE / "enclave" / "group.py"
    assert {part(path) for path in FILES if "grpc" in OUTSIDE[path]} == {"channel"}
    ways = _CONNECTIONS - {"grpc"}
    connecting = {part(path) for path in FILES if path not in (fetches, shuts) and OUTSIDE[path] & ways}
    assert connecting <= {"accelerator", "cli", "methods", "tpm"}
    users = [path for path in FILES if "cloister.attest.collateral" in imports(path)]
    assert names(users) == ["methods/attest.py"]


def test_party_and_enclave_do_not_import_each_other() -> None:
    assert "enclave" not in ALLOWED["party"]
    assert "party" not in ALLOWED["enclave"]
    assert "silo" not in ALLOWED["enclave"] | ALLOWED["party"]


def test_nothing_unpickles() -> None:
    assert names([path for path in FILES if OUTSIDE[path] & _UNPICKLERS]) == []
    offenders = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "np.load", "numpy.load"):
                offenders.append(f"{path.name}:{node.lineno}")
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
                offenders += [f"{path.name}:{node.value.lineno}"] if ast.unparse(node.value) != "False" else []
    assert offenders == []


def test_nothing_meant_for_tests_is_used() -> None:
    assert [n for path in FILES for n in imports(path) if {"testing", "tests", "conftest"} & set(n.split("."))] == []


def test_no_module_needs_linux() -> None:
    """`join`, `generate` and `verify` are meant to run on macOS and Windows too: only a collector that is imported by
    name, on a machine that has its device, may need Linux, and shared memory, which only addresses "unix:PATH" use."""
    linux_only = ["accelerator/memory.py", "attest/backends/nsm.py"]
    assert names([path for path in FILES if OUTSIDE[path] & _LINUX_ONLY]) == linux_only
    assert not [path for path in FILES for name in imports(path) if name.startswith("cloister.attest.backends.nsm")]
    for path in FILES:
        at_the_top = ast.parse(path.read_text(encoding="utf-8")).body
        modules = [node.module for node in at_the_top if isinstance(node, ast.ImportFrom)]
        assert "cloister.accelerator.memory" not in modules, path


def test_importing_the_package_and_its_commands_is_cheap() -> None:
    code = "import sys, cloister, cloister.cli; print(*{m.partition('.')[0] for m in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "peft", "grpc", "scipy"} & set(run.stdout.split())
    assert "typer" in run.stdout.split()
