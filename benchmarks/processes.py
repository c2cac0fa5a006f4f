"""Training of a latter half in one process and in several: tokens per second, and whether losses agree.

    python benchmarks/processes.py --hidden 256 --layers 8 --cut 3 --intermediate 688 --vocabulary 4096

Random weights and activations, LoRA of rank 8 on all linear layers, packs filled to `--max-tokens`, `--packs` a step.
Each configuration (processes x threads), in turns, trains `--runs` times `--steps` steps after one that is not counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cloister.adapters.add import add_adapter
from cloister.data.packing import Pack
from cloister.enclave.group import LOOPBACK, join, leave
from cloister.job import AdapterSection, TrainingSection
from cloister.model import attention
from cloister.model.attention import Layout
from cloister.model.cut import Latter
from cloister.training.loop import PackList, train
from cloister.training.team import Alone, Team


def latter_half(args: argparse.Namespace) -> Latter:
    attention.install()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).requires_grad_(False).eval()  # type: ignore[no-untyped-call]
    return Latter(model, args.cut)


def pack(args: argparse.Namespace, seed: int) -> Pack:
    """One document; the last half of it are targets."""
    drawn = torch.Generator().manual_seed(seed)
    length = args.max_tokens
    target_pos_N = torch.arange(length // 2, length)
    return Pack(
        given=torch.randn(length, args.hidden, generator=drawn),
        layout=Layout(
            document_T=torch.zeros(length, dtype=torch.long),
            branch_T=torch.zeros(length, dtype=torch.long),
            position_T=torch.arange(length),
        ),
        target_pos_N=target_pos_N,
        target_id_N=torch.randint(3, args.vocabulary, (len(target_pos_N),), generator=drawn),
        target_group_N=torch.zeros(len(target_pos_N), dtype=torch.long),
        group_example_G=torch.zeros(1, dtype=torch.long),
        group_role_G=torch.full((1,), -1),
    )


def measure(args: argparse.Namespace, team: Team) -> dict[str, list[float]]:
    """Seconds per step, and losses."""
    latter = latter_half(args)
    adapted = add_adapter(latter, AdapterSection(rank=8), first_layer=args.cut, seed=0)
    packs = PackList([pack(args, seed) for seed in range(2 * args.packs)])
    section = TrainingSection(
        steps=args.steps + 1, batch_tokens=args.packs * args.max_tokens, max_tokens=args.max_tokens, evaluations=0
    )
    ends: list[float] = []
    result = train(
        latter, adapted, packs, section, seed=0, on_point=lambda *_: ends.append(time.perf_counter()), team=team
    )
    return {
        "seconds": [b - a for a, b in itertools.pairwise(ends)],
        "loss": [p.train_loss for p in result.curve],
    }


def process(args: argparse.Namespace) -> None:
    """One process of a configuration."""
    torch.set_num_threads(args.threads)
    count, team = args.processes, Alone()
    joined = team if count == 1 else join(Path(args.folder), args.rank, count, torch.device("cpu"), even=False)
    found = measure(args, joined)
    leave()
    if args.rank == 0:
        print(json.dumps(found))


def run(arguments: list[str], processes: int, threads: int) -> dict[str, list[float]]:
    """A configuration, once."""
    with tempfile.TemporaryDirectory() as folder:
        own = ["--processes", str(processes), "--threads", str(threads), "--folder", folder]
        command = [sys.executable, __file__, *arguments, *own, "--rank"]
        environment = {**os.environ, **LOOPBACK, "OMP_NUM_THREADS": str(threads)}
        started = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, env=environment)
            for rank in range(processes)
        ]
        outputs = [p.communicate()[0] for p in started]
    found: dict[str, list[float]] = json.loads(outputs[0])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (
        ("hidden", 256), ("layers", 8), ("cut", 3), ("intermediate", 688), ("vocabulary", 4096),
        ("max-tokens", 512), ("packs", 8), ("steps", 6), ("runs", 5),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--folder")
    args = parser.parse_args()
    if args.rank is not None:
        process(args)
        return
    cpus = len(os.sched_getaffinity(0))
    found: dict[tuple[int, int], list[dict[str, list[float]]]] = {(1, cpus): [], (cpus, 1): []}
    for _ in range(args.runs):
        for configuration, runs in found.items():
            runs.append(run(sys.argv[1:], *configuration))
    for (processes, threads), runs in found.items():
        rates = [args.packs * args.max_tokens / statistics.median(one["seconds"]) for one in runs]
        print(
            f"{processes} x {threads} threads: {statistics.median(rates):,.0f} tokens/s "
            f"({min(rates):,.0f} to {max(rates):,.0f} in {args.runs} runs)"
        )
    one, several = (runs[0]["loss"] for runs in found.values())
    apart = max(abs(a - b) / a for a, b in zip(one, several, strict=True))
    print(f"losses differ by at most {apart:.1e} of themselves")


if __name__ == "__main__":
    main()
