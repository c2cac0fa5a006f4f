"""The training loop: the same for the latter half in the enclave, for a whole model, and for every baseline.

Deterministic: batches, learning rates and dropout depend on the seed alone, and with a fixed number of threads two
runs on one machine give the same bytes. So does one that is continued from a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from peft import PeftModel
from torch import Tensor

from cloister.adapters.lora import adapter_state, load_adapter_weights
from cloister.data.packing import Pack
from cloister.errors import RunError
from cloister.job import TrainingSection
from cloister.model.cut import Whole
from cloister.training.checkpoint import Checkpoint, Point, random_states, set_random_states
from cloister.training.loss import target_nll
from cloister.training.schedule import learning_rate, plan_steps


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


@dataclass(kw_only=True)
class TrainingResult:
    """The adapter is left in the model; this is what is known of how it came about."""

    steps: int = 0
    tokens: int = 0
    best_step: int = 0
    curve: list[Point] = field(default_factory=list)
    best: float = math.inf
    best_weights: Mapping[str, Tensor] | None = field(default=None, repr=False)


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
) -> TrainingResult:
    """Train the adapter in place.

    Args:
        half: The whole model or its latter half; `adapted` is PEFT's view of the same modules.
        source: Token ids for a whole model, activations for a latter half.
        validate: Gives the validation loss in bits per byte; called `training.evaluations` times.
        on_point: Called after every step with the point and the number of steps.
        resume: Go on from here, in a model as it was before training: the result is that of an uninterrupted run.
        checkpoints: How often `on_checkpoint` is called, evenly, the last time after the last step.

    Raises:
        RunError: the loss or a gradient is not finite; nothing of that step is applied.
    """
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=0.0, weight_decay=training.weight_decay, fused=True)
    steps = plan_steps(source.tokens, training, seed)
    marks = evaluation_steps(len(steps), training.evaluations if validate else 0)
    saves = evaluation_steps(len(steps), checkpoints)
    result = TrainingResult()
    torch.manual_seed(seed)
    if resume is not None:
        result = _restore(resume, half, adapted, optimiser)
    for step, members in enumerate(steps[result.steps :], result.steps):
        _train_mode(adapted)
        loss = _accumulate(half, source, members)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RunError(
                f"the loss is {loss} and the gradient norm {norm}",
                where=f"training step {step + 1}",
                hint="lower [training] learning_rate",
            )
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, len(steps), training)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        result.steps += 1
        result.tokens += sum(source.tokens[i] for i in members)
        bits = _validate(adapted, validate) if step + 1 in marks else None
        if bits is not None and bits < result.best and training.keep == "best":
            result.best, result.best_weights, result.best_step = bits, _snapshot(adapted), step + 1
        point = Point(
            step=step + 1, tokens=result.tokens, train_loss=loss, grad_norm=norm, validation_bits_per_byte=bits
        )
        result.curve.append(point)
        on_point(point, len(steps))
        if step + 1 in saves:
            on_checkpoint(_checkpoint(result, half, adapted, optimiser))
    if result.best_weights is None:
        result.best_step = result.steps
    else:
        load_adapter_weights(adapted, result.best_weights)
    adapted.eval()
    return result


def _checkpoint(
    result: TrainingResult, half: Whole, adapted: PeftModel, optimiser: torch.optim.Optimizer
) -> Checkpoint:
    return Checkpoint(
        step=result.steps,
        tokens=result.tokens,
        curve=list(result.curve),
        best=result.best,
        best_step=result.best_step,
        weights=_snapshot(adapted),
        best_weights=result.best_weights,
        moments={
            name: {key: value.detach().cpu().clone() for key, value in optimiser.state[parameter].items()}
            for name, parameter in _trained(adapted)
            if parameter in optimiser.state
        },
        random=random_states(half.device),
    )


def _restore(
    checkpoint: Checkpoint, half: Whole, adapted: PeftModel, optimiser: torch.optim.Optimizer
) -> TrainingResult:
    """Put model, optimiser and generators into the state of a checkpoint of the same job."""
    load_adapter_weights(adapted, checkpoint.weights)
    for name, parameter in _trained(adapted):
        if name in checkpoint.moments:
            optimiser.state[parameter] = {
                key: value.to(parameter.device) for key, value in checkpoint.moments[name].items()
            }
    set_random_states(checkpoint.random, half.device)
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


def _accumulate(half: Whole, source: PackSource, members: list[int]) -> float:
    """Gradients of the mean over all targets of the step, one pack at a time; returns that mean in nats."""
    num_targets = sum(source.targets[i] for i in members)
    total = 0.0
    for index in members:
        loss = target_nll(half, source[index].to(half.device)).sum() / num_targets
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


def _validate(adapted: PeftModel, validate: Callable[[], float] | None) -> float | None:
    if validate is None:
        return None
    adapted.eval()
    return validate()


def _snapshot(adapted: PeftModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in adapter_state(adapted).items()}
