"""A large bundle through party and enclave: rates, and resident memory of each at two sizes.

    python benchmarks/stream.py [--mib 256 2048] [--runs 5]

Per size, each in a process of its own: a party packs, seals (`BundleWriter`) and uploads; an enclave
server receives and verifies, then reads every pack (decrypt, authenticate, check) with a cache of 64 MiB. Beside it a
plain gRPC client stream of the same bytes in the same pieces, written to a file by the receiver, is the yardstick
of the upload. Rates are medians of `--runs` uploads of the larger bundle, taken in turn with the plain stream.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import torch

from cloister.attest.backends.simulated import InsecureSimulatedAttester
from cloister.channel.client import upload
from cloister.channel.grpc_common import PIECE_BYTES, common_options
from cloister.channel.handshake import Responder, ResponderSettings
from cloister.channel.server import EnclaveServer
from cloister.crypto.bundle import BundleHeader, BundleWriter, IncomingStore, SealedReader, verify_bundle
from cloister.crypto.keys import DataKey, PartyKey
from cloister.data.activations import Schema
from cloister.data.packing import Pack
from cloister.data.payload import Payload, max_payload_bytes, write_payload
from cloister.data.tokens import Example
from cloister.enclave.pool import Pool
from cloister.model.attention import Layout

JOB, PARTY, HIDDEN, TOKENS = "00" * 32, "bench", 2048, 512
SCHEMA = Schema(activation_dtype="bfloat16", hidden=HIDDEN, vocabulary=32000, max_tokens=TOKENS)
EXAMPLE = Example(id="0", task="none", response_bytes=1, response_role=-1)


def one_pack(seed: int) -> Pack:
    """512 tokens of one document, 2 MiB of activations."""
    index_T = torch.arange(TOKENS)
    zero_T = torch.zeros(TOKENS, dtype=torch.int64)
    activation = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    return Pack(
        given=activation,
        layout=Layout(document_T=zero_T, branch_T=zero_T, position_T=index_T),
        target_pos_N=index_T[:-1],
        target_id_N=index_T[1:],
        target_group_N=zero_T[:-1],
        group_example_G=torch.zeros(1, dtype=torch.int64),
        group_role_G=torch.full((1,), -1),
    )


class Memory:
    """Largest resident size of this process while the block runs, over that at its start, in bytes."""

    def __enter__(self) -> Memory:
        self._process = psutil.Process()
        self.start = self.peak = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def figures(self, count: int) -> dict[str, float]:
        return {
            "seconds": self.seconds,
            "gb_per_s": count / self.seconds / 1e9,
            "rss_growth_mib": (self.peak - self.start) / 2**20,
        }


def seal(folder: Path, mib: int, key: PartyKey) -> dict[str, Any]:
    """The party's half without the model: packs to a sealed bundle."""
    count = mib // 2
    pack = one_pack(0)
    most = max_payload_bytes([pack] * count, [EXAMPLE], HIDDEN, "bfloat16")
    header = BundleHeader(
        job_id=JOB, party=PARTY, kind="train", schema={}, counts={"packs": count}, max_payload_bytes=most
    )
    path = folder / "train.bundle"

    def packs() -> Iterator[Pack]:
        yield from (pack for _ in range(count))

    with Memory() as memory, BundleWriter(path, header, key) as writer:
        write_payload(writer.write, packs(), [EXAMPLE], "bfloat16")
    (folder / "key").write_bytes(writer.data_key.reveal())
    return memory.figures(path.stat().st_size)


def send(folder: Path, address: str) -> dict[str, Any]:
    path = folder / "train.bundle"
    with Memory() as memory:
        upload(address, path)
    return memory.figures(path.stat().st_size)


def read(path: Path, key_file: Path, public: bytes) -> dict[str, Any]:
    """The enclave's half without the model: every pack once, in a shuffled order."""
    with Memory() as memory:
        bundle = verify_bundle(path, job_id=JOB, party=PARTY, public_key=public)
    verified = memory.figures(path.stat().st_size)
    with Memory() as memory, SealedReader(bundle, DataKey(key_file.read_bytes())) as reader:
        payload = Payload.open(reader.read, bundle.payload_bytes, SCHEMA, torch.bfloat16, "bench")
        pool = Pool([payload], 64 << 20)
        for index in torch.randperm(len(payload), generator=torch.Generator().manual_seed(0)).tolist():
            pool[index]
    return {"verify": verified, "packs": memory.figures(path.stat().st_size)}


def serve(folder: Path, public: bytes, pipe: Any) -> None:
    """An enclave's server in a process of its own; reports its memory when told to stop."""
    settings = ResponderSettings(
        job_id=JOB, public_keys={PARTY: public}, attester=InsecureSimulatedAttester(measurement=bytes(32))
    )
    store = IncomingStore(
        folder, job_id=JOB, public_keys={PARTY: public}, chunk_bytes=1 << 20, max_payload_bytes=1 << 40
    )
    server = EnclaveServer(
        "127.0.0.1:0",
        responder_factory=lambda: Responder(settings),
        handler=lambda *_: {},
        incoming=store,
    )
    with server, Memory() as memory:
        pipe.send(server.address)
        pipe.recv()
    pipe.send(memory.figures(1))


def serve_plain(folder: Path, pipe: Any) -> None:
    """The yardstick: a gRPC server that writes what it receives to a file."""

    def take(messages: Iterator[bytes], _: grpc.ServicerContext) -> bytes:
        with (folder / "plain").open("wb", buffering=0) as file:
            for message in messages:
                file.write(message)
        return b""

    server = grpc.server(ThreadPoolExecutor(4), options=common_options())
    handler = grpc.method_handlers_generic_handler("plain", {"Put": grpc.stream_unary_rpc_method_handler(take)})
    server.add_generic_rpc_handlers((handler,))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    pipe.send(address)
    pipe.recv()
    server.stop(0)
    pipe.send({})


def send_plain(path: Path, address: str) -> dict[str, Any]:
    def pieces() -> Iterator[bytes]:
        with path.open("rb", buffering=0) as file:
            while piece := file.read(PIECE_BYTES):
                yield piece

    with Memory() as memory, grpc.insecure_channel(address, options=common_options()) as channel:
        channel.stream_unary("/plain/Put")(pieces())
    return memory.figures(path.stat().st_size)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a fresh process, so that its memory is its own."""
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


class Server:
    """A server function in its own process."""

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        self._pipe, theirs = mp.get_context("spawn").Pipe()
        self._process = mp.get_context("spawn").Process(target=function, args=(*arguments, theirs))
        self._process.start()
        self.address: str = self._pipe.recv()

    def stop(self) -> Any:
        self._pipe.send(None)
        figures = self._pipe.recv() if self._pipe.poll(20) else None
        self._process.join(20)
        return figures


def bench(mib: int, runs: int, key: PartyKey, key_path: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sealed = apart(_seal_with, folder, mib, key_path)
        uploads, plains, server_memory = [], [], []
        for turn in range(runs):
            arrived = folder / f"arrived-{turn}"
            arrived.mkdir()
            server = Server(serve, arrived, key.public)
            uploads.append(apart(send, folder, server.address))
            server_memory.append(server.stop())
            plain = Server(serve_plain, folder)
            plains.append(apart(send_plain, folder / "train.bundle", plain.address))
            plain.stop()
            if turn + 1 < runs:
                (arrived / f"{PARTY}.train.bundle").unlink()
        opened = apart(read, arrived / f"{PARTY}.train.bundle", folder / "key", key.public)
        return {
            "mib": mib,
            "seal": sealed,
            "upload": _median(uploads),
            "plain_grpc": _median(plains),
            "upload_over_plain": statistics.median(
                u["gb_per_s"] / p["gb_per_s"] for u, p in zip(uploads, plains, strict=True)
            ),
            "enclave_server_rss_growth_mib": max(m["rss_growth_mib"] for m in server_memory),
            "enclave_verify": opened["verify"],
            "enclave_read": opened["packs"],
        }


def _seal_with(folder: Path, mib: int, key_path: Path) -> dict[str, Any]:
    return seal(folder, mib, PartyKey.load(key_path))


def _median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        key, key_path = PartyKey.generate(), Path(name) / "key"
        key.save(key_path)
        results = [bench(mib, arguments.runs, key, key_path) for mib in arguments.mib]
    json.dump(results, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
