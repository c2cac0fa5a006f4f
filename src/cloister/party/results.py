"""What a party has at the end, on its disk: there before it vouches for it, and taken up by a later start.

OUT/scores/SYSTEM.jsonl   its own examples' scores
OUT/adapter/              the PEFT folder, if the job releases it to this party
OUT/declared.json         what the job declares to all parties
OUT/kept.json             SHA-256 of the files above
OUT/receipt.json          last; replaced once other parties have countersigned it
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from cloister.adapters.files import CONFIG, WEIGHTS
from cloister.agreement.receipt import Receipt
from cloister.crypto.bundle.writer import disk_error
from cloister.crypto.sealing import write_durably
from cloister.errors import CloisterError, TransportError, VerificationError
from cloister.party.client import PartyClient, Results
from cloister.party.follower import Requests
from cloister.party.taking_part import with_reconnect
from cloister.progress import Progress

_SYSTEMS = ("base", "cloister")
_MODE = 0o666
"""Less the umask: files for the user and for other programs, not secrets of this one."""


def keep_results(out: Path, results: Results) -> None:
    """Write what the party got; the receipt last.

    Raises:
        VerificationError: "scores": of a system that there is not.
        CapacityError, DataError: the disk does not take it.
    """
    files = _files(results)
    for name, content in files.items():
        _write(out / name, content)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    _write(out / "kept.json", json.dumps(hashes, indent=1).encode())
    keep_receipt(out, results.receipt)


def keep_receipt(out: Path, receipt: Receipt) -> None:
    """Write the receipt with the countersignatures that it has now. Raises: CapacityError, DataError."""
    _write(out / "receipt.json", receipt.to_bytes())


def kept_results(out: Path, client: PartyClient, *, released: bool) -> Results | None:
    """What an earlier start has kept of this very job, if all of it is whole.

    Args:
        released: an adapter belongs to it.
    """
    try:
        receipt = Receipt.from_bytes((out / "receipt.json").read_bytes())
        files = _read(out)
        adapter = {name: files[f"adapter/{name}"] for name in (CONFIG, WEIGHTS)} if released else {}
        scores = {s: files[f"scores/{s}.jsonl"].decode() for s in _SYSTEMS if f"scores/{s}.jsonl" in files}
        return client.accept_kept(receipt, json.loads(files["declared.json"]), scores, adapter)
    except (OSError, ValueError, KeyError, CloisterError):
        return None  # then it is fetched again, or the enclave's absence is an error


def completed(session: Requests, client: PartyClient, out: Path, *, released: bool) -> Results | None:
    """What an earlier start has kept, if every party has countersigned it by now: then nothing needs to be fetched.

    Raises:
        ProtocolError, VerificationError: see `PartyClient.complete`. CapacityError, DataError: see `keep_receipt`.
    """
    kept = kept_results(out, client, released=released)
    if kept is None or kept.complete:
        return kept
    found = client.complete(session, kept)
    if not found.complete:
        return None
    keep_receipt(out, found.receipt)
    return found


def come_back(
    attempt: Callable[[], Results], out: Path, client: PartyClient, *, released: bool, progress: Progress
) -> Results:
    """`with_reconnect`, with what an earlier start has kept.

    Raises:
        TransportError: the enclave stays away, and what is here is not whole.
    """
    try:
        return with_reconnect(attempt, lambda: kept_results(out, client, released=released), progress=progress)
    except TransportError as exc:
        if (out / "receipt.json").exists():
            exc.hint = (
                f"{exc.hint}; results are in {out} already, but damaged or of another job: restore the files as they "
                "were, or have the enclave started with --serve and all parties join again"
            )
        raise


def _files(results: Results) -> dict[str, bytes]:
    """Contents by path in OUT."""
    if unknown := set(results.scores) - set(_SYSTEMS):
        raise VerificationError("scores", f"the enclave sent scores of an unknown system {min(unknown)[:40]!r}")
    files = {f"scores/{system}.jsonl": lines.encode() for system, lines in results.scores.items()}
    files |= {f"adapter/{name}": content for name, content in results.adapter.items()}
    return files | {"declared.json": json.dumps(results.declared, indent=1).encode()}


def _read(out: Path) -> Mapping[str, bytes]:
    """All files that `kept.json` lists. Raises: VerificationError, OSError, ValueError: one is not what it was."""
    files, hashes = {}, json.loads((out / "kept.json").read_bytes())
    if not isinstance(hashes, dict):
        raise VerificationError("scores", "is malformed", where=str(out / "kept.json"))
    for name, digest in hashes.items():
        files[name] = (out / name).read_bytes()
        if hashlib.sha256(files[name]).hexdigest() != digest:
            raise VerificationError("scores", f"{name} has changed since it was kept", where=str(out / name))
    return files


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise disk_error(exc, path.parent, 0) from exc
    write_durably(path, content, mode=_MODE)
