"""The demo: the main job on bundled synthetic data and the bundled tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import cloister
from cloister.data.synthetic import write_demo_data
from cloister.jobfile import load_job
from cloister.methods.local import run_job
from cloister.progress import Progress, task
from cloister.report.model import RunReport

_SEED = 20260
_TRAIN, _TEST = 180, 48


def run_demo(out: Path, *, command: str, progress: Progress) -> RunReport:
    """Write data and job into `out`, then run the job.

    Raises:
        CloisterError: see `run_job`.
    """
    with task(progress, "writing demo data"):
        out.mkdir(parents=True, exist_ok=True)
        parties = write_demo_data(out / "data", seed=_SEED, train=_TRAIN, test=_TEST)
        job = out / "demo.toml"
        job.write_text(_job_text([files.name for files in parties]), encoding="utf-8")
    return run_job(load_job(job), out, serve=False, command=command, progress=progress)


def _job_text(parties: list[str]) -> str:
    base = Path(cloister.__path__[0]) / "assets" / "demo" / "base"
    text = f"""# Five hospitals fine-tune one tiny model on synthetic records. Try changing it and `cloister run` it.
[job]
name = "demo"
method = "split"

[model]
path = {json.dumps(str(base))}
cut = 1

[adapter]
kind = "lora"
rank = 16
alpha = 32

[training]
epochs = 3
batch_tokens = 1024
max_tokens = 512
learning_rate = 5e-3
evaluations = 2

[transport]
activation_dtype = "bfloat16"

[evaluation]
baselines = ["base", "local", "central"]
"""
    return text + "".join(
        f'\n[[party]]\nname = "{name}"\ntrain = "data/{name}/train.jsonl"\ntest = "data/{name}/test.jsonl"\n'
        for name in parties
    )
