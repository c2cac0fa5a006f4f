"""Attested sessions: how long a handshake takes, and how fast one core seals and opens records of 1 MiB.

python benchmarks/session.py [--handshakes 51] [--mib 1024]

Quotes are a test CA's TDX quotes over the transcript, verified by the production verifier with Intel's library; they
have the size and the chain of genuine ones. Making quotes is not counted: hardware does that. All times are processor
time of the one thread, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.attest_ca.dcap_ca import NOW, shared_ca, tdx_body
from tests.evidence import EVIDENCE, sample

from cloister.attest.claims import Claims
from cloister.attest.evidence import Evidence
from cloister.attest.policy import AppraisalPolicy
from cloister.attest.verify import inspect, verify
from cloister.channel.handshake import Established, Initiator, Responder, ResponderSettings
from cloister.channel.records import END, Opener, Sealer
from cloister.crypto.keys import PartyKey

JOB, PARTY, MIB = "ab" * 32, "bench", 1 << 20
CA, KEY = shared_ca(), PartyKey.generate()
POLICY = AppraisalPolicy(accept=("tdx",), any_measurement=True)


class TestCaAttester:
    """Makes quotes; `seconds` is the processor time that this took."""

    type = "tdx"

    def __init__(self) -> None:
        self.collateral = CA.collateral("tdx")
        self.seconds = 0.0

    def collect(self, report_data: bytes) -> Evidence:
        start = time.thread_time()
        quote = CA.tdx_quote(body=tdx_body(report_data=report_data))
        self.seconds += time.thread_time() - start
        return Evidence(type="tdx", blob=quote, collateral=self.collateral)


def appraise(evidence: Evidence, report_data: bytes, now: float) -> Claims:
    return verify(evidence, POLICY, report_data, now, roots=CA.roots)


def handshake(*, mutual: bool) -> float:
    """Processor seconds of one handshake, both ends, without making quotes."""
    ours, theirs = TestCaAttester(), TestCaAttester()
    start = time.thread_time()
    party = Initiator(job_id=JOB, party=PARTY, key=KEY, verify_evidence=appraise, attester=theirs if mutual else None)
    enclave = Responder(
        ResponderSettings(
            job_id=JOB,
            public_keys={PARTY: KEY.public},
            attester=ours,
            verify_evidence=appraise if mutual else None,
            require_evidence=mutual,
        )
    )
    reply = enclave.receive(party.start(NOW), NOW)
    assert isinstance(reply, bytes)
    finish, _ = party.receive(reply, NOW)
    assert isinstance(enclave.receive(finish, NOW), Established)
    return time.thread_time() - start - ours.seconds - theirs.seconds


def genuine() -> float:
    """Processor seconds of verifying Intel's genuine TDX quote, at a time when its collateral was valid."""
    evidence = Evidence(type="tdx", blob=sample("tdx/tdx_quote"), collateral=sample("tdx/tdx_quote_collateral.json"))
    start = time.thread_time()
    inspect(evidence, POLICY, None, 1_750_400_000)
    return time.thread_time() - start


def show(name: str, values: list[float], unit: str) -> None:
    print(f"{name:<58} {statistics.median(values):7.2f} {unit}   ({min(values):.2f} to {max(values):.2f})")


def records(mib: int) -> None:
    """Full records through `Sealer` and `Opener`, one batch of 32 after the other."""
    plain = os.urandom(MIB)
    sealing, opening = [], []
    for _ in range(5):
        sealer, opener = Sealer(bytes(32)), Opener(bytes(32))
        batches = mib // 32
        total_seal = total_open = 0.0
        for _ in range(batches):
            start = time.thread_time()
            sealed = [record for _ in range(32) for record in sealer.seal(plain)]
            total_seal += time.thread_time() - start
            assert sealed[0][0] == END
            start = time.thread_time()
            for record in sealed:
                opener.feed(record)
            total_open += time.thread_time() - start
        sealing.append(batches * 32 * MIB / total_seal / 1e9)
        opening.append(batches * 32 * MIB / total_open / 1e9)
    show("seal records of 1 MiB", sealing, "GB/s")
    show("open records of 1 MiB", opening, "GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--handshakes", type=int, default=51)
    parser.add_argument("--mib", type=int, default=1024)
    options = parser.parse_args()
    for mutual, name in ((True, "mutual handshake, two quote verifications"), (False, "one-sided handshake, one")):
        handshake(mutual=mutual)
        show(name, [1000 * handshake(mutual=mutual) for _ in range(options.handshakes)], "ms")
    if EVIDENCE.is_dir():
        show("verify a genuine TDX quote", [1000 * genuine() for _ in range(options.handshakes)], "ms")
    records(options.mib)


if __name__ == "__main__":
    main()
