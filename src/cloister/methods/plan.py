"""`cloister plan`: what a job will need, from its files, before anything is started.

Data are tokenised for real; sizes come from the headers of the weight files; the machine's speed from a moment of the
job's own work. The arithmetic is in `estimate.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig

from cloister.adapters.size import Sizes, trained_parameters
from cloister.adapters.spf.rows import Heads
from cloister.agreement.job import check_positions, count_layers, find_cut
from cloister.attest.policy import AppraisalPolicy
from cloister.errors import ModelError
from cloister.job import Job
from cloister.jobfile import LoadedJob, ModelFiles, find_model, resolve
from cloister.methods import estimate
from cloister.methods.estimate import ModelSize
from cloister.methods.plan_parts import MethodPlan, best_time
from cloister.methods.plan_processes import busy_threads
from cloister.methods.plan_slice import plan_slice
from cloister.methods.plan_split import plan_split
from cloister.model.anatomy import DTYPES
from cloister.progress import Progress, task
from cloister.report.plan import PlanReport

_STORED_AS = {"float32": "F32", "bfloat16": "BF16"}
"""By [model] dtype: what safetensors calls it."""


def plan_job(loaded: LoadedJob, *, progress: Progress) -> PlanReport:
    """Estimate memory, disk, bytes on the wire and time for each role.

    Raises:
        JobError, DataError, ModelError: as a run would, for a fault that can be found without starting one.
    """
    job = loaded.job
    policy = loaded.policy_file()
    policy_bytes = AppraisalPolicy.load(policy).to_bytes() if policy else b""
    files = find_model(loaded.local_path(job.model.path), where=loaded.where("model", "path"))
    layers, cut = count_layers(files), find_cut(loaded, files)
    check_positions(loaded, files)
    with task(progress, "hashing the model", total=files.num_bytes, unit="bytes") as running:
        resolved = resolve(loaded, cut=cut, policy_bytes=policy_bytes, count=running.advance)
    config: Any = AutoConfig.from_pretrained(files.folder, local_files_only=True)  # Any: each architecture has its own
    model = _measure(config.get_text_config(), files, job, layers, cut)
    planned = (
        plan_slice(loaded, files, model, lambda: measure_rate(model, job), progress)
        if job.job.method == "slice"
        else plan_split(loaded, files, config, model, lambda: measure_rate(model, job), progress)
    )
    return PlanReport(
        job_id=resolved.job_id,
        job_name=job.job.name,
        method=job.job.method,
        architecture=(config.architectures or [config.model_type])[0],
        parameters=model.total,
        trainable_parameters=planned.trainable,
        layers=layers,
        former_layers=cut,
        hidden_size=model.hidden,
        activation_dtype=job.transport.activation_dtype,
        steps=planned.steps,
        tokens_per_step=job.training.batch_tokens,
        parties=planned.parties,
        roles=planned.roles,
        timing=planned.timing,
        masking=planned.masking,
        warnings=_warnings(job, planned),
    )


def measure_rate(model: ModelSize, job: Job) -> float:
    """Operations per second of matrix products of the model's shape on this machine's processor.

    One thread's best time is taken, times the threads of the job: an average would measure whatever else the machine
    does at this moment, and threads that wait for a busy processor are slower than one.
    """
    dtype = DTYPES[job.model.dtype]
    x_TD = torch.randn(job.training.max_tokens, model.hidden, dtype=dtype)
    w_DF = torch.randn(model.hidden, model.widest, dtype=dtype)
    return 2.0 * x_TD.numel() * model.widest / best_time(lambda: x_TD @ w_DF) * busy_threads(job.enclave)


def _measure(config: Any, files: ModelFiles, job: Job, layers: int, cut: int) -> ModelSize:
    shapes: dict[str, Sequence[int]] = {}
    stored = set[str]()
    for path in sorted(files.folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                piece = file.get_slice(name)
                shapes[name] = piece.get_shape()
                stored.add(piece.get_dtype())
    return estimate.measure_model(
        shapes,
        layers=layers,
        cut=cut,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        adapter=_trained(job, shapes, config, layers, cut),
        whole_adapter=_trained(job, shapes, config, layers, 0),
        mapped=stored == {_STORED_AS[job.model.dtype]},
    )


def _trained(job: Job, shapes: estimate.Shapes, config: Any, layers: int, first_layer: int) -> int:
    heads = Heads.of(config)
    if heads is None:
        raise ModelError("the configuration does not say how many attention heads there are", where=job.model.path)
    sizes = Sizes(
        hidden=config.hidden_size,
        heads=heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // heads.query,
        matrices=estimate.matrices(shapes, first_layer),
    )
    return trained_parameters(job.adapter, sizes, layers - first_layer)


def _warnings(job: Job, planned: MethodPlan) -> list[str]:
    found = ["times and memory are estimates from a short measurement of this machine", *planned.warnings]
    if keyless := [party.name for party in job.party if party.public_key is None]:
        found.append(f"job_id will differ once these parties have public keys: {', '.join(keyless)}")
    for party in planned.parties:
        if cut := party.truncated.prompts + party.truncated.responses:
            found.append(
                f"{party.name}: about {cut:,} texts are longer than max_tokens and lose their beginning or end"
            )
    return found
