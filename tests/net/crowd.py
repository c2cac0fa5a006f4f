"""Many parties as threads of one process, each the real one: 64 processes with a copy of torch each would be too many.

python -m tests.net.crowd JOB ADDRESS FOLDER PARTY...      keys are FOLDER/PARTY.key; prints adapter hashes as JSON
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cloister.crypto.keys import PartyKey
from cloister.jobfile import load_job
from cloister.party.join import join_split
from cloister.party.taking_part import Entering
from cloister.progress import Silent


def take_part(job: Path, address: str, folder: Path, party: str) -> str:
    """One party's whole way; returns the hash of the adapter in its receipt."""
    entering = Entering(
        loaded=load_job(job),
        party=party,
        key=PartyKey.load(folder / f"{party}.key"),
        out=folder / party,
        enclave=address,
        insecure_simulated=True,
    )
    report = join_split(entering, progress=Silent())
    if any("countersigned" in warning for warning in report.warnings):
        raise RuntimeError(f"{party}: {report.warnings}")
    return report.adapter_sha256


def main(job: Path, address: str, folder: Path, parties: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(len(parties)) as pool:
        ended = {party: pool.submit(take_part, job, address, folder, party) for party in parties}
    return {party: future.result() for party, future in ended.items()}


if __name__ == "__main__":
    found = main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    sys.stdout.write(json.dumps(found))
