"""Trials by seed: which role is disturbed how and when, and whether the job's end is as it must be."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Literal

from cloister.jobfile import load_job
from cloister.methods.local import claim_folder
from cloister.progress import Silent
from tests.crash.deployment import Deployment, Method, make_deployment
from tests.crash.forking import in_child
from tests.crash.points import Course, Point, die_at_operation, record_operations
from tests.crash.trial import Ended, Job, adapters, course_of, what_differs
from tests.crash.trouble import Disk, Jump, Kind, Trouble

Outcome = Literal["identical", "resumed", "lost", "not hit"]
ROLES = ("enclave", "party", "accelerator")
CELLS: dict[Method, tuple[tuple[str, str], ...]] = {
    "split": (
        ("enclave", "receipt"),
        ("party", "receipt"),
        ("enclave", "checkpoint"),
        ("party", "upload"),
        ("enclave", "mid-step"),
        ("party", "release"),
        ("enclave", "handshake"),
        ("party", "handshake"),
        ("enclave", "upload"),
        ("party", "mid-step"),
        ("enclave", "release"),
        ("party", "checkpoint"),
        ("enclave", "start"),
        ("party", "seal"),
        ("enclave", "agree"),
        ("party", "agree"),
        ("enclave", "any time"),
        ("party", "start"),
        ("party", "any time"),
    ),
    "slice": (
        *[("enclave", p) for p in ("start", "handshake", "agree", "mid-step", "checkpoint", "release", "receipt")],
        *[("party", p) for p in ("start", "handshake", "agree", "mid-step", "checkpoint", "release", "receipt")],
        *[("accelerator", p) for p in ("handshake", "mid-step", "any time")],
    ),
}
"""Who is killed in which phase; one trial after the other takes the next. Beside `slice`'s server enclave, "party" is
the party's enclave."""
_JUMPS_S = (-86400.0, -3600.0, -240.0, 240.0, 3600.0, 86400.0)


@dataclass(frozen=True, kw_only=True)
class Result:
    """Of one trial.

    identical: every party has the undisturbed run's adapter, to the last byte, and a receipt that holds, without
    anybody's help. resumed: roles ended with clear errors; what these ask for was done, the roles started again, and
    every party has it. lost: the job ended in another way. not hit: it ended well, but nothing was in its way, since
    what the points waited for did not come; that is no trial.
    """

    kind: str
    seed: int
    outcome: Outcome
    fault: str = ""
    hit: tuple[Point, ...] = ()
    restarts: int = 0
    seconds: float = 0.0
    codes: tuple[str, ...] = ()
    """Of errors with which roles ended."""


@dataclass(frozen=True)
class Ground:
    """A deployment with its undisturbed run."""

    deployment: Deployment
    adapters: Mapping[str, bytes]
    course: Course


class Matrix:
    """Runs trials in a folder; what went wrong stays there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # A socket's path is short. No TemporaryDirectory: every fork would remove it at its end.
        self._sockets = Path(tempfile.mkdtemp(prefix="cc-", dir="/tmp"))
        self._deployments: dict[Method, Deployment] = {}
        self._grounds: dict[Method, Ground] = {}

    def __enter__(self) -> Matrix:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._sockets, ignore_errors=True)

    def deployment(self, method: Method) -> Deployment:
        """Made when it is first asked for."""
        if method not in self._deployments:
            self._deployments[method] = make_deployment(method, self._folder / f"{method}-job")
        return self._deployments[method]

    def ground(self, method: Method) -> Ground:
        """Made when it is first asked for. Raises: RuntimeError: the undisturbed run fails."""
        if method not in self._grounds:
            deployment = self.deployment(method)
            job = Job(deployment=deployment, folder=self._folder / method, sockets=self._sockets, record=True)
            ended = job.run()
            wanted = adapters(job)
            if fault := ended.fault or what_differs(job, wanted):
                raise RuntimeError(f"the undisturbed run fails: {fault}")
            self._grounds[method] = Ground(deployment, wanted, course_of(job, ended))
        return self._grounds[method]

    def kill(self, method: Method, seed: int, roles: Collection[str] = ROLES) -> Result:
        """Kill one of these roles, every fifth time two."""
        ground, result, drawn = self.ground(method), None, cells(method, roles)
        for attempt in range(3):
            random = Random(f"kill {method} {seed} {attempt}")  # noqa: S311  # seeded on purpose
            points = [self._point(ground, random, drawn[seed % len(drawn)])]
            if seed % 5 == 4:
                points.append(self._point(ground, random, random.choice(drawn)))
            job = self._job(ground, f"{method}-{seed}-{attempt}", points=points)
            result = self._judge(ground, job, job.run(), f"kill {method}", seed, [])
            if result.outcome != "not hit":
                break
        if result is None:
            raise RuntimeError("no attempt was made")
        return result

    def away(self, seed: int) -> Result:
        """A party does not come, or does not come back, until all others have given up; then everybody starts again."""
        ground = self.ground("split")
        random = Random(f"away {seed}")  # noqa: S311
        party = random.choice(ground.deployment.parties)
        points = [self._point(ground, random, (party, random.choice(["mid-step", "release"])))] if seed % 2 else []
        times: dict[str, object] = {"cloister.enclave.server.PARTY_TIMEOUT_S": 30.0 if points else 4.0}
        job = self._job(ground, f"away-{seed}", points=points, times=times, away=frozenset({party}))
        first = job.run()
        if first.fault:
            return self._judge(ground, job, first, "away", seed, [])
        return self._judge(ground, job, replace_job(job).run(), "away", seed, [first])

    def untold(self, seed: int) -> Result:
        """The enclave notes that all have countersigned, and dies before anybody hears of it."""
        method: Method = "slice" if seed % 2 else "split"
        ground = self.ground(method)
        point = Point(victim="enclave", phase="receipt", operation="named enclave.json", after=True)
        job = self._job(ground, f"untold-{seed}", points=[point])
        return self._judge(ground, job, job.run(), f"untold {method}", seed, [])

    def trouble(self, kind: Kind, seed: int) -> Result:
        """A disk is full or read-only, or a clock jumps, for some seconds or until a role fails of it."""
        ground = self.ground("split")
        random = Random(f"{kind} {seed}")  # noqa: S311
        drawn = [c for c in CELLS["split"] if c[1] != "start"]
        point = self._point(ground, random, drawn[seed % len(drawn)])
        name = f"{kind.replace(' ', '-')}-{seed}"
        folder = self._folder / name
        with ExitStack() as ends:
            trouble: Trouble
            if kind == "clock":
                trouble = Jump(folder / f"{point.victim}.clock", random.choice(_JUMPS_S))
            else:
                trouble = Disk(folder / point.victim, kind, random.choice([0, 4096, random.randrange(1 << 16)]))
            ends.callback(trouble.remove)
            job = self._job(ground, name, points=[at_a_sight(point, ground.course)], trouble={point.victim: trouble})
            result = self._judge(ground, job, job.run(), kind, seed, [])
        if result.outcome != "lost":
            shutil.rmtree(folder, ignore_errors=True)  # what was mounted there is gone
        return result

    def half_written(self, seed: int) -> Result:
        """Everything stops at some time; a file has lost its end. Where that is an error, the file is put back."""
        ground = self.ground("split")
        random = Random(f"half {seed}")  # noqa: S311
        job = self._job(ground, f"half-{seed}", until=random.uniform(0.3, 1.3) * ground.course.seconds)
        if fault := job.run().fault:
            return Result(kind="half-written", seed=seed, outcome="lost", fault=fault)
        files = [f for role in ("enclave", *ground.deployment.parties) for f in job.out(role).rglob("*") if f.is_file()]
        path = random.choice(sorted(f for f in files if f.stat().st_size))
        content = path.read_bytes()
        path.write_bytes(content[: random.randrange(len(content))])
        cut = replace_job(job, ends_at_error=True)
        ended = cut.run()
        kind = f"half-written {path.relative_to(job.folder)}"
        if not ended.errors:
            return self._judge(ground, cut, ended, kind, seed, [])
        path.write_bytes(content)
        back = replace_job(job)
        return self._judge(ground, back, back.run(), kind, seed, [ended])

    def run_folder(self, seed: int) -> Result:
        """`cloister run` dies while it makes its folder, up to three times; then it must go on with what is there."""
        random = Random(f"run folder {seed}")  # noqa: S311
        deployment = self.deployment("split")
        out, record = self._folder / f"run-{seed}", self._folder / f"run-{seed}.operations"
        claim = functools.partial(_claim, deployment.own_job, out)
        if in_child(claim, record_operations(out, record)) != 0:
            return Result(kind="run folder", seed=seed, outcome="lost", fault="the undisturbed run fails")
        count = len(record.read_text().splitlines())
        shutil.rmtree(out)
        points = []
        for number in (random.randrange(count) for _ in range(random.randint(1, 3))):
            after = random.random() < 0.5
            if in_child(claim, die_at_operation(out, number, after=after)) == -9:
                points.append(Point(victim="run", phase="folder", operation=number, after=after))
        job_ids = [job_id for _ in range(2) if (job_id := _claimed(claim, out)) is not None]
        fault = "" if len(job_ids) == 2 and len(set(job_ids)) == 1 else f"it does not go on: job ids {job_ids}"
        if not fault:
            shutil.rmtree(out)
        outcome: Outcome = "lost" if fault else "identical" if points else "not hit"
        return Result(kind="run folder", seed=seed, outcome=outcome, fault=fault, hit=tuple(points))

    def _point(self, ground: Ground, random: Random, cell: tuple[str, str]) -> Point:
        victim, phase = cell
        parties = ground.deployment.parties
        if victim == "party":
            victim = random.choice(parties)
        elif victim == "accelerator":
            victim = f"{random.choice(parties)}-accelerator"
        drawn = None if phase == "any time" else ground.course.draw(random, victim, phase)
        return drawn or ground.course.draw_time(random, victim)

    def _job(self, ground: Ground, name: str, **more: object) -> Job:
        return Job(deployment=ground.deployment, folder=self._folder / name, sockets=self._sockets, **more)  # type: ignore[arg-type]  # by name

    def _judge(self, ground: Ground, job: Job, ended: Ended, kind: str, seed: int, before: list[Ended]) -> Result:
        fault = ended.fault or what_differs(job, ground.adapters)
        errors = [error for each in (*before, ended) for error in each.errors]
        hit = tuple(point for each in (*before, ended) for point in each.hit)
        helped = bool(before) or (bool(job.trouble) and bool(errors))
        missed = bool(job.points) and not hit
        result = Result(
            kind=kind,
            seed=seed,
            outcome="lost" if fault else "not hit" if missed else "resumed" if helped else "identical",
            fault=fault,
            hit=hit,
            restarts=sum(each.restarts for each in (*before, ended)),
            seconds=sum(each.seconds for each in (*before, ended)),
            codes=tuple(error.code for error in errors),
        )
        if not fault:
            shutil.rmtree(job.folder, ignore_errors=True)
        return result


def cells(method: Method, roles: Collection[str] = ROLES) -> list[tuple[str, str]]:
    """Those of these roles; an odd number, so that every fourth seed, too, comes to each of them."""
    found = [cell for cell in CELLS[method] if cell[0] in roles]
    return found if len(found) % 2 else [*found, *found[:1]]


def _claim(job: Path, out: Path) -> None:
    claim_folder(load_job(job), out, progress=Silent())


def _claimed(claim: Callable[[], None], out: Path) -> str | None:
    """The job id that the folder is for, once claimed again; None: it cannot be."""
    return (out / "job_id").read_text() if in_child(claim) == 0 else None


def at_a_sight(point: Point, course: Course) -> Point:
    """Trouble begins outside the role: a point at one of its file operations becomes a time."""
    return point if point.operation is None else replace(point, operation=None, time_s=course.seconds / 2)


def replace_job(job: Job, *, ends_at_error: bool = False) -> Job:
    """The same folder and job, begun again with nothing in its way."""
    return Job(deployment=job.deployment, folder=job.folder, sockets=job.sockets, ends_at_error=ends_at_error)
