"""A party's data as sealed bundles: former layers once over every pack, encrypted as it goes.

FOLDER/KIND.bundle      the sealed bundle
FOLDER/KIND.key         its data key, 32 bytes, mode 0600: never leaves this machine unwrapped
FOLDER/counts.json      records and truncations, written last: bundles without it are begun anew
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cloister.crypto.bundle import BundleHeader, BundleWriter, SealedReader, VerifiedBundle, verify_bundle
from cloister.crypto.keys import DATA_KEY_BYTES, DataKey, PartyKey
from cloister.crypto.sealing import write_durably
from cloister.data.packing import Pack
from cloister.data.payload import max_payload_bytes, write_payload
from cloister.data.prepare import KINDS, Part, PartyData, files_sha256, prepare
from cloister.errors import CloisterError, DataError, RunError
from cloister.jobfile import ResolvedJob
from cloister.model.anatomy import load_model, load_tokenizer
from cloister.model.cut import Former
from cloister.model.repacked import repack
from cloister.progress import Progress, Task, task

__all__ = ["SealedParty", "seal_party"]


@dataclass(frozen=True, kw_only=True)
class SealedParty:
    """Finished bundles with their data keys, by kind, and the counts of what is in them."""

    bundles: dict[str, VerifiedBundle]
    data_keys: dict[str, DataKey]
    records: dict[str, int]
    truncated: dict[str, int]

    @property
    def commitments(self) -> dict[str, bytes]:
        """By kind, for the manifest."""
        return {kind: bundle.commitment for kind, bundle in self.bundles.items()}


def seal_party(
    resolved: ResolvedJob,
    party: str,
    key: PartyKey,
    folder: Path,
    *,
    device: str,
    progress: Progress,
    signed: bool = False,
) -> SealedParty:
    """Make the party's bundles, or take up finished ones of the same job from an earlier start.

    Args:
        signed: these bundles have been sent, or a manifest with them signed: others would not do.

    Raises:
        DataError, ModelError: the party's data or model are wrong, or signed bundles are damaged.
        CapacityError: the disk is full; nothing half-written is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = (resolved.loaded.data_file(party, "train"), resolved.loaded.data_file(party, "test"))
    content = files_sha256(files)
    finished = _finished(resolved, party, key, folder, content)
    if finished is not None:
        return finished
    if signed:
        raise DataError(
            "the bundles that this party has sent or agreed to train on are damaged, or its data have changed",
            where=str(folder),
            hint="restore the folder and the data as they were; for other data make another job",
        )
    (folder / "counts.json").unlink(missing_ok=True)
    job = resolved.job
    with task(progress, "reading records"):
        data = prepare(job, load_tokenizer(resolved.model.folder), *files)
    with task(progress, "loading former layers"):
        model = load_model(resolved.model.folder, job.model.dtype, device)
        former = Former(repack(model, job.enclave.repack), resolved.cut)
    tokens = sum(len(p) for part in data.parts.values() for p in part.packs)
    with task(progress, "former layers", total=tokens, unit="tokens") as running:
        for kind, part in data.parts.items():
            _seal(resolved, party, key, folder, kind, part, former, running)
    _write_counts(folder, data, content)
    sealed = _finished(resolved, party, key, folder, content)
    if sealed is None:
        raise RunError("the bundles just written cannot be read back", where=str(folder), hint="check the disk")
    return sealed


def _seal(
    resolved: ResolvedJob, party: str, key: PartyKey, folder: Path, kind: str, part: Part, former: Former, running: Task
) -> None:
    job = resolved.job
    hidden = former.config.get_text_config().hidden_size
    wire = job.transport.activation_dtype
    header = BundleHeader(
        job_id=resolved.job_id,
        party=party,
        kind=kind,  # type: ignore[arg-type]  # one of KINDS
        schema={"activation_dtype": wire, "hidden": hidden},
        counts={"records": part.records, "packs": len(part.packs), "tokens": sum(map(len, part.packs))},
        chunk_bytes=job.transport.chunk_mib << 20,
        max_payload_bytes=max_payload_bytes(part.packs, part.examples, hidden, wire),
    )
    with BundleWriter(folder / f"{kind}.bundle", header, key) as writer:
        write_payload(writer.write, _activations(former, part.packs, running), part.examples, wire)
        write_durably(folder / f"{kind}.key", writer.data_key.reveal())


def _activations(former: Former, packs: list[Pack], running: Task) -> Iterator[Pack]:
    for pack in packs:
        on_device = pack.to(former.device)
        activation_TD = former(on_device.given, on_device.layout.position_T, on_device.layout)
        yield pack.with_activations(activation_TD.cpu())
        running.advance(len(pack))


def _write_counts(folder: Path, data: PartyData, content: str) -> None:
    truncated = {"prompts": data.truncated.prompts, "responses": data.truncated.responses}
    records = {kind: part.records for kind, part in data.parts.items()}
    counts = {"records": records, "truncated": truncated, "files_sha256": content}
    write_durably(folder / "counts.json", json.dumps(counts).encode())


def _finished(resolved: ResolvedJob, party: str, key: PartyKey, folder: Path, content: str) -> SealedParty | None:
    """Complete bundles of this very job, key and data, or None."""
    try:
        counts = json.loads((folder / "counts.json").read_text())
        if counts["files_sha256"] != content:
            return None
        kinds = [kind for kind in KINDS if kind != "validation" or resolved.job.data.validation > 0]
        records = {kind: int(counts["records"][kind]) for kind in kinds}
        truncated = {part: int(counts["truncated"][part]) for part in ("prompts", "responses")}
        data_keys = {kind: DataKey((folder / f"{kind}.key").read_bytes()[: DATA_KEY_BYTES + 1]) for kind in kinds}
        bundles = {
            kind: verify_bundle(folder / f"{kind}.bundle", job_id=resolved.job_id, party=party, public_key=key.public)
            for kind in kinds
        }
        for kind, bundle in bundles.items():
            with SealedReader(bundle, data_keys[kind]) as reader:
                reader.read(0, 1)  # the key file is this bundle's
    except (OSError, ValueError, KeyError, TypeError, CloisterError):
        return None
    return SealedParty(bundles=bundles, data_keys=data_keys, records=records, truncated=truncated)
