"""The vendors' root certificates, as shipped. A policy cannot name roots; only tests pass other ones.

A change of these files is a change of whom every user trusts: SHA-256 fingerprints are in README.md beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType

from cryptography import x509


@dataclass(frozen=True, kw_only=True)
class AmdChain:
    """One product line's intermediate (ASK, or ASVK for VLEKs) and its self-signed root (ARK)."""

    intermediate: x509.Certificate
    root: x509.Certificate


@dataclass(frozen=True, kw_only=True)
class TrustRoots:
    """Whom verifiers trust."""

    intel: x509.Certificate
    """Intel SGX Root CA, for TDX and SGX."""
    amd: Mapping[tuple[str, str], AmdChain]
    """By product line ("Milan", "Genoa", "Turin") and kind of key ("vcek", "vlek")."""
    aws: x509.Certificate
    """AWS Nitro Enclaves root G1."""
    nvidia: x509.Certificate
    """NVIDIA Device Identity CA."""


@cache
def vendor_roots() -> TrustRoots:
    """The vendors' own roots."""
    amd = {
        ("Milan", "vcek"): "amd_ask_ark_milan.pem",
        ("Milan", "vlek"): "amd_ask_ark_milan_vlek.pem",
        ("Genoa", "vcek"): "amd_ask_ark_genoa.pem",
        ("Genoa", "vlek"): "amd_ask_ark_genoa_vlek.pem",
        ("Turin", "vcek"): "amd_ask_ark_turin_vcek.pem",
        ("Turin", "vlek"): "amd_ask_ark_turin_vlek.pem",
    }
    return TrustRoots(
        intel=_load("intel_sgx_root_ca.pem")[0],
        amd=MappingProxyType({line: _amd_chain(name) for line, name in amd.items()}),
        aws=_load("aws_nitro_root_g1.pem")[0],
        nvidia=_load("nvidia_device_root.pem")[0],
    )


def _amd_chain(name: str) -> AmdChain:
    intermediate, root = _load(name)
    return AmdChain(intermediate=intermediate, root=root)


def _load(name: str) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(resources.files(__name__).joinpath(name).read_bytes())
