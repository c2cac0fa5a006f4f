"""A party's model in method `slice`: accelerators, pads, and the frozen layers behind them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from cloister.accelerator.client import AcceleratorClient
from cloister.accelerator.tls import LinkKey
from cloister.agreement.job import OpenJob
from cloister.errors import JobError, UsageError
from cloister.job import MaskingSection
from cloister.masking.dual import DualPads, on_one_host, require_two
from cloister.masking.layout import lay_out
from cloister.masking.linear import Accelerator, PadSource, Reply
from cloister.masking.model import build_masked_model
from cloister.masking.pads import InsecureNoPads, StreamId, stream_shapes
from cloister.masking.precomputed import ephemeral_pads
from cloister.masking.quantise import Direction
from cloister.masking.skeleton import plan_groups
from cloister.masking.store import open_store
from cloister.masking.weights import GroupPlan, WeightSink
from cloister.model.cut import Whole
from cloister.party.taking_part import Entering
from cloister.progress import Progress, task
from cloister.silo.keeper import find_keeper

IN_FLIGHT = 2
"""Packs worked on at once: while one waits for a product, the other computes."""


class Traffic:
    """An accelerator whose bytes are counted. Safe to use from several threads."""

    def __init__(self, accelerator: Accelerator, plans: Sequence[GroupPlan], *, parts: int, replies: int) -> None:
        """replies: accelerators that answer each request: two where the second answers for the pads."""
        self.name, self._accelerator = accelerator.name, accelerator
        self._shapes, self._replies = stream_shapes(plans), parts * replies
        self._lock = threading.Lock()
        self.bytes_up = self.bytes_down = 0

    def submit(self, group: str, direction: Direction, z_TK: Tensor) -> Reply:
        """See `Accelerator`."""
        outputs = self._shapes[group, direction].outputs
        with self._lock:
            self.bytes_up += z_TK.nbytes
            self.bytes_down += 4 * len(z_TK) * outputs * self._replies
        return self._accelerator.submit(group, direction, z_TK)


@dataclass(frozen=True, kw_only=True)
class SiloModel:
    """The whole model with masked layers."""

    half: Whole
    verify: Callable[[], None]
    traffic: Traffic
    warnings: list[str] = field(default_factory=list)


@contextmanager
def open_model(
    entering: Entering,
    opened: OpenJob,
    rows: Callable[[Sequence[GroupPlan]], Mapping[StreamId, int]],
    progress: Progress,
) -> Iterator[SiloModel]:
    """Connect, stream the weights once, and put the model behind masks.

    Args:
        rows: pad rows of each stream that the whole job needs here; asked for where pads are computed at the start.

    Raises:
        JobError: [masking] does not name the accelerators that it needs.
        UsageError: it protects nothing, and that was not allowed.
        ModelError, VerificationError: the model files are not the job's, or the kept pads not to be used.
        TransportError: an accelerator is away.
    """
    resolved, masking = opened.resolved, opened.resolved.job.masking
    _check_count(masking)
    if (weak := insecure(masking)) and not entering.insecure_simulated:
        hint = "only simulations on one machine, with --insecure-simulated, accept that"
        raise UsageError(weak[0], where="[masking]", hint=hint)
    with ExitStack() as ends:
        key = None if entering.key_file is None else LinkKey.load(entering.key_file)
        clients = [ends.enter_context(AcceleratorClient(address, key=key)) for address in masking.accelerators]
        plans = plan_groups(resolved.model.folder)
        pads, sinks, warnings = _pads(ends, entering, opened, clients, plans, rows, progress)
        traffic = Traffic(clients[0], plans, parts=masking.bits // 8, replies=len(clients))
        with task(progress, "weights to the accelerator", total=resolved.model.num_bytes, unit="bytes") as running:
            masked = build_masked_model(
                resolved.model.folder,
                json.loads(resolved.canonical)["model_files"],
                dtype=resolved.job.model.dtype,
                bits=masking.bits,
                rows=resolved.job.training.max_tokens,
                sinks=[*clients, *sinks],
                accelerator=traffic,
                pads=pads,
                check=masking.check,
                on_bytes=running.advance,
            )
        warnings += insecure(masking)
        half = Whole(masked.model, all_tokens=True)
        yield SiloModel(half=half, verify=masked.verify, traffic=traffic, warnings=warnings)


def _check_count(masking: MaskingSection) -> None:
    wanted = 2 if masking.pads == "dual" else 1
    if len(masking.accelerators) != wanted:
        hint = 'start one with `cloister accelerator`; "unix:PATH" on this machine, "HOST:PORT#KEY" elsewhere'
        message = f'pads = "{masking.pads}" needs {wanted}, got {len(masking.accelerators)}'
        raise JobError(message, where="[masking] accelerators", hint=hint)


def _pads(
    ends: ExitStack,
    entering: Entering,
    opened: OpenJob,
    clients: Sequence[AcceleratorClient],
    plans: Sequence[GroupPlan],
    rows: Callable[[Sequence[GroupPlan]], Mapping[StreamId, int]],
    progress: Progress,
) -> tuple[PadSource, list[WeightSink], list[str]]:
    """Where pads come from, what has to see the weights for that, and what it does not protect."""
    masking = opened.resolved.job.masking
    parts = masking.bits // 8
    if masking.pads == "dual":
        require_two(masking.accelerators)
        return DualPads(clients[1], plans, first=clients[0]), [], []
    if masking.pads == "none":
        return InsecureNoPads(plans, parts=parts), [], []
    if masking.pad_store is not None:
        folder = opened.resolved.loaded.local_path(masking.pad_store)
        keeper = find_keeper(opened, entering.party, folder, insecure_simulated=entering.insecure_simulated)
        stored = ends.enter_context(
            open_store(
                folder,
                job_id=bytes.fromhex(opened.resolved.job_id),
                party=entering.party,
                key=keeper.key,
                counter=keeper.counter,
            )
        )
        kept = ["INSECURE: kept pads are sealed by a key file, whoever copies the disk can use them twice"]
        return stored, [stored], kept if keeper.insecure else []
    planned = rows(plans)
    total = lay_out(plans, planned, parts=parts).multiply_adds
    counting = ends.enter_context(task(progress, "computing pads", total=total, unit="products"))
    computing, pads = ends.enter_context(
        ephemeral_pads(plans, planned, parts=parts, folder=entering.out, count=counting.advance)
    )
    return pads, [computing], []


def both_on_one_host(masking: MaskingSection) -> bool:
    """Whether one machine has what is masked and the masks. With no addresses yet, a run starts both on its own."""
    return masking.pads == "dual" and (len(masking.accelerators) < 2 or on_one_host(masking.accelerators))


def insecure(masking: MaskingSection) -> list[str]:
    """What a job's masking does not protect, in words."""
    found = []
    if masking.pads == "none":
        found.append('INSECURE: pads = "none" masks nothing, the accelerator sees everything')
    if both_on_one_host(masking):
        found.append("INSECURE: both accelerators are on one machine, whose owner sees everything")
    if not masking.check:
        found.append("INSECURE: check = false, the accelerator's products are not checked")
    return found
