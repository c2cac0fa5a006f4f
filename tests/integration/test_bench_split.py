"""`cloister bench split` on a job so small that starting processes is most of it: every system, every figure."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister.report.bench import BenchSplitReport
from tests.integration.conftest import MakeJob
from tests.integration.tiny_job import finish

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

ARGUMENTS = ["--tokens", "1500", "--epochs", "2", "--batch-tokens", "256", "--max-tokens", "64", "--cut", "3"]


@pytest.mark.slow
def test_every_system_reaches_the_same_loss(tmp_path: Path, make_job: MakeJob) -> None:
    command = finish(
        "bench",
        "split",
        "--job",
        make_job(),
        *ARGUMENTS,
        "--json",
        "--progress",
        "json",
        folder=tmp_path / "command",
        timeout_s=800.0,
    )
    assert command.process.returncode == 0, command.stdout + command.stderr
    report = BenchSplitReport.model_validate_json(command.stdout)
    rows = {row.system: row for row in report.rows}
    assert list(rows) == ["trainer", "central", "fedavg", "split"]
    assert {name: row.cut for name, row in rows.items()} == {
        "trainer": None,
        "central": None,
        "fedavg": None,
        "split": 3,
    }

    budget = report.workload["tokens"] * report.workload["epochs"]
    assert {row.tokens for row in rows.values()} == {budget}  # nobody trains on less
    assert report.target_loss == max(row.final_loss or 0.0 for row in rows.values())
    for row in rows.values():
        assert row.seconds_to_loss is not None
        assert 0 < row.seconds_to_loss <= row.seconds
        assert row.cpu_s > 0
        assert row.tokens_per_s == pytest.approx(row.tokens / row.train_s)
        assert all(100 < mib < 10_000 for mib in row.peak_rss_mib.values())
    assert set(rows["split"].peak_rss_mib) == {"enclave", "party"}
    assert rows["split"].wire_bytes > 4 * 32 * report.workload["tokens"]  # float32 activations, 32 wide
    assert rows["trainer"].wire_bytes == 0 < rows["fedavg"].wire_bytes
    trainer, central = rows["trainer"], rows["central"]
    assert [p.train_loss for p in trainer.curve] == pytest.approx([p.train_loss for p in central.curve], abs=1e-3)

    split, seconds = rows["split"], {name: row.seconds_to_loss or 0.0 for name, row in rows.items()}
    assert report.ratios == pytest.approx(
        {
            "trainer_over_split_3": seconds["trainer"] / seconds["split"],
            "central_over_split_3": seconds["central"] / seconds["split"],
            "fedavg_over_split_3": seconds["fedavg"] / seconds["split"],
            "step_split_3_over_trainer": split.tokens_per_s / trainer.tokens_per_s,
            "step_split_3_over_central": split.tokens_per_s / central.tokens_per_s,
            "bound_3": 4.0,
            **{f"cpu_{name}_over_split_3": rows[name].cpu_s / split.cpu_s for name in ("trainer", "central", "fedavg")},
        }
    )


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (["--system", "flower"], "--system"),
        (["--loss", "1.0"], "--loss"),
        (["--model", "somewhere"], "--model"),
        (["--hidden", "65"], "--hidden"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, arguments: list[str], where: str) -> None:
    command = finish("bench", "split", *arguments, "--json", folder=tmp_path / "command")
    assert command.process.returncode == 2
    assert f'"where": "{where}"' in command.stdout
