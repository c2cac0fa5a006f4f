"""Hugging Face's Trainer with PEFT LoRA, as a careful user would set it up for packed text.

- Packs of several documents, a step's packs as one batch of rows; rows are as long as the longest pack of the step.
- Loss on responses only: labels are -100 elsewhere. The mean is over all targets of a step, which Trainer sees to.
- Attention stays within documents: `position_ids` begin again at each of them, from which transformers makes a mask
  for its "sdpa" attention.
- AdamW (fused), the same learning rates and clipping as every other system; no checkpoints, no logging, no copies of
  the data by worker processes (they are in memory).

What it does that Cloister's own loop does not: logits, in float32 too, of all positions; attention over whole rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from cloister.adapters.wrap import wrap
from cloister.data.packing import Pack
from cloister.job import AdapterSection, TrainingSection

_NO_LABEL = -100


def add_peft_lora(model: PreTrainedModel, section: AdapterSection, seed: int) -> PeftModel:
    """LoRA on all layers, by PEFT's own names."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=section.rank,
        lora_alpha=section.alpha,  # type: ignore[arg-type]  # PEFT computes with it as a number, its annotation is int
        lora_dropout=section.dropout,
        target_modules=section.target_modules,
    )
    return wrap(model, config, seed)


def rows_of(packs: Sequence[Pack]) -> dict[str, Tensor]:
    """A step's packs as a batch: input_ids, labels and position_ids, (packs, longest) int64.

    What pads a short row goes on counting positions, so it belongs to the row's last document and nobody looks at it.
    """
    longest = max(map(len, packs))
    ids = torch.zeros(len(packs), longest, dtype=torch.int64)
    labels = torch.full_like(ids, _NO_LABEL)
    positions = torch.zeros_like(ids)
    for row, pack in enumerate(packs):
        size = len(pack)
        ids[row, :size] = pack.given
        positions[row, :size] = pack.layout.position_T
        positions[row, size:] = torch.arange(longest - size) + int(pack.layout.position_T[-1]) + 1
        labels[row, pack.target_pos_N + 1] = pack.target_id_N
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def train_with_trainer(
    adapted: PeftModel,
    batches: Sequence[Sequence[Pack]],
    rates: Sequence[float],
    training: TrainingSection,
    *,
    seed: int,
    folder: Path,
    on_step: Callable[[int, float], None],
) -> None:
    """Take one optimiser step for each batch, at its learning rate.

    Args:
        folder: Trainer wants one; nothing is written there.
        on_step: called after each step with its number (from 1) and its loss in nats per target.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,  # an item of the data set is a whole batch
        max_steps=len(batches),
        max_grad_norm=training.max_grad_norm,
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
    )
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1.0, weight_decay=training.weight_decay, fused=True)
    schedule = LambdaLR(optimiser, lambda step: rates[min(step, len(rates) - 1)])
    trainer = _LoggingTrainer(
        model=adapted,
        args=arguments,
        train_dataset=list(batches),
        data_collator=lambda items: rows_of(items[0]),
        optimizers=(optimiser, schedule),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_AfterStep(trainer, on_step))
    trainer.train()


class _LoggingTrainer(Trainer):
    """Keeps the loss of the latest step."""

    loss = torch.zeros(())

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.loss = loss.detach() if isinstance(loss, Tensor) else loss[0].detach()
        return loss


class _AfterStep(TrainerCallback):
    """Tells of a step."""

    def __init__(self, trainer: _LoggingTrainer, on_step: Callable[[int, float], None]) -> None:
        self._trainer, self._on_step = trainer, on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._on_step(state.global_step, float(self._trainer.loss))
