"""torchrun, as an enclave starts it: on one machine, restarting nothing, with a rendezvous that needs no port.

    python -m cloister.enclave.torchrun FOLDER COUNT KIND

starts COUNT times `python -m cloister.enclave.worker FOLDER KIND`. torchrun's own rendezvous backends serve a store on
a TCP port, for agents on other machines; here is one agent, whose store is in its memory. Standard input is passed on
unread, standard output is the pipe of `lifeline`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from cloister.attest.isolation import interpreter_flags
from cloister.enclave.lifeline import end_with_reader, say
from cloister.private import keep_private

_BACKEND = "cloister"
SHUTDOWN_TIMEOUT_S = 5
"""From asking a process to end to ending it."""


class Alone(RendezvousHandler):
    """A rendezvous of one agent with itself."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id

    def get_backend(self) -> str:
        return _BACKEND

    def get_run_id(self) -> str:
        return self._run_id

    def next_rendezvous(self) -> RendezvousInfo:
        # Workers get this address as MASTER_ADDR and MASTER_PORT, and do not use it: they meet by a file.
        nowhere = RendezvousStoreInfo(master_addr="localhost", master_port=0)
        return RendezvousInfo(dist.HashStore(), 0, 1, nowhere)  # type: ignore[attr-defined]  # torch names no exports

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nobody else could come."""

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        return True


def main(folder: Path, count: int, kind: str) -> int:
    """Start the workers and wait until all have ended; returns the exit code."""
    keep_private(files=True)
    # Workers must inherit the pipe as their standard output, so it is not replaced here.
    end_with_reader(1, folder)
    rendezvous_handler_registry.register(_BACKEND, _make)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="enclave",
        rdzv_backend=_BACKEND,
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
        shutdown_timeout=SHUTDOWN_TIMEOUT_S,
    )
    command: list[Any] = [*interpreter_flags(), "-m", "cloister.enclave.worker", str(folder), kind]
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        say(1, {"ended": {rank: failure.exitcode for rank, failure in error.failures.items()}})
        return 1
    return 0


def _make(parameters: RendezvousParameters) -> RendezvousHandler:
    return Alone(parameters.run_id)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
