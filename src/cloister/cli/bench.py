"""`cloister bench`: figures that anyone can measure again."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from cloister.cli.options import AsJson, JobFile, ShowProgress
from cloister.cli.output import emit
from cloister.cli.progress import open_progress
from cloister.errors import UsageError
from cloister.jobfile import load_job
from cloister.methods.processes import end_with_parent
from cloister.progress import task

HEAD = 64
"""Width of a random Llama's attention heads; large ones have heads twice as wide where that comes out even."""

app = typer.Typer(name="bench", help="Measure systems side by side on this machine.", no_args_is_help=True)


def _whole_heads(hidden: int) -> int:
    if hidden % HEAD:
        raise UsageError(f"{hidden} is not a multiple of {HEAD}, the width of a head", where="--hidden")
    return hidden


Hidden = Annotated[
    int, typer.Option("--hidden", min=HEAD, callback=_whole_heads, help=f"Width of the random Llama: heads of {HEAD}.")
]
Vocabulary = Annotated[int, typer.Option("--vocabulary", min=16, help="Its tokens; embedding and head are one.")]
Systems = Annotated[
    list[str] | None,
    typer.Option("--system", metavar="NAME", help="Only this system; may be repeated. Default: all."),
]


@app.callback()
def bench() -> None:
    """Measure systems side by side on this machine."""


@app.command("slice")
def slice_(
    hidden: Hidden = 2048,
    layers: Annotated[int, typer.Option("--layers", min=1, help="Its decoder layers.")] = 4,
    vocabulary: Vocabulary = 32_000,
    tokens: Annotated[int, typer.Option("--tokens", min=8, help="Tokens of a training step.")] = 512,
    packs: Annotated[int, typer.Option("--packs", min=1, help="Packs that they are spread over.")] = 1,
    in_flight: Annotated[int, typer.Option("--in-flight", min=1, help="Packs worked on at once behind masks.")] = 2,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Steps of each system that count.")] = 5,
    system: Systems = None,
    as_json: AsJson = False,
    progress: ShowProgress = "auto",
) -> None:
    """A masked training step against a plain one.

    LoRA on a Llama with random weights: plain in float32 and bfloat16, behind masks with precomputed pads, with two
    accelerators ("dual"), and without the check of products. All processes share this machine's processors.

    \b
    Examples:
      cloister bench slice --json
      cloister bench slice --hidden 512 --layers 2 --runs 7
    """
    from cloister.bench.shape import Shape
    from cloister.bench.slice import SYSTEMS, bench_slice

    chosen = _systems(system, SYSTEMS)
    if tokens % packs:
        raise UsageError(f"{tokens} tokens cannot be spread over {packs} packs evenly", where="--packs")
    shape = Shape(hidden=hidden, layers=layers, vocabulary=vocabulary, tokens=tokens, packs=packs)
    with open_progress(progress) as reporter:
        report = bench_slice(
            shape,
            runs=runs,
            systems=chosen,
            in_flight=in_flight,
            command=shlex.join(["cloister", *sys.argv[1:]]),
            progress=reporter,
        )
    emit(report, as_json)


@app.command("split")
def split(
    job: Annotated[
        Path | None,
        typer.Option("--job", metavar="JOB", help="Model, records and settings of this job, instead of random ones."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="DIR", help="With --job: this model folder instead of the job's.")
    ] = None,
    hidden: Hidden = 768,
    layers: Annotated[int, typer.Option("--layers", min=2, help="Its decoder layers.")] = 12,
    vocabulary: Vocabulary = 32_000,
    cut: Annotated[
        list[int] | None,
        typer.Option("--cut", metavar="N", help="Former layers; may be repeated. Default: half and three quarters."),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=64, help="Training tokens of all silos, about.")] = 6144,
    epochs: Annotated[float, typer.Option("--epochs", min=0.01, help="Passes over them.")] = 3.0,
    batch_tokens: Annotated[int, typer.Option("--batch-tokens", min=8, help="Tokens of an optimiser step.")] = 2048,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=8, help="Of a pack.")] = 512,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="Of fedavg. Default: one an epoch.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option("--dtype", help="Of all systems' weights. Default: the job's, or float32."),
    ] = None,
    loss: Annotated[
        float | None,
        typer.Option("--loss", help="With --job: bits per byte to reach. Default: the worst system's final ones."),
    ] = None,
    evaluations: Annotated[
        int, typer.Option("--evaluations", min=1, help="With --job: how often the held-out loss is measured.")
    ] = 6,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Runs of each system; figures are medians.")] = 1,
    system: Systems = None,
    as_json: AsJson = False,
    progress: ShowProgress = "auto",
) -> None:
    """Method split beside what one would do without it.

    Hugging Face's Trainer with PEFT and Cloister's own loop on all records in one place ("trainer", "central"),
    federated averaging over the silos ("fedavg"), and an enclave with its parties as processes ("split", for each
    cut): the same base, records, adapter and token budget, one after the other with all of this machine's processors.
    Enclaves are SIMULATED and protect nothing.

    \b
    Examples:
      cloister bench split --cut 6 --cut 9 --json
      cloister bench split --job examples/medical/job.toml --cut 4 --tokens 65536 --batch-tokens 4096
    """
    import tempfile

    from cloister.bench.shape import Shape
    from cloister.bench.split import SYSTEMS, Asked, bench_split
    from cloister.bench.split_data import Budget, job_workload, random_workload
    from cloister.bench.split_peers import PEERS

    chosen = _systems(system, SYSTEMS)
    base = None if job is None else load_job(job)
    if base is None and (model is not None or loss is not None):
        where = "--loss" if model is None else "--model"
        raise UsageError("needs records to go with it", where=where, hint="give --job too")
    budget = Budget(tokens=tokens, epochs=epochs, batch_tokens=batch_tokens, max_tokens=max_tokens)
    with open_progress(progress) as reporter, tempfile.TemporaryDirectory(prefix="cloister-") as scratch:
        folder = Path(scratch)
        with task(reporter, "model and records"):
            if base is None:
                shape = Shape(hidden=hidden, layers=layers, vocabulary=vocabulary, tokens=max_tokens)
                workload = random_workload(shape, budget, dtype=dtype or "float32", folder=folder)
            else:
                workload = job_workload(base, model, budget, dtype=dtype, folder=folder)
        cuts = dict.fromkeys(cut or [workload.layers // 2, workload.layers * 3 // 4])
        report = bench_split(
            workload,
            Asked(
                peers=[name for name in PEERS if name in chosen],
                cuts=list(cuts) if "split" in chosen else [],
                runs=runs,
                rounds=rounds or math.ceil(epochs),
                evaluations=evaluations,
                target_loss=loss,
            ),
            command=shlex.join(["cloister", *sys.argv[1:]]),
            progress=reporter,
        )
    emit(report, as_json)


@app.command("peer", hidden=True)  # a child process of `bench split`
def peer(
    name: Annotated[Literal["trainer", "central", "fedavg"], typer.Argument(help="What to measure.")],
    job: JobFile,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write what was measured.")],
    rounds: Annotated[int, typer.Option("--rounds", min=1)] = 1,
    evaluations: Annotated[int, typer.Option("--evaluations", min=1)] = 1,
    as_json: AsJson = False,
    progress: ShowProgress = "auto",
) -> None:
    """Measure one system of `cloister bench split`, which starts this."""
    loaded = load_job(job)
    end_with_parent()
    from cloister.bench.split_peers import PeerTask, run_peer

    asked = PeerTask(loaded=loaded, evaluations=evaluations, rounds=rounds, folder=out.parent)
    with open_progress(progress) as reporter:
        run_peer(name, asked, out, progress=reporter)


def _systems(named: list[str] | None, known: Sequence[str]) -> list[str]:
    """Those that were named, or all. Raises: UsageError: there is no such system."""
    for name in named or ():
        if name not in known:
            raise UsageError(f"there is no system {name!r}", where="--system", hint=f"choose from {', '.join(known)}")
    return named or list(known)
