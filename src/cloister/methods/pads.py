"""`cloister pads`: a party's pads for a whole job, computed before it starts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoConfig

from cloister.agreement.job import OpenJob, open_job
from cloister.crypto.bundle.writer import disk_error
from cloister.data.prepare import PartyData, prepare
from cloister.errors import UsageError
from cloister.jobfile import LoadedJob
from cloister.masking.budget import PadBudget, with_spare
from cloister.masking.layout import Layout, lay_out
from cloister.masking.skeleton import plan_groups
from cloister.masking.store import StoreMaker
from cloister.masking.stream import stream_weights
from cloister.model.anatomy import load_tokenizer
from cloister.progress import Progress, Task, task
from cloister.report.plan import PadsReport
from cloister.silo.budget import party_budget
from cloister.silo.keeper import find_keeper

_MILLION = 1e6


def make_pads(
    loaded: LoadedJob,
    party: str,
    out: Path,
    *,
    spare: float,
    anew: bool,
    insecure_simulated: bool,
    progress: Progress,
) -> PadsReport:
    """Compute a party's pads into a store, or go on where this was cut.

    Args:
        out: folder of the store; made if it is not there.
        spare: share of rows beyond what the job takes if nothing interrupts it.
        anew: whether a store that is partly used may be given up. insecure_simulated: see `find_keeper`.

    Raises:
        UsageError: the job keeps no pads, this machine cannot keep them, or the folder holds others.
        JobError, DataError, ModelError: what the job names is missing or wrong.
        CapacityError: the disk is too small. VerificationError: the model is not the job's.
    """
    started = time.monotonic()
    _require_precomputed(loaded)
    opened = open_job(loaded, progress=progress)
    data = _read_data(opened, party, progress)
    budget = _budget(opened, data)
    job = opened.resolved.job
    rows = with_spare(budget.rows, spare, at_least=0)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise disk_error(exc, out, 0) from exc
    keeper = find_keeper(opened, party, out, insecure_simulated=insecure_simulated)
    layout = lay_out(plan_groups(opened.resolved.model.folder), rows, parts=job.masking.bits // 8)
    with _counted(progress, layout) as running:
        maker = StoreMaker(
            out,
            job_id=bytes.fromhex(opened.resolved.job_id),
            party=party,
            rows=rows,
            key=keeper.key,
            counter=keeper.counter,
            anew=anew,
            count=lambda multiply_adds: running.advance(multiply_adds / _MILLION),
        )
        with maker:
            stream_weights(
                opened.resolved.model.folder,
                json.loads(opened.resolved.canonical)["model_files"],
                bits=job.masking.bits,
                sinks=[maker],
            )
    return PadsReport(
        job_id=opened.resolved.job_id,
        party=party,
        path=str(out),
        kept_by=keeper.key.kind,
        insecure=keeper.insecure,
        rows=sum(stream.rows for stream in layout.streams),
        streams=len(layout.streams),
        disk_bytes=layout.sealed_bytes,
        multiply_adds=layout.multiply_adds,
        continued=maker.continued,
        given_up=maker.given_up,
        seconds=time.monotonic() - started,
        warnings=_warnings(keeper.insecure, maker.given_up),
    )


def _require_precomputed(loaded: LoadedJob) -> None:
    job = loaded.job
    if job.job.method != "slice":
        message, key = f'method "{job.job.method}" needs no pads', ("job", "method")
    elif job.masking.pads != "precomputed":
        message, key = f'pads = "{job.masking.pads}" computes none beforehand', ("masking", "pads")
    else:
        return
    raise UsageError(message, where=loaded.where(*key), hint='this is for method "slice" with pads = "precomputed"')


def _read_data(opened: OpenJob, party: str, progress: Progress) -> PartyData:
    loaded = opened.resolved.loaded
    train, test = loaded.data_file(party, "train"), loaded.data_file(party, "test")
    with task(progress, "tokenising"):
        return prepare(opened.resolved.job, load_tokenizer(opened.resolved.model.folder), train, test)


def _budget(opened: OpenJob, data: PartyData) -> PadBudget:
    folder = opened.resolved.model.folder
    config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    return party_budget(opened.resolved.job, data, plan_groups(folder), vocabulary=config.vocab_size)


@contextmanager
def _counted(progress: Progress, layout: Layout) -> Iterator[Task]:
    total = layout.multiply_adds / _MILLION
    with task(progress, "computing pads", total=total, unit="million products") as running:
        yield running


def _warnings(insecure: bool, given_up: str) -> list[str]:
    found = []
    if insecure:
        found.append("INSECURE: key and counter of these pads lie on the disk, whoever copies it can use pads twice")
    if given_up:
        found.append(f"pads that were here are given up: {given_up}")
    return found
