"""Bytes that a job's activations take on the wire in each form, and how fast packs are written and read in it.

    python benchmarks/wire.py examples/medical/job.toml --cut 2 4

The first packs of the first party's training records, through the former layers of the job's model. Bytes per value
count activations, scales and exponents, not the integers beside them. Rates are of bfloat16 bytes, one thread, best of
five.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

from cloister.data.activations import Schema, decode_pack, encode_pack
from cloister.data.packing import Pack
from cloister.data.prepare import prepare
from cloister.jobfile import LoadedJob, load_job
from cloister.model.anatomy import load_model, load_tokenizer
from cloister.model.cut import Former

FORMS = ("float32", "bfloat16", "bfloat16-deflate", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("--cut", type=int, nargs="+", default=[2])
    parser.add_argument("--packs", type=int, default=12)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_job(asked.job)
    print(json.dumps({f"cut {cut}": measure(loaded, cut, asked.packs) for cut in asked.cut}, indent=1))


def measure(loaded: LoadedJob, cut: int, count: int) -> dict[str, dict[str, float]]:
    """By form: bytes per value, MB/s written, MB/s read."""
    job, path, party = loaded.job, loaded.local_path(loaded.job.model.path), loaded.job.party[0].name
    files = loaded.data_file(party, "train"), loaded.data_file(party, "test")
    packs = prepare(job, load_tokenizer(path), *files).parts["train"].packs[:count]
    former = Former(load_model(path, job.model.dtype), cut)
    crossed = [p.with_activations(former(p.given, p.layout.position_T, p.layout).bfloat16()) for p in packs]
    return {form: of_form(form, crossed, job.training.max_tokens) for form in FORMS}


def of_form(form: str, packs: list[Pack], max_tokens: int) -> dict[str, float]:
    values, hidden = sum(p.given.numel() for p in packs), packs[0].given.shape[1]
    schema = Schema(activation_dtype=form, hidden=hidden, vocabulary=2**31 - 1, max_tokens=max_tokens)
    blobs = [encode_pack(pack, form) for pack in packs]
    tensors = [t for blob in blobs for n, t in safetensors.torch.load(blob).items() if n in NAMES]
    written = rate(lambda: [encode_pack(pack, form) for pack in packs], 2 * values)
    read = rate(lambda: [decode_pack(blob, schema, torch.float32, "wire") for blob in blobs], 2 * values)
    size = sum(t.numel() * t.element_size() for t in tensors)
    return {"bytes per value": round(size / values, 3), "written, MB/s": written, "read, MB/s": read}


NAMES = ("activation", "scale", "exponent")


def rate(work: Callable[[], object], num_bytes: int) -> float:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return round(num_bytes / min(times) / 1e6)


if __name__ == "__main__":
    main()
