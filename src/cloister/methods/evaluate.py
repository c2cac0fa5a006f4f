"""`cloister evaluate`: the scores of a finished run, computed again from its per-example scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from cloister.errors import DataError
from cloister.evaluation.compare import load_scores, scores_path
from cloister.evaluation.rows import ByParty, results_rows
from cloister.report.model import ALL, ResultRow, RunReport, System
from cloister.report.outputs import EvaluateReport, JoinReport

SYSTEMS: tuple[System, ...] = get_args(System)


def evaluate_run(folder: Path) -> EvaluateReport:
    """Rows for every system, party and task, with 95 % intervals.

    Args:
        folder: a run folder (report.json, parties/NAME/scores/SYSTEM.jsonl), or the folder of one party that joined
            (join.json, scores/SYSTEM.jsonl), which knows its own examples only.

    Raises:
        DataError: the report or scores are missing or malformed.
    """
    if (folder / "report.json").is_file():
        report = RunReport.read(folder / "report.json")
        job_id, systems = report.job_id, _of_run(folder, [party.name for party in report.parties])
        rows = [row for system, scores in systems.items() for row in results_rows(system, scores)]
        return EvaluateReport(source=str(folder), job_id=job_id, results=rows)
    joined = JoinReport.read(folder / "join.json")
    paths = {system: folder / "scores" / f"{system}.jsonl" for system in SYSTEMS}
    own = {system: {joined.party: load_scores(path)} for system, path in paths.items() if path.is_file()}
    if not own:
        raise DataError("the folder holds no scores", where=str(folder / "scores"))
    warning = f"the test set of {joined.party} alone: scores of other parties stay with them"
    return EvaluateReport(source=str(folder), job_id=joined.job_id, results=_party_rows(own), warnings=[warning])


def _of_run(folder: Path, parties: list[str]) -> dict[System, ByParty]:
    """The systems of which any party has scores; then every party must have them."""
    systems: dict[System, ByParty] = {}
    for system in SYSTEMS:
        paths = {party: scores_path(folder, party, system) for party in parties}
        if any(path.is_file() for path in paths.values()):
            systems[system] = {party: load_scores(path) for party, path in paths.items()}
    if not systems:
        raise DataError("the folder holds no scores", where=str(folder / "parties"))
    return systems


def _party_rows(systems: Mapping[System, ByParty]) -> list[ResultRow]:
    """Without the pooled rows, which would say the same again under another name."""
    rows = [row for system, scores in systems.items() for row in results_rows(system, scores)]
    return [row for row in rows if row.party != ALL]
