"""One of the processes that an enclave starts to train with it: does what the enclave's own does, and says nothing.

    python -m cloister.enclave.worker FOLDER KIND

Started by `torchrun`, which gives it its rank. It holds the parties' data keys and decrypts the packs that fall to it.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

import torch

from cloister.attest.isolation import require_isolated
from cloister.enclave.compute import Work, open_payloads, run_scoring, run_training
from cloister.enclave.group import join, leave
from cloister.enclave.handover import Handover, read_memory
from cloister.enclave.lifeline import describe, end_with_reader, say, take_stdout
from cloister.enclave.placing import own_device, placing
from cloister.errors import CloisterError
from cloister.model.anatomy import load_model
from cloister.model.cut import Latter
from cloister.model.repacked import repack
from cloister.private import keep_private
from cloister.training.checkpoint import Checkpoint
from cloister.training.team import LostProcessError, is_loss

LOST_EXIT_CODE = 75
"""Another process was lost: not the cause, but what follows from it."""


def main(folder: Path, kind: str, dist_rank: int) -> int:
    """Compute to the end; returns the exit code.

    Args:
        kind: type of the enclave's evidence. dist_rank: from 1; the enclave's own process is 0.
    """
    keep_private(files=True)
    pipe = take_stdout()
    end_with_reader(pipe, folder)
    try:
        require_isolated(kind)
        handover = Handover.from_bytes(read_memory(0))
        _forget_stdin()
        _compute(handover, dist_rank, pipe)
    except LostProcessError:
        return LOST_EXIT_CODE
    except RuntimeError as error:  # where layers are parted, in the middle of a pass
        if is_loss(error):
            return LOST_EXIT_CODE
        raise
    except CloisterError as error:
        say(pipe, {"rank": dist_rank, "error": describe(error)})
        return 1
    return 0


def _forget_stdin() -> None:
    """The memory with the keys goes when the last descriptor of it does."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def _compute(handover: Handover, dist_rank: int, pipe: int) -> None:
    job = handover.job
    torch.set_num_threads(handover.threads)
    device = own_device(handover.device, dist_rank)
    model = load_model(handover.model, job.model.dtype, "cpu" if handover.parted else str(device))
    latter = Latter(repack(model, job.enclave.repack and not handover.parted), handover.cut)
    with ExitStack() as opened:
        payloads = open_payloads(opened, job, latter, handover.sources)
        say(pipe, {"ready": dist_rank})
        team = join(handover.folder, dist_rank, job.enclave.processes, device, even=handover.parted)
        opened.callback(leave)
        work = Work(
            job=job,
            cut=handover.cut,
            latter=latter,
            payloads=payloads,
            cache_bytes=handover.cache_bytes,
            team=team,
            place=placing(device, parted=handover.parted),
        )
        resume = Checkpoint.from_bytes(handover.checkpoint) if handover.checkpoint else None
        adapted, _ = run_training(work, resume=resume)
        run_scoring(work, adapted)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], 1 + int(os.environ["RANK"])))
