"""A test CA in NVIDIA's place, with GPUs that sign SPDM reports. Formats are written a second time, from the
specification. Never in the package."""

from __future__ import annotations

import base64
import dataclasses
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding

from cloister.attest.binding import device_nonce
from cloister.attest.evidence import Evidence
from cloister.attest.roots import TrustRoots, vendor_roots
from tests.attest_ca.ec_ca import Certified, certify

NOW = 1_790_000_000
FWID = b"\xf1" * 48
NONCE = bytes(range(32))
MEASUREMENTS = {index: bytes([index]) * 48 for index in range(1, 5)}
OPAQUE = {3: b"590.12\0", 6: bytes.fromhex("00a5009601000000"), 20: FWID, 36: b"\0\0", 11: b"\x55"}
DICE = "2.23.133.5.4.1"
YEAR = 365 * 86_400


def tcb_info(fwid: bytes = FWID) -> bytes:
    """The end of TCG's composite device id, which is all that matters here: SHA-384 and the hash."""
    return bytes.fromhex("303f06096086480165030402020430") + fwid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU: its burnt-in key, and the firmware's key that it certified."""

    device: Certified
    leaf: Certified


class NvidiaCa:
    """NVIDIA, with a provisioner that certifies GPUs."""

    def __init__(self, *, now: float = NOW) -> None:
        self.now = now
        self.root = certify("NVIDIA Device Identity CA", None, now=now, seconds=(-YEAR, YEAR))
        self.family = certify("NVIDIA GH100 Identity", self.root, now=now, seconds=(-YEAR, YEAR))
        self.gpu = self.make_gpu()

    @property
    def roots(self) -> TrustRoots:
        """The vendors' roots with this one in NVIDIA's place."""
        return dataclasses.replace(vendor_roots(), nvidia=self.root.certificate)

    def make_gpu(self, **leaf: Any) -> Gpu:
        device = certify("GH100 A01 GSP BROM", self.family, now=self.now, seconds=(-YEAR, YEAR))
        return Gpu(device=device, leaf=self.issue(device, **leaf))

    def issue(self, device: Certified, *, name: str = "GH100 A01 GSP FMC LF", **options: Any) -> Certified:
        """Firmware's key, certified by the GPU's own."""
        given: dict[str, Any] = {"now": self.now, "ca": False, "extensions": {DICE: tcb_info()}} | options
        return certify(name, device, **given)

    def chain(self, gpu: Gpu) -> list[Certified]:
        return [gpu.leaf, gpu.device, self.family, self.root]

    def evidence(
        self,
        gpu: Gpu | None = None,
        *,
        nonce: bytes = NONCE,
        opaque: Mapping[int, bytes] | None = None,
        measurements: Mapping[int, bytes] | None = None,
        chain: Sequence[Certified] | None = None,
        **stated: Any,
    ) -> Evidence:
        """Evidence of one GPU. `stated`: fields of the JSON; ... leaves one out."""
        gpu = gpu or self.gpu
        unsigned = report_without_signature(nonce, measurements or MEASUREMENTS, opaque or OPAQUE)
        return pack(unsigned + gpu.leaf.sign(unsigned), chain or self.chain(gpu), nonce, **stated)

    def for_machine(self, report_data: bytes, gpu: Gpu | None = None, **options: Any) -> Evidence:
        """Bound to a machine's evidence."""
        return self.evidence(gpu, nonce=device_nonce(report_data), **options)


def report_without_signature(nonce: bytes, measurements: Mapping[int, bytes], opaque: Mapping[int, bytes]) -> bytes:
    """GET_MEASUREMENTS and MEASUREMENTS (DSP0274 1.1) up to the signature."""
    blocks = b"".join(struct.pack("<BBHBH", i, 1, 51, 1, 48) + m for i, m in measurements.items())
    fields = b"".join(struct.pack("<HH", n, len(v)) + v for n, v in opaque.items())
    request = bytes.fromhex("11e001ff") + nonce + b"\0"
    head = bytes.fromhex("11600000") + bytes([len(measurements)]) + len(blocks).to_bytes(3, "little")
    return request + head + blocks + b"\x77" * 32 + struct.pack("<H", len(fields)) + fields


def pack(report: bytes, chain: Sequence[Certified], nonce: bytes = NONCE, **stated: Any) -> Evidence:
    """NVIDIA's JSON around a report."""
    pem = b"".join(c.certificate.public_bytes(Encoding.PEM) for c in chain)
    table = {
        "arch": "HOPPER",
        "certificate": base64.b64encode(pem).decode(),
        "driver_version": "590.12",
        "evidence": base64.b64encode(report).decode(),
        "nonce": nonce.hex(),
        "vbios_version": "96.00.A5.00.01",
        "version": "1.0",
    }
    return restate(Evidence(type="nvidia-gpu", blob=json.dumps([table]).encode()), **stated)


def restate(whole: Evidence, /, **stated: Any) -> Evidence:
    """The same evidence with other fields around the report; ... leaves one out."""
    table = {**json.loads(whole.blob)[0], **stated}
    table = {name: value for name, value in table.items() if value is not ...}
    return dataclasses.replace(whole, blob=json.dumps([table]).encode())
