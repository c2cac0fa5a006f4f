"""The training loop: the same for the latter half in the enclave, for a whole model, and for every baseline.

Deterministic: batches, learning rates and dropout depend on the seed alone, and with a fixed number of threads and
processes two runs on one machine give the same bytes. So does one that is continued from a checkpoint.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import torch
from peft import PeftModel
from torch import Tensor

from cloister.adapters.state import adapter_state, load_adapter_weights
from cloister.data.packing import Pack
from cloister.errors import RunError
from cloister.job import TrainingSection
from cloister.model.cut import Whole
from cloister.training.ahead import ahead
from cloister.training.checkpoint import Checkpoint, Point
from cloister.training.loss import target_nll
from cloister.training.schedule import learning_rate, pack_seed, plan_steps
from cloister.training.team import Alone, Team

_T = TypeVar("_T")


class PackSource(Protocol):
    """Packs that can be read in any order; tokens and targets are known without reading them."""

    @property
    def tokens(self) -> Sequence[int]: ...

    @property
    def targets(self) -> Sequence[int]: ...

    def __getitem__(self, index: int, /) -> Pack: ...


@dataclass(frozen=True)
class PackList:
    """Packs in memory as a source."""

    packs: Sequence[Pack]

    @property
    def tokens(self) -> list[int]:
        return [len(p) for p in self.packs]

    @property
    def targets(self) -> list[int]:
        return [len(p.target_pos_N) for p in self.packs]

    def __getitem__(self, index: int, /) -> Pack:
        return self.packs[index]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One party's packs under the trained adapter; see `training.examine`."""

    tokens: int
    """Looked at."""
    loss: float
    """Mean, nats per target."""
    gradient_norm: float
    """Euclidean norm of the gradient of that mean, over all trained parameters."""


@dataclass(kw_only=True)
class TrainingResult:
    """The adapter is left in the model; this is what is known of how it came about."""

    steps: int = 0
    tokens: int = 0
    best_step: int = 0
    curve: list[Point] = field(default_factory=list)
    best: float = math.inf
    best_weights: Mapping[str, Tensor] | None = field(default=None, repr=False)
    fits: Mapping[str, Fit] = field(default_factory=dict)
    """By party, at the end."""


class Stepper:
    """One adapter and its optimiser, a step at a time.

    Args:
        half: The whole model or its latter half; `adapted` is PEFT's view of the same modules.
        in_flight: How many packs of a step are worked on at once, where products are computed elsewhere. The result
            does not depend on it, bit for bit; with dropout 1 is taken, since random numbers are drawn in order.
        verify: Called before anything of a step is applied; raises where a product was wrong.
        team: The processes that share the packs of each step, each with the same adapter.
        owner: Names whose pack it is, where an error is to name who sent packs whose loss is not finite.
    """

    def __init__(
        self,
        half: Whole,
        adapted: PeftModel,
        training: TrainingSection,
        *,
        in_flight: int = 1,
        verify: Callable[[], None] = lambda: None,
        team: Team | None = None,
        owner: Callable[[int], str] | None = None,
    ) -> None:
        self._owner = owner
        self._half, self._adapted, self._training, self._verify = half, adapted, training, verify
        self._team, self._draw = team or Alone(), tuple[int, ...]()
        self._parameters = [p for p in adapted.parameters() if p.requires_grad]
        self._optimiser = torch.optim.AdamW(self._parameters, lr=0.0, weight_decay=training.weight_decay, fused=True)
        self._in_flight = 1 if has_dropout(adapted) else in_flight

    def step(
        self, source: PackSource, members: Sequence[int], rate: float, *, where: str, draw: tuple[int, ...] = ()
    ) -> tuple[float, float]:
        """One update from the mean over all targets of `members` (packs of `source`), at learning rate `rate`.

        Args:
            draw: (seed, step) that each pack's dropout is drawn from, whoever works on it; else it is drawn in order.

        Returns:
            The loss in nats per target, and the norm of its gradient.

        Raises:
            RunError: the loss or a gradient is not finite; nothing is applied. What `verify` raises; the same.
        """
        _train_mode(self._adapted)
        self._draw = draw if has_dropout(self._adapted) else ()
        try:
            loss = self._accumulate(source, members)
            self._verify()
            norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._training.max_grad_norm))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                message = f"the loss is {loss} and the gradient norm {norm}"
                names = "" if math.isfinite(loss) else ", ".join(self._not_finite(source, members))
                hint = "look at what is named, or lower" if names else "lower"
                where = f"{where}, {names}" if names else where
                raise RunError(message, where=where, hint=f"{hint} [training] learning_rate")
            for group in self._optimiser.param_groups:
                group["lr"] = rate
            self._optimiser.step()
        finally:
            self._optimiser.zero_grad(set_to_none=True)
        return loss, norm

    def examine(self, source: PackSource, members: Sequence[int]) -> tuple[float, float]:
        """The loss of `members` and its gradient's norm, as `step` gives them, without dropout; nothing changes."""
        self._adapted.eval()
        self._draw = ()
        try:
            loss = self._accumulate(source, members)
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            return loss, float(torch.nn.utils.get_total_norm(gradients))
        finally:
            self._optimiser.zero_grad(set_to_none=True)

    def _not_finite(self, source: PackSource, members: Sequence[int]) -> list[str]:
        """Whose packs alone give a loss that is not finite."""
        if self._owner is None:
            return []
        with torch.no_grad():
            losses = {i: float(self._loss(source[i], max(1, source.targets[i]))) for i in members}
        return list(dict.fromkeys(self._owner(i) for i in members if not math.isfinite(losses[i])))

    def _accumulate(self, source: PackSource, members: Sequence[int]) -> float:
        """Add up gradients, pack by pack in the order of `members`; returns the loss."""
        num_targets = sum(source.targets[i] for i in members)
        if self._in_flight == 1:
            share = self._team.share([source.tokens[i] for i in members])
            own, idle = ([members[place] for place in places] for places in (share.own, share.idle))
            loss = sum(self._backward(pack, i, num_targets) for i, pack in zip(own, ahead(source, own), strict=True))
            for pack in ahead(source, idle):
                (self._loss(pack, num_targets) * 0.0).backward()  # type: ignore[no-untyped-call]
            return self._team.total(self._parameters, loss)
        total = 0.0
        tasks = [partial(self._gradients, source, index, num_targets) for index in members]
        for loss, gradients in in_order(tasks, self._in_flight):
            total += loss
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return total

    def _loss(self, pack: Pack, num_targets: int) -> Tensor:
        return target_nll(self._half, pack.to(self._half.device)).sum() / num_targets

    def _backward(self, pack: Pack, index: int, num_targets: int) -> float:
        if self._draw:
            torch.manual_seed(pack_seed(*self._draw, index))
        loss = self._loss(pack, num_targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def _gradients(self, source: PackSource, index: int, num_targets: int) -> tuple[float, tuple[Tensor | None, ...]]:
        loss = self._loss(source[index], num_targets)
        return loss.item(), torch.autograd.grad(loss, self._parameters, allow_unused=True)

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """AdamW's state by parameter name, copied to the CPU."""
        return {
            name: {key: value.detach().cpu().clone() for key, value in self._optimiser.state[parameter].items()}
            for name, parameter in _trained(self._adapted)
            if parameter in self._optimiser.state
        }

    def set_moments(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put back what `moments` gave; a parameter that is not named begins anew."""
        self._optimiser.state.clear()
        for name, parameter in _trained(self._adapted):
            if name in moments:
                self._optimiser.state[parameter] = {
                    key: value.to(parameter.device, copy=True) for key, value in moments[name].items()
                }


def in_order(tasks: Sequence[Callable[[], _T]], in_flight: int) -> Iterator[_T]:
    """Results in the order of the tasks, of which `in_flight` run at once."""
    with ThreadPoolExecutor(in_flight) as pool:
        running: deque[Future[_T]] = deque()
        for task in tasks:
            running.append(pool.submit(task))
            if len(running) == in_flight:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def has_dropout(adapted: PeftModel) -> bool:
    """Whether training draws random numbers."""
    return any(
        isinstance(module, torch.nn.Dropout) and module.p > 0 and "lora_dropout" in name
        for name, module in adapted.named_modules()
    )


def train(
    half: Whole,
    adapted: PeftModel,
    source: PackSource,
    training: TrainingSection,
    *,
    seed: int,
    validate: Callable[[], float] | None = None,
    on_point: Callable[[Point, int], None] = lambda point, num_steps: None,
    resume: Checkpoint | None = None,
    checkpoints: int = 0,
    on_checkpoint: Callable[[Checkpoint], None] = lambda checkpoint: None,
    team: Team | None = None,
    owner: Callable[[int], str] | None = None,
) -> TrainingResult:
    """Train the adapter in place.

    Args:
        half: The whole model or its latter half; `adapted` is PEFT's view of the same modules.
        source: Token ids for a whole model, activations for a latter half.
        validate: Gives the validation loss in bits per byte; called `training.evaluations` times.
        on_point: Called after every step with the point and the number of steps.
        resume: Go on from here, in a model as it was before training: the result is that of an uninterrupted run.
        checkpoints: How often `on_checkpoint` is called, evenly, the last time after the last step.
        team: The processes that train together, each calling this with the same arguments.
        owner: Names whose pack it is, where an error is to name who sent packs whose loss is not finite.

    Raises:
        RunError: the loss or a gradient is not finite; nothing of that step is applied.
    """
    stepper = Stepper(half, adapted, training, team=team, owner=owner)
    steps = plan_steps(source.tokens, training, seed)
    marks = evaluation_steps(len(steps), training.evaluations if validate else 0)
    saves = evaluation_steps(len(steps), checkpoints)
    result = TrainingResult()
    torch.manual_seed(seed)
    if resume is not None:
        result = _restore(resume, adapted, stepper)
    for step, members in enumerate(steps[result.steps :], result.steps):
        rate = learning_rate(step, len(steps), training)
        loss, norm = stepper.step(source, members, rate, where=f"training step {step + 1}", draw=(seed, step))
        result.steps += 1
        result.tokens += sum(source.tokens[i] for i in members)
        bits = _validate(adapted, validate) if step + 1 in marks else None
        if bits is not None and bits < result.best and training.keep == "best":
            result.best, result.best_weights, result.best_step = bits, snapshot(adapted), step + 1
        point = Point(
            step=step + 1, tokens=result.tokens, train_loss=loss, grad_norm=norm, validation_bits_per_byte=bits
        )
        result.curve.append(point)
        on_point(point, len(steps))
        if step + 1 in saves:
            (team or Alone()).require_same(adapter_state(adapted), f"the adapter after step {step + 1}")
            on_checkpoint(_checkpoint(result, adapted, stepper))
    if result.best_weights is None:
        result.best_step = result.steps
    else:
        load_adapter_weights(adapted, result.best_weights)
    adapted.eval()
    return result


def _checkpoint(result: TrainingResult, adapted: PeftModel, stepper: Stepper) -> Checkpoint:
    return Checkpoint(
        step=result.steps,
        tokens=result.tokens,
        curve=list(result.curve),
        best=result.best,
        best_step=result.best_step,
        weights=snapshot(adapted),
        best_weights=result.best_weights,
        moments=stepper.moments(),
    )


def _restore(checkpoint: Checkpoint, adapted: PeftModel, stepper: Stepper) -> TrainingResult:
    """Put model and optimiser into the state of a checkpoint of the same job."""
    load_adapter_weights(adapted, checkpoint.weights)
    stepper.set_moments(checkpoint.moments)
    return TrainingResult(
        steps=checkpoint.step,
        tokens=checkpoint.tokens,
        best_step=checkpoint.best_step,
        curve=list(checkpoint.curve),
        best=checkpoint.best,
        best_weights=checkpoint.best_weights,
    )


def _trained(adapted: PeftModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, p) for name, p in adapted.named_parameters() if p.requires_grad)


def evaluation_steps(num_steps: int, count: int) -> set[int]:
    """After which steps (1-based) to validate: `count` times, evenly, the last time at the end."""
    return {math.ceil(num_steps * (i + 1) / count) for i in range(count)} if count else set()


def _train_mode(adapted: PeftModel) -> None:
    """Dropout on in the adapter, off in the base.

    Former layers run once, without dropout, so a base's own dropout (GPT-2 has 0.1) would be on in one half only.
    """
    adapted.eval()
    for name, module in adapted.named_modules():
        if name.endswith("lora_dropout"):
            module.train()


def _validate(adapted: PeftModel, validate: Callable[[], float] | None) -> float | None:
    if validate is None:
        return None
    adapted.eval()
    return validate()


def snapshot(adapted: PeftModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in adapter_state(adapted).items()}
