"""The job file on disk: read it with errors that name file, line and key; resolve it to `job_id`."""

from cloister.jobfile.load import JobFaultsError, LoadedJob, load_job, parse_job
from cloister.jobfile.model_files import ModelFiles, find_model
from cloister.jobfile.resolve import FORMAT_VERSION, ResolvedJob, resolve, shared_content
from cloister.jobfile.write import render_job

__all__ = [
    "FORMAT_VERSION",
    "JobFaultsError",
    "LoadedJob",
    "ModelFiles",
    "ResolvedJob",
    "find_model",
    "load_job",
    "parse_job",
    "render_job",
    "resolve",
    "shared_content",
]
