"""From what the processes of a run left behind to its report."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import cloister
from cloister.agreement.job import OpenJob, count_layers
from cloister.crypto.keys import fingerprint
from cloister.evaluation.compare import compare_systems, compare_with_foreign, scores_path
from cloister.evaluation.rows import ByParty, cross_rows, results_rows
from cloister.evaluation.scores import Scores
from cloister.methods.baselines import Baseline
from cloister.methods.host import describe_host
from cloister.report.html import write_html
from cloister.report.model import (
    CurvePoint,
    Masking,
    Party,
    ReceiptRef,
    RoundRow,
    RunReport,
    Sample,
    System,
    Training,
    Wire,
)
from cloister.report.outputs import JoinReport


class Stopwatch:
    """Seconds per phase, in order."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._begun = self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """End a phase."""
        now = time.monotonic()
        self.laps[name], self._last = now - self._last, now

    @property
    def total(self) -> float:
        return time.monotonic() - self._begun


def write_report(
    opened: OpenJob,
    out: Path,
    joined: Sequence[JoinReport],
    baselines: Mapping[str, Baseline],
    *,
    command: str,
    clock: Stopwatch,
) -> RunReport:
    """Gather everything into OUT: scores, metrics, receipt, adapter if released, report.json and report.html (last)."""
    local = {name.partition(":")[2]: b.scores for name, b in baselines.items() if name.startswith("local:")}
    systems = _systems(out, list(opened.parties), baselines, local)
    for system, by_party in systems.items():
        for party, scores in by_party.items():
            path = scores_path(out, party, system)
            path.write_text(scores.to_json_lines(), encoding="utf-8")
    job, first = opened.resolved.job, joined[0]
    declared = json.loads((out / "parties" / first.party / "declared.json").read_text())
    receipt = (out / "parties" / first.party / "receipt.json").read_bytes()
    (out / "receipt.json").write_bytes(receipt)
    released = [j.party for j in joined if j.released]
    if released:
        shutil.copytree(out / "parties" / released[0] / "adapter", out / "adapter", dirs_exist_ok=True)
    curves = {"cloister": declared["curve"], **{name: b.curve for name, b in baselines.items()}}
    (out / "metrics.jsonl").write_text(
        "".join(json.dumps({"system": s, **point}) + "\n" for s, curve in curves.items() for point in curve)
    )
    timing = _timing(joined, declared, clock)
    report = RunReport(
        job_id=opened.resolved.job_id,
        job_name=job.job.name,
        method=job.job.method,
        version=cloister.__version__,
        created=datetime.now(UTC).replace(microsecond=0),
        command=command,
        model=opened.resolved.model.folder.name,
        cut=_cut(opened),
        attestation=first.attestation,
        parties=[_party(opened, j) for j in joined],
        released_to=released,
        results=[row for system, scores in systems.items() for row in results_rows(system, scores)],
        local_cross=cross_rows(local),
        comparisons=compare_systems(systems) + (compare_with_foreign(systems["cloister"], local) if local else []),
        wire=Wire.of({j.party: (j.wire.bytes_up, j.wire.bytes_down) for j in joined}, job.transport.activation_dtype),
        timing=timing,
        training=Training(**{k: declared["training"][k] for k in ("tokens", "tokens_per_s", "steps")}),
        rounds=[RoundRow(**row) for row in declared.get("rounds", [])],
        fits=first.fits,
        masking=_masking(joined),
        curves={name: [CurvePoint(**point) for point in curve] for name, curve in curves.items()},
        adapter_sha256=first.adapter_sha256,
        receipt=ReceiptRef(path="receipt.json", sha256=hashlib.sha256(receipt).hexdigest()),
        samples=_samples(out, list(opened.parties)),
        host=describe_host(),
        warnings=_warnings(joined),
    )
    write_html(report, out / "report.html")
    part = out / "report.json.part"
    part.write_text(report.to_json(), encoding="utf-8")
    part.replace(out / "report.json")
    return report


def _cut(opened: OpenJob) -> str:
    layers = count_layers(opened.resolved.model)
    if opened.resolved.job.job.method == "slice":
        return f"all {layers} layers' products on accelerators, behind masks"
    return f"{opened.resolved.cut} of {layers} layers at the parties"


def _masking(joined: Sequence[JoinReport]) -> Masking | None:
    """What crossed between all parties' enclaves and their accelerators."""
    own = [j.masking for j in joined if j.masking is not None]
    if not own:
        return None
    return Masking(
        pads=own[0].pads,
        bits=own[0].bits,
        checked=all(m.checked for m in own),
        one_host=any(m.one_host for m in own),
        bytes_up=sum(m.bytes_up for m in own),
        bytes_down=sum(m.bytes_down for m in own),
    )


def _systems(
    out: Path, parties: list[str], baselines: Mapping[str, Baseline], local: Mapping[str, ByParty]
) -> dict[System, ByParty]:
    """Per-example scores by system; "local" is each party's own model on its own test set."""
    systems: dict[System, ByParty] = {}
    if base := _read_scores(out, parties, "base"):
        systems["base"] = base
    if local:
        systems["local"] = {party: local[party][party] for party in parties}
    if "central" in baselines:
        systems["central"] = baselines["central"].scores
    systems["cloister"] = _read_scores(out, parties, "cloister")
    return systems


def _read_scores(out: Path, parties: list[str], system: System) -> dict[str, Scores]:
    paths = {party: scores_path(out, party, system) for party in parties}
    if not all(path.exists() for path in paths.values()):
        return {}
    return {p: Scores.from_json_lines(path.read_text(encoding="utf-8"), str(path)) for p, path in paths.items()}


def _party(opened: OpenJob, joined: JoinReport) -> Party:
    return Party(
        name=joined.party,
        public_key_fingerprint=fingerprint(opened.parties[joined.party]),
        records=joined.records,
        truncated=joined.truncated,
    )


def _timing(
    joined: Sequence[JoinReport], declared: Mapping[str, Mapping[str, float]], clock: Stopwatch
) -> dict[str, float]:
    """Seconds per phase. Phases of parties are those of the slowest one; baselines begin beside the rest."""
    phases = dict.fromkeys(name for j in joined for name in j.timing)
    timing = {name: max(j.timing.get(name, 0.0) for j in joined) for name in phases}
    timing |= {name: float(seconds) for name, seconds in declared["timing"].items()}
    timing["baselines after that"] = clock.laps["baselines after that"]
    return {name: round(seconds, 3) for name, seconds in timing.items()} | {"total": round(clock.total, 3)}


def _samples(out: Path, parties: list[str]) -> list[Sample]:
    paths = [out / "parties" / party / "samples.json" for party in parties]
    return [Sample(**row) for path in paths if path.exists() for row in json.loads(path.read_text())]


def _warnings(joined: Sequence[JoinReport]) -> list[str]:
    found = dict.fromkeys(warning for j in joined for warning in j.warnings)
    for j in joined:
        if j.truncated.prompts or j.truncated.responses:
            found[
                f"{j.party}: {j.truncated.prompts} prompts and {j.truncated.responses} responses were longer than "
                "[training] max_tokens and lost their ends"
            ] = None
    return list(found)
