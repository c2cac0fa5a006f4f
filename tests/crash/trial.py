"""One job with one disturbance: roles are killed and started again until every party has its results."""

from __future__ import annotations

import functools
import itertools
import json
import math
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloister.adapters.files import CONFIG, WEIGHTS, adapter_sha256
from cloister.agreement.receipt import verify_receipt
from cloister.attest.policy import AppraisalPolicy
from tests.crash.clock import follow
from tests.crash.deployment import Deployment
from tests.crash.forking import Forked, connect_quickly, set_values
from tests.crash.points import Course, Point, die_at_operation, record_operations
from tests.crash.trouble import Trouble
from tests.crash.watch import Seen, Watch

SHORT_TIMES: dict[str, object] = {
    "cloister.enclave.closing.COMMIT_WAIT_S": 5.0,
    "cloister.enclave.server.LEAVE_TIMEOUT_S": 24.0,
    "cloister.enclave.server.TELL_TIMEOUT_S": 2.0,
    "cloister.party.client.COUNTERSIGN_WAIT_S": 20.0,
    "cloister.party.taking_part.RECONNECT_S": 60.0,
    "cloister.progress._INTERVAL_S": 0.0,
}
"""Waits that a trial cannot sit out. Which comes first stays as it is."""
TRIAL_S = 300.0
TROUBLE_S = 4.0
"""How long a disk is full or a clock wrong where no role fails of it."""
MAX_STARTS = 12
_DEAD_S = 0.1
"""A role that was killed is started again so much later."""
_RESTARTED = ("transport", "accelerator")
"""Errors after which whoever supervises a role starts it again."""


@dataclass(frozen=True, kw_only=True)
class Reported:
    """An error with which a role ended."""

    role: str
    exit_code: int
    code: str
    message: str
    where: str
    hint: str

    def __str__(self) -> str:
        return f"{self.role} ended with {self.exit_code}: {self.code}: {self.where}: {self.message} ({self.hint})"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a trial ended."""

    fault: str
    """What went wrong, in words; empty: every party has the same adapter as the undisturbed run, and a good receipt."""
    hit: tuple[Point, ...] = ()
    """Points at which a role was killed."""
    restarts: int = 0
    seconds: float = 0.0
    errors: tuple[Reported, ...] = ()
    """What roles said when they ended by themselves with an error."""


@dataclass(kw_only=True)
class _Role:
    name: str
    command: Callable[[], Sequence[object]]
    service: bool = False
    """It runs until it is ended."""
    process: Forked | None = None
    starts: int = 0
    again_at: float = 0.0
    done: bool = False


@dataclass(kw_only=True)
class Job:
    """The roles of one job in a folder of their own, supervised: what dies or loses a peer is started again.

    Args:
        sockets: a folder whose path is short, for the accelerators of method `slice`.
        trouble: by victim, what begins at its point instead of its death.
        away: parties that do not come, or do not come back.
        ends_at_error: stop all roles when one has ended with an error that says what to do.
        accelerator: address of one that runs already, for all parties of method `slice`; otherwise each has its own.
        until: stop all roles at this time, in seconds from the start.
    """

    deployment: Deployment
    folder: Path
    sockets: Path
    points: Sequence[Point] = ()
    times: Mapping[str, object] = field(default_factory=dict)
    record: bool = False
    trouble: Mapping[str, Trouble] = field(default_factory=dict)
    away: frozenset[str] = frozenset()
    ends_at_error: bool = False
    accelerator: str = ""
    until: float = math.inf

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.seen: list[Seen] = []
        self.errors: list[Reported] = []
        self.hit: list[Point] = []
        self._counts: Counter[Seen] = Counter()
        self._address = _free_address()
        self._watch = Watch()
        self._roles = {"enclave": _Role(name="enclave", command=self._enclave)}
        for party in self.deployment.parties:
            self._roles[party] = _Role(name=party, command=functools.partial(self._join, party))
            if self.deployment.method == "slice" and not self.accelerator:
                name = f"{party}-accelerator"
                self._roles[name] = _Role(name=name, command=functools.partial(self._accelerator, name), service=True)
        self._due: list[tuple[float, Point]] = []
        self._troubled: dict[str, float] = {}
        """By role in trouble, until when at most."""

    def out(self, role: str) -> Path:
        return self.folder / role

    def run(self) -> Ended:
        """Until every role has ended well, or nothing goes on."""
        began = time.monotonic()
        for role in self._roles.values():
            self._watch.add(role.name, self.out(role.name))
        self._due = [(began + p.time_s, p) for p in self.points if p.time_s is not None]
        try:
            fault = self._supervise(began)
        finally:
            for role in self._roles.values():
                if role.process is not None:
                    role.process.kill()
            for trouble in self.trouble.values():
                trouble.end()
            self._watch.close()
        return Ended(
            fault=fault,
            hit=tuple(self.hit),
            restarts=sum(max(0, role.starts - 1) for role in self._roles.values()),
            seconds=time.monotonic() - began,
            errors=tuple(self.errors),
        )

    def _supervise(self, began: float) -> str:
        while waited_for := [r.name for r in self._roles.values() if not (r.done or r.service or self._away(r))]:
            now = time.monotonic()
            if now > began + self.until or (self.ends_at_error and self.errors):
                return ""
            if now > began + TRIAL_S:
                return f"no end after {TRIAL_S:.0f} s: {', '.join(waited_for)} still at work"
            self._note(self._watch.news(0.005), now)
            for role in self._roles.values():
                if fault := self._look_after(role, now):
                    return fault
            for at, point in list(self._due):
                if now >= at:
                    self._due.remove((at, point))
                    self._strike(point, now)
            self._end_trouble(now)
        return ""

    def _away(self, role: _Role) -> bool:
        return role.name in self.away and role.process is None

    def _note(self, news: list[Seen], now: float) -> None:
        for seen in news:
            self.seen.append(seen)
            self._counts[seen] += 1
            for point in self.points:
                if point.seen == seen and point.count == self._counts[seen]:
                    if point.later_s:
                        self._due.append((now + point.later_s, point))
                    else:
                        self._strike(point, now)

    def _strike(self, point: Point, now: float) -> None:
        if (trouble := self.trouble.get(point.victim)) is not None:
            if trouble.begin():
                self._troubled[point.victim] = now + TROUBLE_S
                self.hit.append(point)
            else:
                self._due.append((now + 0.001, point))
            return
        role = self._roles[point.victim]
        if role.process is not None and role.process.poll() is None:
            role.process.kill()
            if role.process.returncode == -9:  # it may have ended just before
                self.hit.append(point)
                role.process, role.again_at = None, now + _DEAD_S  # `_ended` would see its own points in this death

    def _end_trouble(self, now: float) -> None:
        """Somebody has made room, or set the clock, a while after a role has failed or after some seconds."""
        failed = bool(self.errors)
        for name, until in list(self._troubled.items()):
            if now > until or (failed and now > until - TROUBLE_S + 1.0):
                self.trouble[name].end()
                del self._troubled[name]

    def _look_after(self, role: _Role, now: float) -> str:
        """Start a role when it is time to; returns what is wrong, if anything is."""
        if role.process is None:
            ready = role.name == "enclave" or role.service or role.starts or self._enclave_is_up()
            away = role.name in self.away and (role.starts > 0 or not self.points)
            if ready and now >= role.again_at and not away and not self._troubled:
                self._start(role)
            return ""
        code = role.process.poll()
        if code is None or role.done:
            return ""
        if code == 0 and not role.service:
            role.done = True
            return ""
        if role.starts > MAX_STARTS:
            return f"{role.name} was started {role.starts} times; it says {role.process.stdout}"
        fault = self._ended(role, code)
        if self.away and code > 0:
            role.done = True
            return fault
        role.process, role.again_at = None, now + (_DEAD_S if code == -9 else 0.5)
        return fault

    def _ended(self, role: _Role, code: int) -> str:
        process = role.process
        if code == -9 or process is None:
            own = [(p.operation, p.after, p) for p in self.points if p.operation is not None and p.victim == role.name]
            if own and role.starts == 1:  # the first of them brought it; they are armed at the first start only
                self.hit.append(min(own, key=lambda each: each[:2])[2])
            return ""
        if "Traceback" in process.stderr:
            return f"{role.name} shows a traceback: {process.stderr[-1500:]}"
        try:
            error = Reported(role=role.name, exit_code=code, **json.loads(process.stdout)["error"])
        except (ValueError, KeyError, TypeError):
            return f"{role.name} ended with {code} and no error: {process.stdout[-500:]}{process.stderr[-500:]}"
        self.errors.append(error)
        if error.message.startswith("unexpected"):
            return f"{error}: {Path(error.where).read_text()[-1500:]}"
        if error.code in _RESTARTED or self.trouble or self.away or self.ends_at_error:
            return "" if error.hint else f"no hint: {error}"
        return str(error)

    def _start(self, role: _Role) -> None:
        role.starts += 1
        if role.name == "enclave" or role.service:
            (self.out(role.name) / "address").unlink(missing_ok=True)
        prepare = [set_values({**SHORT_TIMES, **self.times}), connect_quickly, follow(self.clock_of(role.name))]
        if self.record:
            prepare.append(record_operations(self.out(role.name), self.folder / f"{role.name}.operations"))
        for point in self.points:
            if point.operation is not None and point.victim == role.name and role.starts == 1:
                prepare.append(die_at_operation(self.out(role.name), point.operation, after=point.after))
        log = next(f for n in itertools.count(1) if not (f := self.folder / "logs" / f"{role.name}-{n}").exists())
        log.parent.mkdir(exist_ok=True)
        role.process = Forked(role.command(), log, *prepare)
        self._watch.add_log(role.name, log / "stderr")

    def clock_of(self, role: str) -> Path:
        """A file that says by how much a role's clock is wrong."""
        return self.folder / f"{role}.clock"

    def _enclave_is_up(self) -> bool:
        return self._roles["enclave"].done or (self.out("enclave") / "address").exists()

    def _enclave(self) -> Sequence[object]:
        return self.deployment.enclave(self.out("enclave"), self._address)

    def _join(self, party: str) -> Sequence[object]:
        job = self.deployment.job
        if self.deployment.method == "slice":
            address = self._accelerator_address(f"{party}-accelerator")
            job = self.deployment.job_with_accelerator(self.folder / f"{party}.toml", address)
        return self.deployment.join(party, self.out(party), self._address, job)

    def _accelerator(self, name: str) -> Sequence[object]:
        return self.deployment.accelerator(self.out(name), self._accelerator_address(name))

    def _accelerator_address(self, name: str) -> str:
        return self.accelerator or f"unix:{self.sockets / self.folder.name}-{name}"


def _free_address() -> str:
    """Of this machine, with a port that nobody uses just now; the enclave keeps it over its restarts."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


def adapters(job: Job) -> dict[str, bytes]:
    """Every party's adapter files, by PARTY/NAME."""
    found = {}
    for party in job.deployment.parties:
        for name in (CONFIG, WEIGHTS):
            path = job.out(party) / "adapter" / name
            found[f"{party}/{name}"] = path.read_bytes() if path.exists() else b""
    return found


def what_differs(job: Job, wanted: Mapping[str, bytes], *, complete: bool = True) -> str:
    """Whether the parties have the undisturbed run's adapter and receipts that hold; what not, in words."""
    found = adapters(job)
    for name, content in wanted.items():
        if found[name] != content:
            return f"{name} {'is missing' if not found[name] else 'is another one'}"
    policy = AppraisalPolicy.from_toml((job.deployment.folder / "policy.toml").read_text())
    for party in job.deployment.parties:
        files = {name: found[f"{party}/{name}"] for name in (CONFIG, WEIGHTS)}
        receipt = (job.out(party) / "receipt.json").read_bytes()
        verdict = verify_receipt(receipt, policy=policy, adapter_sha256=adapter_sha256(files), allow_simulated=True)
        failed = [c for c in verdict.checks if not c.passed and (complete or c.name != "countersignatures")]
        if failed:
            return f"{party}'s receipt: {failed[0].name}: {failed[0].reason}"
        _ = report_of(job, party)
    return ""


def report_of(job: Job, party: str) -> dict[str, Any]:
    """What its `join` has written at the end."""
    report: dict[str, Any] = json.loads((job.out(party) / "join.json").read_text())
    return report


def course_of(job: Job, ended: Ended) -> Course:
    """What an undisturbed job, run with `record`, did."""
    operations = {}
    for path in job.folder.glob("*.operations"):
        operations[path.stem] = path.read_text().splitlines()
    return Course(seen=job.seen, operations=operations, seconds=ended.seconds)
