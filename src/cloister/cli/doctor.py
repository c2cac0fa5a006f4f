"""The checks of `cloister doctor`. Each looks at one thing and says what was found and what to do about it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil

import cloister
from cloister.cli.tables import size
from cloister.methods.host import describe_host, usable_cpus
from cloister.report.outputs import DoctorCheck, DoctorReport

_GIB = 1 << 30
_MIN_MEMORY_BYTES = 4 * _GIB
"""The demo's six processes, each with torch loaded, stay below this."""
_MIN_DISK_BYTES = 2 * _GIB
_MIN_AES_BYTES_PER_S = 500e6
"""With AES instructions one core seals over 1 GB/s; below half of that they are missing, and sealing sets the pace."""

_TEE_DEVICES = {
    "/dev/tdx_guest": "Intel TDX guest",
    "/dev/sev-guest": "AMD SEV-SNP guest",
    "/sys/kernel/config/tsm/report": "Linux TSM reports (TDX, SEV-SNP, ARM CCA)",
    "/dev/attestation": "Gramine (SGX)",
    "/dev/sgx_enclave": "Intel SGX",
    "/dev/nsm": "AWS Nitro enclave",
    "/dev/tpmrm0": "TPM (measures, hides nothing)",
}


def examine() -> DoctorReport:
    """Run all checks. None of them changes the machine; the slowest imports torch."""
    checks = [check() for check in CHECKS]
    return DoctorReport(ok=all(c.status != "fail" for c in checks), checks=checks, host=describe_host())


def check_python() -> DoctorCheck:
    """Python is one that we test with."""
    found = platform.python_version()
    if platform.python_implementation() != "CPython":
        hint = "use plain CPython; torch has no wheels for others"
        return DoctorCheck(name="python", status="warn", found=f"{found}, {sys.implementation.name}", hint=hint)
    return DoctorCheck(name="python", status="ok", found=found)


def check_packages() -> DoctorCheck:
    """Every required package is there, in the pinned version where the pins are at hand."""
    pins, missing, other = _pins(), [], []
    for name in _required():
        try:
            found = version(name).partition("+")[0]
        except PackageNotFoundError:
            missing.append(name)
            continue
        if pins.get(_normal(name), found) != found:
            other.append(f"{name} {found} (tested with {pins[_normal(name)]})")
    if missing:
        hint = "install them: make setup, or pip install cloister"
        return DoctorCheck(name="packages", status="fail", found=f"missing: {', '.join(missing)}", hint=hint)
    if other:
        hint = "results may differ from those we publish; `make setup` installs the pinned versions"
        return DoctorCheck(name="packages", status="warn", found="; ".join(other), hint=hint)
    pinned = "as pinned" if pins else "all there (no constraints.txt to compare with)"
    return DoctorCheck(name="packages", status="ok", found=f"cloister {cloister.__version__}, requirements {pinned}")


def check_torch() -> DoctorCheck:
    """torch can be loaded, which fails where a library of its own is missing."""
    started = time.perf_counter()
    try:
        import torch
    except (ImportError, OSError) as exc:
        hint = "reinstall torch for this platform: https://pytorch.org/get-started"
        return DoctorCheck(name="torch", status="fail", found=f"cannot be loaded: {exc}", hint=hint)
    took = time.perf_counter() - started
    return DoctorCheck(name="torch", status="ok", found=f"{torch.__version__}, loaded in {took:.1f} s")


def check_processor() -> DoctorCheck:
    """Threads that torch uses do not outnumber the processors we may use."""
    import torch

    cpus, threads = usable_cpus(), torch.get_num_threads()
    found = f"{cpus} usable, torch uses {threads} threads"
    if threads > cpus:
        hint = f"more threads than processors slow each other down: set OMP_NUM_THREADS={cpus}"
        return DoctorCheck(name="processors", status="warn", found=found, hint=hint)
    return DoctorCheck(name="processors", status="ok", found=found)


def check_processes() -> DoctorCheck:
    """An enclave may train in several processes, which meet over loopback."""
    import torch.distributed as dist

    loopback = psutil.net_if_stats().get("lo")
    lacks = {
        "torch with gloo": dist.is_available() and dist.is_gloo_available(),
        "a loopback interface lo that is up": loopback is not None and loopback.isup,
        "anonymous memory (memfd_create)": hasattr(os, "memfd_create"),
    }
    if missing := [what for what, there in lacks.items() if not there]:
        hint = "keep [enclave] processes = 1"
        found = f"one only; missing: {', '.join(missing)}"
        return DoctorCheck(name="enclave processes", status="warn", found=found, hint=hint)
    return DoctorCheck(name="enclave processes", status="ok", found=f"gloo over lo; {usable_cpus()} are of use here")


def check_aes() -> DoctorCheck:
    """Sealing is fast enough not to set the pace of an upload."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    cipher, block = AESGCM(AESGCM.generate_key(256)), bytes(1 << 20)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 0.1:
        cipher.encrypt(count.to_bytes(12, "big"), block, None)
        count += 1
    rate = count * len(block) / (time.perf_counter() - started)
    found = f"AES-256-GCM at {rate / 1e9:.1f} GB/s on one core"
    if rate < _MIN_AES_BYTES_PER_S:
        hint = "the processor or its virtual machine offers no AES instructions; sealing will be slow"
        return DoctorCheck(name="encryption", status="warn", found=found, hint=hint)
    return DoctorCheck(name="encryption", status="ok", found=found)


def check_memory() -> DoctorCheck:
    """The demo fits."""
    memory = psutil.virtual_memory()
    found = f"{size(memory.available)} free of {size(memory.total)}"
    if memory.available < _MIN_MEMORY_BYTES:
        hint = "the demo needs about 4 GiB; `cloister plan` says what a job needs"
        return DoctorCheck(name="memory", status="warn", found=found, hint=hint)
    return DoctorCheck(name="memory", status="ok", found=found)


def check_disk() -> DoctorCheck:
    """Here, where run folders go by default, is room for the demo's bundles."""
    free = shutil.disk_usage(".").free
    found = f"{size(free)} free in {Path.cwd()}"
    if not os.access(".", os.W_OK):
        return DoctorCheck(name="disk", status="warn", found=f"{Path.cwd()} is read-only", hint="give --out elsewhere")
    if free < _MIN_DISK_BYTES:
        return DoctorCheck(name="disk", status="warn", found=found, hint="bundles may not fit; `cloister plan` says")
    return DoctorCheck(name="disk", status="ok", found=found)


def check_accelerators() -> DoctorCheck:
    """What `device = "auto"` would take."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return DoctorCheck(name="accelerators", status="ok", found=f"CUDA: {', '.join(names)}")
    if torch.backends.mps.is_available():
        return DoctorCheck(name="accelerators", status="ok", found="MPS (Apple)")
    return DoctorCheck(name="accelerators", status="ok", found="none; the processor is used")


def check_tee() -> DoctorCheck:
    """Devices by which this machine could prove what it runs."""
    found = [f"{path} ({what})" for path, what in _TEE_DEVICES.items() if Path(path).exists()]
    if found:
        return DoctorCheck(name="trusted execution", status="ok", found=", ".join(found))
    hint = "a party needs none; an enclave on this machine can only be simulated, which protects nothing"
    return DoctorCheck(name="trusted execution", status="warn", found="no device found", hint=hint)


def check_port() -> DoctorCheck:
    """A server can listen on loopback and be reached there."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port), timeout=2):
                return DoctorCheck(name="network", status="ok", found=f"listened and connected on 127.0.0.1:{port}")
    except OSError as exc:
        hint = "a firewall or sandbox forbids it; `run` and `demo` need loopback"
        return DoctorCheck(name="network", status="fail", found=f"loopback cannot be used: {exc}", hint=hint)


CHECKS: tuple[Callable[[], DoctorCheck], ...] = (
    check_python,
    check_packages,
    check_torch,
    check_processor,
    check_processes,
    check_aes,
    check_memory,
    check_disk,
    check_accelerators,
    check_tee,
    check_port,
)


def _required() -> list[str]:
    """Names of the packages that cloister itself needs, without extras."""
    try:
        lines = requires("cloister") or []
    except PackageNotFoundError:
        return []
    return [re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0] for line in lines if "extra ==" not in line]


def _pins() -> dict[str, str]:
    """Versions in constraints.txt, which is there when cloister runs from its source tree."""
    path = Path(cloister.__file__).parents[2] / "constraints.txt"
    if not path.is_file():
        return {}
    pairs = (line.split("==") for line in path.read_text(encoding="utf-8").split("\n") if "==" in line)
    return {_normal(name): pinned.strip() for name, pinned in pairs}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
