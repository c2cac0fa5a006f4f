"""The PEFT tuner that gives attention modules prefixes.

PEFT's prefix tuning puts them into a cache, so that it covers all layers and one document per row only. Here each
attention module gets its own prefix (`prefix.py`), with these rules:

- Every token of every packed document and branch sees the whole prefix, in layers with a sliding window too.
- Keys of a prefix have no rotary position. Tokens stand at positions from `position_offset` on: from P on where all
  layers have a prefix, as in PEFT, and from 0 on where former layers have none, since those have run without.
- A prefix is not a no-op at any value, so a disabled adapter has neither columns nor offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedConfig

from cloister.adapters.base_digest import base_digest, is_plain
from cloister.adapters.ptuning.prefix import PrefixedCache, PrefixEncoder, cache_argument, find_attention
from cloister.adapters.registry import TunerType
from cloister.adapters.settings import as_list, is_count, not_layers, refuse
from cloister.errors import AdapterError
from cloister.model.anatomy import find_anatomy
from cloister.model.attention import causal_behind, seeing_prefix

_INITIAL_STD = 0.02


@dataclass
class PTuningConfig(PeftConfig):
    """Which layers get a prefix of how many tokens.

    Raises:
        AdapterError: a value is of another type or outside its range.
    """

    num_virtual_tokens: int = 16
    encoder_hidden_size: int | None = None
    """Hidden size of the perceptron that computes the prefixes; None trains keys and values themselves."""
    layers_to_transform: list[int] | None = None
    """None: all layers."""
    position_offset: int | None = None
    """Position of the first token; None: `num_virtual_tokens` if all layers have a prefix, else 0."""
    target_modules: list[str] | None = None
    """Name of the attention module in a layer. This and the next are filled in by the tuner."""
    layers_pattern: str | None = None
    base_sha256: str | None = None
    """Of the attention weights of the first and the last layer with a prefix, hex. Filled in by the tuner where it sees
    these weights; a base with others is then refused."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = TunerType.PTUNING
        self.layers_to_transform = as_list(self.layers_to_transform)  # type: ignore[assignment]  # checked below
        tokens, hidden = self.num_virtual_tokens, self.encoder_hidden_size
        faults = {
            "num_virtual_tokens": not is_count(tokens) and f"must be at least 1, got {tokens!r}",
            "encoder_hidden_size": hidden is not None
            and not is_count(hidden)
            and f"must be at least 1, got {hidden!r}",
            "layers_to_transform": not_layers(self.layers_to_transform),
            "position_offset": self.position_offset is not None
            and not is_count(self.position_offset, 0)
            and f"must be a whole number of at least 0, got {self.position_offset!r}",
        }
        refuse("PTuningConfig", faults)


class PrefixedAttention(nn.Module, BaseTunerLayer):
    """An attention module with a prefix. Takes and returns what the module does."""

    adapter_layer_names = ("ptuning_prefix",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.ptuning_prefix = nn.ParameterDict()
        # Encoders belong to the tuner, since layers share them; here is which one and which part of its output.
        self.encoders: dict[str, tuple[PrefixEncoder, int]] = {}
        self._cache = cache_argument(base_layer) or "past_key_values"
        self.merged_adapters: list[str] = []

    @property
    def device(self) -> torch.device:
        """The base layer's."""
        return next(self.base_layer.parameters()).device

    def prefix(self, adapter: str) -> Tensor | None:
        """(2, G, P, d) in fp32, None if this layer has none of that name."""
        if adapter in self.encoders:
            encoder, slot = self.encoders[adapter]
            return encoder(slot)  # type: ignore[no-any-return]
        own: Tensor | None = self.ptuning_prefix.get(adapter)
        return own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        prefix = None if self.disable_adapters else next((self.prefix(name) for name in self.active_adapters), None)
        if prefix is None:
            return self.base_layer(*args, **kwargs)
        count_P = prefix.shape[2]
        kwargs[self._cache] = PrefixedCache(prefix, kwargs.get(self._cache))
        hidden_BTD = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        kwargs["attention_mask"] = _widened(kwargs.get("attention_mask"), count_P, hidden_BTD)
        return self.base_layer(*args, **kwargs, prefix_tokens=count_P)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT asks the base layer's weight, and an attention module has none of its own.
        super()._move_adapter_to_device_of_base_layer(adapter_name, device or self.device)
        if adapter_name in self.encoders:
            self.encoders[adapter_name][0].to(device or self.device)


def _widened(mask: Tensor | None, prefix_tokens: int, hidden_BTD: Tensor) -> Tensor | None:
    if mask is not None:
        return seeing_prefix(mask, prefix_tokens)
    tokens = hidden_BTD.shape[1]
    # No mask stands for causal order, or for one token that sees everything.
    return None if tokens == 1 else causal_behind(tokens, prefix_tokens, hidden_BTD.device)


class PTuningModel(BaseTuner):
    """A model with prefixes. One adapter is active at a time."""

    prefix = "ptuning_"
    tuner_layer_cls = PrefixedAttention
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # declared so by PEFT, and not used
    uses_shared_state = True
    _enabled = True

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.ptuning_encoder = nn.ModuleDict()

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        trunk = find_anatomy(self.model).trunk(self.model)
        self._shifting = trunk.register_forward_pre_hook(self._shift, with_kwargs=True)

    def _prepare_adapter_config(  # type: ignore[override]  # PEFT's is wider, as in its own tuners
        self, peft_config: PTuningConfig, model_config: dict[str, Any]
    ) -> PTuningConfig:
        anatomy = find_anatomy(self.model)
        layers = anatomy.layers(self.model)
        chosen = peft_config.layers_to_transform
        peft_config.layers_to_transform = sorted(range(len(layers)) if chosen is None else chosen)
        peft_config.layers_pattern = anatomy.layers_name
        peft_config.target_modules = sorted({find_attention(layers, i) for i in peft_config.layers_to_transform})
        _check_base(peft_config, [layers[i] for i in peft_config.layers_to_transform])
        if peft_config.position_offset is None:
            everywhere = len(peft_config.layers_to_transform) == len(layers)
            peft_config.position_offset = peft_config.num_virtual_tokens if everywhere else 0
        return peft_config

    def _create_and_replace(  # type: ignore[override]  # as above
        self,
        peft_config: PTuningConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if "." in adapter_name:  # torch would say it less clearly
            raise AdapterError(f"an adapter's name has no dot, got {adapter_name!r}", hint="choose another name")
        layer = target if isinstance(target, PrefixedAttention) else PrefixedAttention(target)
        if peft_config.encoder_hidden_size is None:
            heads, width = head_shape(self.model.config)
            initial = torch.empty(2, heads, peft_config.num_virtual_tokens, width, device=layer.device)
            layer.ptuning_prefix[adapter_name] = nn.Parameter(initial.normal_(std=_INITIAL_STD))
        else:
            slot = (peft_config.layers_to_transform or []).index(int(current_key.split(".")[-2]))
            layer.encoders[adapter_name] = (self._encoder(peft_config, adapter_name, layer.device), slot)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # an attention module has no weight of its own to be moved

    def _encoder(self, config: PTuningConfig, adapter_name: str, device: torch.device) -> PrefixEncoder:
        """The encoder that all layers of an adapter share, made when the first one asks for it."""
        heads, width = head_shape(self.model.config)
        hidden, layers = config.encoder_hidden_size or 0, len(config.layers_to_transform or [])
        if adapter_name not in self.ptuning_encoder:
            made = PrefixEncoder(config.num_virtual_tokens, heads, width, hidden, layers)
            # On "meta" it waits for a file's tensors.
            self.ptuning_encoder[adapter_name] = made if made.embedding.weight.is_meta else made.to(device)
        encoder = self.ptuning_encoder[adapter_name]
        if not isinstance(encoder, PrefixEncoder):
            raise TypeError("not a prefix encoder")
        return encoder

    def _shift(self, trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Moves the trunk's positions behind the prefix."""
        config = self.peft_config[self.active_adapters[0]] if self.active_adapters else None
        if not self._enabled or not isinstance(config, PTuningConfig) or not config.position_offset:
            return None
        position_BT = kwargs.get("position_ids")
        if position_BT is None:
            cache = kwargs.get("past_key_values")
            seen = cache.get_seq_length() if cache is not None else 0
            given = next(x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None)
            position_BT = torch.arange(seen, seen + given.shape[1], device=given.device)[None]
        return args, {**kwargs, "position_ids": position_BT + config.position_offset}

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._enabled = enabled

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if len(names) > 1:
            raise AdapterError(f"one prefix is active at a time, not {len(names)}")
        super().set_adapter(adapter_name, inference_mode)
        for name, encoder in self.ptuning_encoder.items():
            encoder.requires_grad_(name in names and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if adapter_name in self.ptuning_encoder:
            del self.ptuning_encoder[adapter_name]
        for module in self.model.modules():
            if isinstance(module, PrefixedAttention):
                module.encoders.pop(adapter_name, None)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.ptuning_encoder:
                self.ptuning_encoder[name].requires_grad_(requires_grad)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Name in a file; PEFT derives the way back from it, and looks for the adapter's name near the end only."""
        before, found, after = key.partition(f"ptuning_encoder.{adapter_name}.")
        if found:
            return f"{before}ptuning_encoder.{after}"
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Refuse a file that does not hold just what this adapter has, before anything is taken."""
        own = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        saved = {name: tensor.shape for name, tensor in state_dict.items() if cls.prefix in name}
        differing = saved.items() ^ {name: tensor.shape for name, tensor in own.items()}.items()
        if differing:
            raise AdapterError(
                "the saved prefixes do not fit the adapter's configuration",
                where=min(name for name, _ in differing),
                hint="its files were altered, or its configuration is another adapter's",
            )
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def _check_merge_allowed(self) -> None:
        raise AdapterError(
            "a prefix cannot be merged: it is keys and values in front of a layer's own, not a change of weights",
            hint="load the adapter beside the base model",
        )

    def unload(self) -> nn.Module:
        self._shifting.remove()
        return super().unload()


def _check_base(config: PTuningConfig, layers: Sequence[nn.Module]) -> None:
    """Note the base in a new configuration; refuse another one than a loaded configuration names."""
    names = config.target_modules or []
    attention = [module for layer in (layers[0], layers[-1]) for name, module in layer.named_modules() if name in names]
    weights = [p for module in attention for n, p in module.named_parameters() if p.dim() == 2 and "ptuning_" not in n]
    if not weights or not all(is_plain(p) for p in weights):
        return  # behind masks or quantised: they cannot be told
    found = base_digest(weights).hex()
    if config.base_sha256 not in (None, found):
        raise AdapterError(
            "the adapter was trained on another base model: its attention has other weights",
            hint="load it beside the base model, unchanged, that it was trained on, as bfloat16 or float32",
        )
    config.base_sha256 = found


def head_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """Number and width of the key-value heads."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, width
