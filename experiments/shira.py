"""PEFT's SHiRA (2406.13175) as a rival of SPF: as many trained weights, anywhere in the same matrices, by chance."""

from __future__ import annotations

import torch
from peft import PeftModel, ShiraConfig

from cloister.adapters.spf.rows import MLP_INPUTS, QUERY_KEY_VALUE
from cloister.adapters.wrap import wrap
from cloister.errors import AdapterError
from cloister.job import AdapterSection
from cloister.model.cut import Whole


def takes(model_type: str) -> bool:
    """Whether PEFT's SHiRA can be put into such models: it takes `nn.Linear`, and GPT-2's layers are `Conv1D`."""
    return model_type != "gpt2"


def add_shira(half: Whole, section: AdapterSection, *, first_layer: int, seed: int) -> PeftModel:
    """Put SHiRA into the modules whose rows SPF would train, with as many weights as its ratio gives there.

    Raises:
        AdapterError: the section is not one of SPF with default modules and no LoRA, or SHiRA cannot have so many.
    """
    if section.kind != "spf" or section.row_modules is not None or section.lora_modules != []:
        raise AdapterError("is compared with SPF alone, on its default modules", where="SHiRA")
    ends = (*QUERY_KEY_VALUE, *MLP_INPUTS)
    found = {
        name: module.weight.shape
        for name, module in half.model.named_modules()
        if name.rpartition(".")[2] in ends and _layer(name) >= first_layer
    }
    # Its rank r means r (M + K) weights of an M x K matrix.
    weights = section.ratio * sum(shape.numel() for shape in found.values())
    rank = round(weights / sum(sum(shape) for shape in found.values()))
    most = min(shape.numel() // sum(shape) for shape in found.values())
    if not 1 <= rank <= most:
        raise AdapterError(f"rank {rank} is not within 1 to {most}", where="SHiRA", hint="another ratio")
    # PEFT's layer makes a sparse tensor of its own indices at every step; torch wants to be told not to check them.
    torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]
    return wrap(half.model, ShiraConfig(r=rank, target_modules=list(found), random_seed=seed), seed)


def _layer(name: str) -> int:
    """The number in `model.layers.NUMBER.self_attn.q_proj`."""
    return int(next(part for part in name.split(".") if part.isdigit()))
