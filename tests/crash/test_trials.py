"""Which trials are drawn, and which of them count."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

from tests.crash import matrix as module
from tests.crash.__main__ import _role, main, summarise, trials
from tests.crash.deployment import Deployment, Method
from tests.crash.matrix import CELLS, ROLES, Ground, Matrix, Result
from tests.crash.points import Course, Point
from tests.crash.trial import Ended, Job
from tests.crash.trouble import Trouble

ROOT = Path(__file__).parents[2]


@dataclass(kw_only=True)
class Played:
    """A job of which nothing runs: it ends well, and `hits` says whether its points came."""

    deployment: Deployment
    folder: Path
    sockets: Path
    points: Collection[Point] = ()
    trouble: dict[str, Trouble] = field(default_factory=dict)
    times: object = None
    away: object = None
    ends_at_error: bool = False

    hits = True

    def run(self) -> Ended:
        return Ended(fault="", hit=tuple(self.points) if self.hits else ())


class Everything(Course):
    """In it every role does something in every phase."""

    def draw(self, random: Random, victim: str, phase: str) -> Point:
        return Point(victim=victim, phase=phase, time_s=0.0)


@pytest.fixture
def matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Matrix]:
    monkeypatch.setattr(module, "Job", Played)
    monkeypatch.setattr(module, "what_differs", lambda job, wanted: "")
    methods: tuple[Method, ...] = ("split", "slice")
    with Matrix(tmp_path) as made:
        for method in methods:
            ground = Ground(Deployment(method=method, folder=tmp_path), {}, Everything(seen=[], seconds=1.0))
            monkeypatch.setitem(made._grounds, method, ground)
        yield made


def results(matrix: Matrix) -> list[Result]:
    """Of one trial of every kind that has points and needs no disk."""
    return [
        matrix.kill("split", 1),
        matrix.kill("slice", 4),
        matrix.away(1),
        matrix.untold(1),
        matrix.trouble("clock", 1),
    ]


def test_what_hits_nothing_is_no_trial(matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = results(matrix)
    assert [r.outcome for r in counted] == ["identical", "identical", "resumed", "identical", "identical"]
    monkeypatch.setattr(Played, "hits", False)
    missed = results(matrix)
    assert {r.outcome for r in missed} == {"not hit"}
    summary = summarise([asdict(r) | {"hit": []} for r in (*counted, *missed)])
    assert {name: summary[name] for name in ("trials", "identical", "resumed", "lost", "not_hit")} == {
        "trials": 5, "identical": 4, "resumed": 1, "lost": 0, "not_hit": 5,
    }  # fmt: skip


def test_what_needs_no_point_is_a_trial(matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    """A party that never comes."""
    monkeypatch.setattr(Played, "hits", False)
    assert matrix.away(2).outcome == "resumed"


def test_a_job_that_fails_without_a_hit_is_lost(matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Played, "hits", False)
    monkeypatch.setattr(module, "what_differs", lambda job, wanted: "another one")
    assert {r.outcome for r in results(matrix)} == {"lost"}


@pytest.mark.skipif(sys.platform != "linux", reason="inotify")
@pytest.mark.parametrize(("code", "hits"), [(0, 0), (-9, 1)])
def test_a_death_counts_for_the_point_that_brought_it(tmp_path: Path, code: int, hits: int) -> None:
    """Not where the role had ended just before, and not for another point of the role that did not come."""
    points = [Point(victim="enclave", phase="any time", **each) for each in ({"time_s": 0.0}, {"operation": 9})]
    deployment = Deployment(method="split", folder=tmp_path)
    job = Job(deployment=deployment, folder=tmp_path / "job", sockets=tmp_path, points=points)
    role = job._roles["enclave"]
    process = SimpleNamespace(poll=lambda: None, kill=lambda: None, returncode=code)
    role.process = process  # type: ignore[assignment]  # all of one that is used
    job._strike(points[0], 0.0)
    process.poll = lambda: code
    job._look_after(role, 0.0)
    job._watch.close()
    assert job.hit == points[:hits]


@pytest.mark.skipif(sys.platform != "linux", reason="inotify")
def test_one_death_is_one_kill(tmp_path: Path) -> None:
    """Of two operations it is the first that brought it, and the second never comes."""
    points = [Point(victim="enclave", phase="any time", operation=n) for n in (9, 4)]
    job = Job(
        deployment=Deployment(method="split", folder=tmp_path), folder=tmp_path / "job", sockets=tmp_path, points=points
    )
    role = job._roles["enclave"]
    for _ in range(2):
        role.starts += 1
        role.process = SimpleNamespace(poll=lambda: -9)  # type: ignore[assignment]  # all of one that is used
        job._look_after(role, 0.0)
    job._watch.close()
    assert job.hit == points[1:]


@pytest.mark.parametrize("roles", [c for n in (1, 2, 3) for c in itertools.combinations(ROLES, n)])
def test_all_cells_of_the_roles_are_drawn_and_no_others(matrix: Matrix, roles: tuple[str, ...]) -> None:
    played = [trial() for trial in trials(matrix, 1, 80, [], roles)]
    assert len(played) == 80
    drawn = {(result.kind, _role(point.victim), point.phase) for result in played for point in result.hit}
    assert drawn == {(f"kill {m}", *cell) for m, cells in CELLS.items() for cell in cells if cell[0] in roles}


@pytest.mark.parametrize("only", ["split", "untold", "others"])
def test_a_role_that_no_such_trial_kills_is_refused(
    only: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tests.crash", "--role", "accelerator", "--only", "slice", only])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "no --role accelerator is killed" in capsys.readouterr().err


def test_the_clock_can_be_installed_before_anything_of_cloister() -> None:
    """Which takes `time.time` when it is imported."""
    code = "import sys, tests.crash.clock; sys.exit(any(name.startswith('cloister') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


LEAVE = """
import json, os, signal, sys, tempfile
from pathlib import Path
from tests.crash.forking import Forked

def leave():
    Path(tempfile.mkdtemp(), "file").touch()

left = []
for name, prepare in (
    ("good", [leave]), ("clean", []), ("failed", [leave, lambda: sys.exit(3)]),
    ("killed", [leave, lambda: os.kill(os.getpid(), signal.SIGKILL)]),
):
    role = Forked(["--version"], Path(sys.argv[1], name), *prepare)
    left.append((role.wait(60.0), Forked.left))
print(json.dumps(left))
"""


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="roles are forked")
def test_what_roles_leave_is_counted_unless_they_were_killed(tmp_path: Path) -> None:
    """A folder with a file in it; of one that ends well, and of one that fails."""
    call = [sys.executable, "-W", "ignore", "-c", LEAVE, str(tmp_path)]
    ended = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == [[0, 2], [0, 2], [70, 4], [-9, 4]]
