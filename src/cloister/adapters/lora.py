"""LoRA through PEFT, on chosen layers, with files that are the same bytes for the same adapter."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from cloister.adapters.files import CONFIG, WEIGHTS, adapter_sha256, write_adapter
from cloister.errors import AdapterError
from cloister.job import AdapterSection
from cloister.model.cut import Whole

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "adapter_config",
    "adapter_files",
    "adapter_sha256",
    "adapter_state",
    "add_lora",
    "load_adapter_weights",
    "write_adapter",
]


def add_lora(half: Whole, section: AdapterSection, *, first_layer: int, seed: int) -> PeftModel:
    """Put trainable LoRA matrices into the layers of `half` from `first_layer` on. Its model is changed in place.

    The matrices depend on the seed and on the layers chosen, not on whether former layers are present.

    Raises:
        AdapterError: no module matches `target_modules`; the message lists what there is.
    """
    layers = half.anatomy.layers(half.model)
    found = {n.rpartition(".")[2]: m for n, m in layers[first_layer:].named_modules() if _is_linear(m)}
    linear = sorted(found)
    wanted = linear if section.target_modules == "all-linear" else section.target_modules
    missing = [name for name in wanted if name not in linear]
    if missing:
        raise AdapterError(
            f"no linear module is called {missing[0]!r}; there are {', '.join(linear)}",
            where="[adapter] target_modules",
            hint='choose from these names, or "all-linear"',
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=section.rank,
        lora_alpha=section.alpha,  # type: ignore[arg-type]  # PEFT computes with it as a number, its annotation is int
        lora_dropout=section.dropout,
        target_modules=wanted,
        # Conv1D keeps its weight transposed; PEFT wants to be told.
        fan_in_fan_out=any(not isinstance(found[name], nn.Linear) for name in wanted),
        layers_to_transform=list(range(first_layer, len(layers))),
        layers_pattern=half.anatomy.layers_name,
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # PEFT 0.21 reads an attribute that transformers 5.23 has renamed; nothing depends on it here.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted = get_peft_model(half.model, config)
    if not isinstance(adapted, PeftModel):
        raise TypeError("PEFT returned a mixed model")
    return adapted


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def adapter_state(adapted: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors under the names of its file, on the CPU, in name order."""
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return {name: state[name].detach().cpu().contiguous() for name in sorted(state)}


def adapter_config(adapted: PeftModel, base_model: str) -> dict[str, Any]:
    """The adapter's configuration in canonical form: what PEFT keeps in sets is sorted."""
    config = adapted.peft_config["default"].to_dict()
    config = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.items()}
    for key in ("target_modules", "layers_to_transform"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    config["inference_mode"] = True
    config["base_model_name_or_path"] = base_model
    config["peft_type"], config["task_type"] = "LORA", "CAUSAL_LM"
    return {k: config[k] for k in sorted(config)}


def adapter_files(adapted: PeftModel, base_model: str) -> dict[str, bytes]:
    """The files of a standard PEFT folder, as bytes: the same adapter gives the same bytes."""
    config = json.dumps(adapter_config(adapted, base_model), indent=2, sort_keys=True) + "\n"
    return {CONFIG: config.encode(), WEIGHTS: bytes(safetensors.torch.save(adapter_state(adapted), {"format": "pt"}))}


def load_adapter_weights(adapted: PeftModel, state: Mapping[str, Tensor]) -> None:
    """Put weights from `adapter_state` back, e.g. those of the best checkpoint.

    Raises:
        AdapterError: names or shapes differ.
    """
    own = adapter_state(adapted)
    if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in state.items()}:
        raise AdapterError("the saved weights are of another adapter", hint="use the job that made them")
    parameters = dict(adapted.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            prefix, _, leaf = name.rpartition(".")
            parameters[f"{prefix}.default.{leaf}"].copy_(value)
