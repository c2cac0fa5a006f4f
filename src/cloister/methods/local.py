"""A whole job on one machine: the processes of a deployment, the baselines beside them, and the report.

OUT/job.toml              the job with this run's keys and absolute paths
OUT/policy.toml           the policy made up for a simulated enclave, unless the job names one
OUT/enclave/              bundles as they arrived (sealed)
OUT/parties/NAME/         what each party has: key, bundles, scores, receipt, adapter if released
OUT/baselines/            scores of the systems to compare with
OUT/logs/                 what each process said
OUT/report.html, report.json, receipt.json, metrics.jsonl, adapter/ (if released)
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from cloister.accelerator.address import socket_folder
from cloister.agreement.job import OpenJob, check_positions, find_cut, open_job
from cloister.attest.backends.simulated import measure_source
from cloister.crypto.keys import PartyKey
from cloister.crypto.sealing import write_durably
from cloister.data.prepare import files_sha256
from cloister.errors import JobError, RunError, UsageError
from cloister.job import Job, PartySection
from cloister.jobfile import LoadedJob, find_model, load_job, render_job, shared_content
from cloister.methods.baselines import KINDS, Kind, read_baselines
from cloister.methods.host import usable_cpus
from cloister.methods.processes import Role, Roles
from cloister.methods.result import Stopwatch, write_report
from cloister.progress import Progress, task
from cloister.report.model import RunReport
from cloister.report.outputs import JoinReport

_OTHER_VERSION = "the folder holds a run of this job with another model, policy or version of cloister"


def run_job(
    loaded: LoadedJob,
    out: Path,
    *,
    serve: bool,
    command: str,
    progress: Progress,
    samples: int = 1,
    insecure_not_confidential: bool = False,
    on_report: Callable[[RunReport], None] = lambda report: None,
) -> RunReport:
    """Run a job with all its roles on this machine, or continue one that was interrupted.

    A run that is complete is not run again: its report is returned.

    Args:
        serve: keep the enclave up after the report is written, until interrupted.
        samples: how many of its test prompts each party answers with the tuned model, for the report.
        on_report: is shown the report before serving begins, which only an interrupt ends.

    Raises:
        UsageError: the folder holds another job, or the job's method has nothing to serve.
        CloisterError: the first role that failed, with its message and exit code.
    """
    clock = Stopwatch()
    if serve:
        loaded.require_queries()
    opened = claim_folder(loaded, out, progress=progress)
    if (out / "report.json").exists() and not serve:
        return RunReport.read(out / "report.json")
    compared: list[Kind] = [kind for kind in KINDS if kind in loaded.job.evaluation.baselines]
    threads, party_threads = _share_processors(loaded.job)
    (out / "logs").mkdir(exist_ok=True)
    with ExitStack() as ends:
        roles = ends.enter_context(Roles())
        if opened.resolved.job.job.method == "slice":
            sockets = ends.enter_context(socket_folder())
            opened = _with_accelerators(roles, opened, out, sockets, progress)
        flags = ["--insecure-simulated", *(["--insecure-not-confidential"] if insecure_not_confidential else [])]
        address = _start_enclave(roles, out, flags, serve=serve, threads=threads, progress=progress)
        parties = [
            _start_party(roles, out, name, address, samples, flags, party_threads, progress) for name in opened.parties
        ]
        clock.lap("starting")
        for kind in compared:
            _start_baseline(roles, out, kind, threads, progress)
        joined = [JoinReport.model_validate_json(result) for result in roles.wait(parties)]
        clock.lap("parties and enclave")
        roles.wait([role for role in roles.started if role.name in compared])
        clock.lap("baselines after that")
        with task(progress, "statistics and report"):
            baselines = read_baselines(opened.resolved, compared, out / "baselines")
            report = write_report(opened, out, joined, baselines, command=command, clock=clock)
        if serve:
            on_report(report)
            with task(progress, f"answering queries at {address}, Ctrl-C ends it"):
                roles.wait(roles.started)
    return report


def claim_folder(loaded: LoadedJob, out: Path, *, progress: Progress) -> OpenJob:
    """Make OUT a run's folder, or take up the run that is in it. A death at any moment leaves a folder to go on with.

    Raises:
        UsageError: it holds another job, or this one with other data or another version.
        JobError, ModelError: the job cannot be run.
    """
    out.mkdir(parents=True, exist_ok=True)
    opened = open_job(_localise(loaded, out.resolve()), progress=progress)
    _claim_job(out, opened)
    _claim_data(out, opened)
    return opened


def _write(path: Path, text: str) -> None:
    """Whole or not at all: the next start believes what stands here."""
    write_durably(path, text.encode(), mode=0o666)


def _localise(loaded: LoadedJob, out: Path) -> LoadedJob:
    """The job as this run's processes read it: keys made where missing, absolute paths, a policy."""
    _check_paths(loaded)
    missing = [party.name for party in loaded.job.party if party.public_key is None]
    keys = {name: _key(out / "parties" / name).public.hex() for name in missing}
    job = loaded.with_public_keys(keys).job
    attester = "simulated" if job.enclave.attester == "auto" else job.enclave.attester
    policy = loaded.policy_file()
    if policy is None and attester != "simulated":
        hint = 'add policy = "policy.toml"; one is made up for a simulated enclave only'
        raise JobError("the job names no appraisal policy", where=loaded.where("enclave", "policy"), hint=hint)
    if policy is None:
        policy = _made_up_policy(out)
    parties = [_with_paths(party, loaded) for party in job.party]
    changes = {
        "party": parties,
        "enclave": job.enclave.model_copy(update={"policy": str(policy), "attester": attester, **_local(loaded)}),
        "model": job.model.model_copy(update={"path": str(loaded.local_path(job.model.path))}),
    }
    job = job.model_copy(update=changes)
    path = out / "job.toml"
    if path.exists() and shared_content(load_job(path).job) != shared_content(job):
        raise UsageError("the folder holds a run of another job", where=str(out), hint="choose another --out")
    _write(path, render_job(job))
    return load_job(path)


def _local(loaded: LoadedJob) -> dict[str, str]:
    value = loaded.job.enclave.collateral
    return {} if value is None else {"collateral": str(loaded.local_path(value))}


def _check_paths(loaded: LoadedJob) -> None:
    """Find what is missing before anything is written, and name the line of the user's own file."""
    model = find_model(loaded.local_path(loaded.job.model.path), where=loaded.where("model", "path"))
    find_cut(loaded, model)
    check_positions(loaded, model)
    for party in loaded.job.party:
        _with_paths(party, loaded)


def _made_up_policy(out: Path) -> Path:
    """A policy for this installation. One that a run was begun with is never replaced: its receipt needs it."""
    path, text = out / "policy.toml", _simulated_policy()
    if not (out / "job_id").exists():
        _write(path, text)
    elif not (out / "report.json").exists() and path.read_text(encoding="utf-8") != text:
        raise UsageError(_OTHER_VERSION, where=str(out), hint="choose another --out")
    return path


def _with_paths(party: PartySection, loaded: LoadedJob) -> PartySection:
    paths = {part: str(loaded.data_file(party.name, part)) for part in ("train", "test")}
    return party.model_copy(update=paths)


def _key(folder: Path) -> PartyKey:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "party.key"
    if path.exists():
        return PartyKey.load(path)
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    key = PartyKey.generate()
    key.save(part)
    part.replace(path)
    return key


def _simulated_policy() -> str:
    return (
        "# Made up for a run on one machine. It accepts a SIMULATED enclave, which protects nothing.\n"
        "[policy]\n"
        'accept = ["simulated"]\n'
        "insecure_simulated = true\n\n"
        "[[measurement]]\n"
        'label = "this installation"\n'
        'type = "simulated"\n'
        f'registers = {{ source = "{measure_source().hex()}" }}\n'
    )


def _claim_job(out: Path, opened: OpenJob) -> None:
    """A folder keeps one job id: bundles of another one cannot be continued."""
    path = out / "job_id"
    if path.exists() and path.read_text().strip() != opened.resolved.job_id:
        raise UsageError(_OTHER_VERSION, where=str(out), hint="choose another --out")
    _write(path, opened.resolved.job_id + "\n")


def _claim_data(out: Path, opened: OpenJob) -> None:
    """The data are no part of the job's identity, but one run has one set of them, baselines included."""
    loaded = opened.resolved.loaded
    files = [loaded.data_file(name, part) for name in opened.parties for part in ("train", "test")]
    path, content = out / "data_sha256", files_sha256(files)
    if not path.exists():
        _write(path, content + "\n")
    elif path.read_text().strip() != content:
        raise UsageError("data files have changed since this run began", where=str(out), hint="choose another --out")


def _share_processors(job: Job) -> tuple[int, int]:
    """(threads of enclave and of baselines, threads of a party): what runs together does not fight."""
    cpus = usable_cpus()
    together = 2 if {"local", "central"} & set(job.evaluation.baselines) else 1
    return job.enclave.threads or max(1, cpus // together), max(1, cpus // len(job.party))


def _with_accelerators(roles: Roles, opened: OpenJob, out: Path, sockets: Path, progress: Progress) -> OpenJob:
    """Start the accelerators that the job needs, unless it names some, and write their addresses into OUT/job.toml."""
    loaded = opened.resolved.loaded
    masking = loaded.job.masking
    if masking.accelerators:
        return opened
    names = ["accelerator", "second accelerator"][: 2 if masking.pads == "dual" else 1]
    addresses = []
    for name in names:
        log = out / "logs" / f"{name.replace(' ', '-')}.log"
        address = f"unix:{sockets / name.replace(' ', '-')}"
        arguments = ["accelerator", "--listen", address, "--out", str(sockets / f"{name}-out")]
        role = roles.add(Role(name, arguments, log=log, threads=usable_cpus(), progress=progress))
        _await_address(roles, role, sockets / f"{name}-out" / "address", log)
        addresses.append(address)
    changed = loaded.job.model_copy(update={"masking": masking.model_copy(update={"accelerators": addresses})})
    _write(out / "job.toml", render_job(changed))
    resolved = replace(opened.resolved, job=changed, loaded=load_job(out / "job.toml"))
    return replace(opened, resolved=resolved)


def _await_address(roles: Roles, role: Role, path: Path, log: Path) -> str:
    """Wait until a process listens, and return where."""
    while not path.exists():
        roles.check()
        if role.process.poll() is not None:
            raise RunError("the process ended before it listened", where=role.name, hint=f"see {log}")
        time.sleep(0.05)
    return str(json.loads(path.read_text())["address"])


def _start_enclave(roles: Roles, out: Path, flags: list[str], *, serve: bool, threads: int, progress: Progress) -> str:
    """Start the enclave and return its address once it listens."""
    folder = out / "enclave"
    folder.mkdir(exist_ok=True)
    (folder / "address").unlink(missing_ok=True)
    (folder / "enclave.json").unlink(missing_ok=True)  # all parties of this run come again, whatever it ended before
    arguments = ["enclave", str(out / "job.toml"), "--listen", "127.0.0.1:0", "--out", str(folder)]
    arguments += [*flags, *(["--serve"] if serve else [])]
    log = out / "logs" / "enclave.log"
    role = roles.add(Role("enclave", arguments, log=log, threads=threads, progress=progress))
    return _await_address(roles, role, folder / "address", log)


def _start_baseline(roles: Roles, out: Path, kind: Kind, threads: int, progress: Progress) -> None:
    arguments = ["baseline", str(out / "job.toml"), kind, "--out", str(out / "baselines")]
    roles.add(Role(kind, arguments, log=out / "logs" / f"{kind}.log", threads=threads, progress=progress))


def _start_party(
    roles: Roles,
    out: Path,
    name: str,
    address: str,
    samples: int,
    flags: list[str],
    threads: int,
    progress: Progress,
) -> Role:
    folder = out / "parties" / name
    arguments = ["join", str(out / "job.toml"), "--party", name, "--enclave", address, "--out", str(folder)]
    arguments += ["--key", str(folder / "party.key"), *flags, "--samples", str(samples)]
    return roles.add(Role(name, arguments, log=out / "logs" / f"{name}.log", threads=threads, progress=progress))
