"""Training that is stopped anywhere and continued elsewhere gives the bytes of training that is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import PeftModel

from cloister.adapters.add import add_adapter
from cloister.adapters.state import adapter_files, adapter_state
from cloister.errors import AdapterError, RunError
from cloister.job import AdapterSection, TrainingSection
from cloister.model.cut import Latter, Whole
from cloister.training.checkpoint import Checkpoint
from cloister.training.loop import PackList, TrainingResult, train
from tests.unit.data.tiny_packs import random_pack
from tests.unit.model.tiny import VOCABULARY, tiny_model

STEPS = 6
LENGTHS = ([9, 14], [20], [5, 6, 11], [8, 8], [17])
PACKS = [random_pack(lengths, VOCABULARY, seed=i, hidden=32) for i, lengths in enumerate(LENGTHS)]


def section(**values: Any) -> TrainingSection:
    """Two packs a step, so that gradients are accumulated, and steps that span epochs."""
    base = {"steps": STEPS, "batch_tokens": 48, "learning_rate": 1e-2, "evaluations": 3, "weight_decay": 0.1}
    return TrainingSection.model_validate(base | values)


def fresh(dtype: torch.dtype = torch.float32, *, name: str = "llama", rank: int = 4) -> tuple[Whole, PeftModel]:
    latter = Latter(tiny_model(name, dtype), 2)
    return latter, add_adapter(latter, AdapterSection(rank=rank, dropout=0.1), first_layer=2, seed=3)


def packs(dtype: torch.dtype) -> PackList:
    return PackList([p.with_activations(p.given.to(dtype)) for p in PACKS])


def losses(values: list[float]) -> Callable[[], float]:
    """Validation losses in the order of the evaluations; draws numbers, as a validation must be free to."""
    left: Iterator[float] = iter(values)

    def validate() -> float:
        torch.rand(5)
        return next(left)

    return validate


def uninterrupted(
    dtype: torch.dtype, validation: list[float], name: str = "llama", **changes: Any
) -> tuple[TrainingResult, dict[str, bytes], list[bytes]]:
    """(what is known, adapter, a checkpoint after every step)"""
    half, adapted = fresh(dtype, name=name)
    saved: list[bytes] = []
    result = train(
        half, adapted, packs(dtype), section(**changes), seed=3, validate=losses(validation), checkpoints=STEPS,
        on_checkpoint=lambda c: saved.append(c.to_bytes()),
    )  # fmt: skip
    return result, adapter_files(adapted, "base"), saved


def continued(
    dtype: torch.dtype, saved: bytes, validation: list[float], name: str = "llama", **changes: Any
) -> tuple[TrainingResult, dict[str, bytes]]:
    """As another process would, whose generators are elsewhere."""
    half, adapted = fresh(dtype, name=name)
    torch.manual_seed(999)
    checkpoint = Checkpoint.from_bytes(saved)
    left = validation[checkpoint.step // 2 :]
    result = train(
        half, adapted, packs(dtype), section(**changes), seed=3, validate=losses(left), resume=checkpoint
    )  # fmt: skip
    return result, adapter_files(adapted, "base")


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, "llama"), (torch.bfloat16, "llama"), (torch.float32, "gpt2")]
)
@pytest.mark.parametrize("validation", [[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 1.0, 3.0]])
def test_stopped_after_any_step(dtype: torch.dtype, name: str, validation: list[float]) -> None:
    """Dropout, accumulation, weight decay, a falling rate; the best checkpoint is before, at or after the stop."""
    result, files, saved = uninterrupted(dtype, validation, name)
    assert len(saved) == STEPS
    for step, checkpoint in enumerate(saved, 1):
        again, same = continued(dtype, checkpoint, validation, name)
        assert same == files, f"stopped after step {step}"
        assert (again.curve, again.tokens, again.steps, again.best_step) == (
            result.curve, result.tokens, result.steps, result.best_step
        )  # fmt: skip


def test_stopped_twice() -> None:
    _, files, saved = uninterrupted(torch.float32, [2.0, 1.0, 3.0])
    half, adapted = fresh()
    more: list[bytes] = []
    train(
        half, adapted, packs(torch.float32), section(), seed=3, validate=losses([1.0, 3.0]), checkpoints=STEPS,
        resume=Checkpoint.from_bytes(saved[1]), on_checkpoint=lambda c: more.append(c.to_bytes()),
    )  # fmt: skip
    assert more == saved[2:]
    assert continued(torch.float32, more[0], [2.0, 1.0, 3.0])[1] == files


@pytest.mark.parametrize("lost", ["weights", "moments", "step", "best"])
def test_every_part_of_the_state_is_needed(lost: str) -> None:
    """What the tests above prove is not there by chance: without any one of them the bytes differ."""
    validation = [1.0, 2.0, 3.0]
    _, files, saved = uninterrupted(torch.float32, validation)
    whole = Checkpoint.from_bytes(saved[2])
    _, adapted = fresh()
    missing: dict[str, dict[str, Any]] = {
        "weights": {"weights": adapter_state(adapted)},
        "moments": {"moments": {}},
        "step": {"step": 1},
        "best": {"best": 4.0, "best_weights": None},
    }
    keep = "best" if lost == "best" else "last"
    if keep == "last":
        _, files, saved = uninterrupted(torch.float32, validation, keep="last")
        whole = Checkpoint.from_bytes(saved[2])
    changed = replace(whole, **missing[lost]).to_bytes()
    assert continued(torch.float32, saved[2], validation, keep=keep)[1] == files
    assert continued(torch.float32, changed, validation, keep=keep)[1] != files


def test_bytes_come_back_as_they_were() -> None:
    _, _, saved = uninterrupted(torch.bfloat16, [3.0, 2.0, 1.0])
    for content in saved:
        assert Checkpoint.from_bytes(content).to_bytes() == content
    first = Checkpoint.from_bytes(saved[0])
    assert first.best == float("inf")
    assert first.best_weights is None
    assert first.curve[0].validation_bits_per_byte is None


def test_checkpoints_are_evenly_spaced_and_one_is_at_the_end() -> None:
    half, adapted = fresh()
    steps: list[int] = []
    train(
        half, adapted, packs(torch.float32), section(), seed=0, checkpoints=2,
        on_checkpoint=lambda c: steps.append(c.step),
    )  # fmt: skip
    assert steps == [3, 6]


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, bytes(safetensors.torch.save({"counts": torch.zeros(2)}))])
def test_what_is_no_checkpoint(content: bytes) -> None:
    with pytest.raises(RunError, match="does not hold the state"):
        Checkpoint.from_bytes(content)


def test_a_checkpoint_of_another_adapter() -> None:
    _, _, saved = uninterrupted(torch.float32, [3.0, 2.0, 1.0])
    half, adapted = fresh(rank=2)
    with pytest.raises(AdapterError, match="another adapter"):
        train(half, adapted, packs(torch.float32), section(), seed=3, resume=Checkpoint.from_bytes(saved[0]))
