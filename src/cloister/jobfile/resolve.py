"""The resolved job: everything that all parties agree to, as one canonical text whose SHA-256 is `job_id`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import cloister
from cloister.errors import JobError
from cloister.job import Job
from cloister.jobfile.load import LoadedJob
from cloister.jobfile.model_files import ModelFiles, find_model

FORMAT_VERSION = 1
"""Raised whenever the canonical form or the meaning of a shared field changes."""


@dataclass(frozen=True, kw_only=True)
class ResolvedJob:
    """A job whose model and policy have been read and hashed.

    `canonical` is UTF-8 JSON with sorted keys and no spaces; two machines that hold equal bytes agree on the job.
    """

    job: Job
    loaded: LoadedJob
    cut: int
    model: ModelFiles
    canonical: bytes
    job_id: str


def resolve(
    loaded: LoadedJob, *, cut: int, policy_bytes: bytes, count: Callable[[int], object] = lambda _: None
) -> ResolvedJob:
    """Read and hash the model, and fix the job's canonical form.

    Args:
        cut: number of former layers that `[model] cut` means for this model.
        policy_bytes: content of the appraisal policy, exactly as in its file.
        count: is told the size of every block of the model that was hashed, for a progress bar.

    Raises:
        ModelError: the model folder is incomplete.
        JobError: a value cannot be written in canonical form.
    """
    job = loaded.job
    model = find_model(loaded.local_path(job.model.path), where=loaded.where("model", "path"))
    content = {
        "cloister": cloister.__version__,
        "cut": cut,
        "format": FORMAT_VERSION,
        "job": shared_content(job),
        "model_files": model.digests(count),
        "policy_sha256": hashlib.sha256(policy_bytes).hexdigest(),
    }
    canonical = canonical_json(content)
    job_id = hashlib.sha256(canonical).hexdigest()
    return ResolvedJob(job=job, loaded=loaded, cut=cut, model=model, canonical=canonical, job_id=job_id)


def shared_content(section: BaseModel) -> dict[str, Any]:  # Any: JSON
    """The fields of a section, at all depths, that are not marked local."""
    fields = type(section).model_fields
    return {name: _shared_value(getattr(section, name)) for name, field in fields.items() if not is_local(field)}


def is_local(field: FieldInfo) -> bool:
    """Whether a field differs per machine and so stays out of the job's identity."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and extra.get("local") is True


def canonical_json(content: Any) -> bytes:  # Any: JSON
    """UTF-8 JSON with sorted keys, no spaces, floats in their shortest exact form (Python's repr).

    Raises:
        JobError: the content holds an infinity, a NaN or a lone surrogate.
    """
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8")
    except ValueError as exc:
        raise JobError(f"the job has no canonical form: {exc}") from exc


def _shared_value(value: Any) -> Any:  # Any: JSON
    if isinstance(value, BaseModel):
        return shared_content(value)
    return [_shared_value(item) for item in value] if isinstance(value, list) else value
