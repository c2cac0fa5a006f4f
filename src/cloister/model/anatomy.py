"""What a Hugging Face causal language model consists of: embedding, decoder layers, final norm, head.

Nothing here knows an architecture by name. A model is understood when its trunk (`base_model`) holds one
`nn.ModuleList` of `config.num_hidden_layers` decoder layers and one final norm as direct children; everything else
of its forward pass (positions, masks, scaling, soft caps) stays the model's own code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from cloister.errors import ModelError
from cloister.model import attention

# Their advice (progress of weight loading, long texts) is for other uses of the library; Cloister reports on its own.
logging.set_verbosity_error()  # type: ignore[no-untyped-call]
logging.disable_progress_bar()  # type: ignore[no-untyped-call]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Names of the parts of a causal language model, as attributes of its trunk."""

    trunk_name: str
    layers_name: str
    norm_name: str
    num_layers: int

    def trunk(self, model: PreTrainedModel) -> nn.Module:
        trunk = getattr(model, self.trunk_name)
        if not isinstance(trunk, nn.Module):
            raise TypeError(f"{self.trunk_name} is not a module")
        return trunk

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        layers = getattr(self.trunk(model), self.layers_name)
        if not isinstance(layers, nn.ModuleList):
            raise TypeError(f"{self.layers_name} is not a module list")
        return layers


def find_anatomy(model: PreTrainedModel) -> Anatomy:
    """Find the parts of `model`.

    Raises:
        ModelError: a part is missing or ambiguous; the message says what was looked for and what was found.
    """
    where = type(model).__name__
    num_layers = getattr(model.config, "num_hidden_layers", None)
    trunk = getattr(model, model.base_model_prefix, None)
    if not isinstance(trunk, nn.Module) or not isinstance(num_layers, int):
        raise ModelError(
            f"no trunk called {model.base_model_prefix!r} with config.num_hidden_layers was found",
            where=where,
            hint=_HINT,
        )
    lists = [n for n, m in trunk.named_children() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    if len(lists) != 1:
        found = [f"{n} ({len(m)})" for n, m in trunk.named_children() if isinstance(m, nn.ModuleList)]
        raise ModelError(
            f"looked for one nn.ModuleList of {num_layers} decoder layers in the trunk, found {found or 'none'}",
            where=where,
            hint=_HINT,
        )
    norms = [n for n, m in trunk.named_children() if "norm" in type(m).__name__.lower()]
    if len(norms) != 1:
        raise ModelError(
            f"looked for one final norm (a direct child of the trunk of a class ...Norm), found {norms or 'none'}",
            where=where,
            hint=_HINT,
        )
    if find_head(model) is None or model.get_input_embeddings() is None:
        raise ModelError("looked for input embeddings and an output head, one is missing", where=where, hint=_HINT)
    if "chunked_attention" in (getattr(model.config, "layer_types", None) or ()):
        raise ModelError("layers with chunked attention are not supported", where=where, hint=_HINT)
    return Anatomy(trunk_name=model.base_model_prefix, layers_name=lists[0], norm_name=norms[0], num_layers=num_layers)


def find_head(model: PreTrainedModel) -> nn.Module:
    """The output head (None where a model has none, which `find_anatomy` refuses)."""
    return model.get_output_embeddings()  # type: ignore[no-any-return,no-untyped-call]


_HINT = "Cloister cuts decoder-only models built like Llama, Qwen, Mistral, Gemma 2, Phi-3, GPT-2, GPT-NeoX or GLM"


def load_model(path: Path, dtype: str, device: str = "cpu") -> PreTrainedModel:
    """Load a model folder in evaluation mode with gradients off. Only safetensors weights and built-in code are used.

    Raises:
        ModelError: the folder cannot be read as a causal language model.
    """
    attention.install()
    if not list(path.glob("*.safetensors")):
        raise ModelError(
            "the model folder has no *.safetensors weights",
            where=str(path),
            hint="convert it with save_pretrained(..., safe_serialization=True); pickled weights are never loaded",
        )
    model = _read(AutoModelForCausalLM, path, dtype=DTYPES[dtype], use_safetensors=True)
    if not isinstance(model, PreTrainedModel):
        raise ModelError("is not a causal language model", where=str(path), hint=_HINT)
    model.requires_grad_(False)
    return model.to(device).eval()  # type: ignore[arg-type,no-any-return]  # the stub of .to() knows no device names


def pick_device(wanted: str) -> str:
    """ "auto" becomes CUDA, MPS or CPU, whichever is there first.

    Raises:
        ModelError: a device that was asked for is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(name for name, found in there.items() if found)
    if not there[wanted]:
        raise ModelError(f"this machine has no {wanted} device", where="[enclave] device", hint='use "auto"')
    return wanted


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder; it must be a fast one, since loss masks need character offsets.

    Raises:
        ModelError: there is none, or it has no tokenizer.json.
    """
    tokenizer = _read(AutoTokenizer, path)
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.is_fast:
        raise ModelError("the tokenizer has no tokenizer.json", where=str(path), hint="save it as a fast tokenizer")
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer names no end-of-text token", where=str(path), hint="set eos_token")
    return tokenizer


def _read(auto: type, path: Path, **kwargs: object) -> object:
    if not (path / "config.json").is_file():
        raise ModelError("there is no config.json in the model folder", where=str(path), hint="check [model] path")
    try:
        return auto.from_pretrained(path, local_files_only=True, trust_remote_code=False, **kwargs)  # type: ignore[attr-defined]
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        raise ModelError(f"cannot be loaded: {exc}".splitlines()[0], where=str(path), hint=_HINT) from exc
