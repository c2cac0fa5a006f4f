"""What several processes in the enclave (`[enclave] processes`) change in a plan."""

from __future__ import annotations

from cloister.job import EnclaveSection, Job
from cloister.methods import estimate
from cloister.methods.estimate import ModelSize, PartCount
from cloister.methods.host import usable_cpus

TORCHRUN_BYTES = 240 << 20
"""Resident memory of torchrun, which starts the processes and waits for them."""


def team_memory(
    job: Job, model: ModelSize, parameter_bytes: float, kept_bytes: float, copied_bytes: float, cache_bytes: int
) -> int:
    """Peak resident memory of all processes of the enclave of method `split` together.

    Each holds the whole model, or with `sharding = "full"` its part of the layers; the cache is shared out.
    """
    count = job.enclave.processes
    own = estimate.enclave_memory(model, parameter_bytes, kept_bytes, copied_bytes, cache_bytes // count)
    if count == 1:
        return own
    elsewhere = int((count - 1) * model.latter * parameter_bytes) if job.enclave.sharding == "full" else 0
    return count * own - elsewhere + TORCHRUN_BYTES


def busy_threads(section: EnclaveSection) -> int:
    """Threads of all processes that a processor is there for."""
    cpus = usable_cpus()
    if section.processes == 1:
        return section.threads or cpus
    return min(cpus, section.processes * (section.threads or max(1, cpus // section.processes)))


def crowding(section: EnclaveSection) -> list[str]:
    """A warning where the processes have more threads than this machine has processors."""
    threads, cpus = section.processes * (section.threads or 1), usable_cpus()
    if section.processes == 1 or threads <= cpus:
        return []
    return [f"[enclave] {section.processes} processes with {threads} threads on {cpus} processors: slower than fewer"]


def idleness(job: Job, train: PartCount) -> list[str]:
    """A warning where a step has fewer packs than there are processes: a run refuses that, with the exact counts."""
    packs = max(1, int(job.training.batch_tokens / (train.tokens / max(train.packs, 1))))
    if job.enclave.processes <= packs:
        return []
    return [f"[enclave] {job.enclave.processes} processes share about {packs} packs in a step; a run will refuse that"]
