"""Cutting a model in two so that former followed by latter is, bit for bit, the whole model.

Legend: T = packed tokens, N = chosen tokens, D = model dimension, V = vocabulary.

Both halves run the *architecture's own* forward pass. In the former half the trunk keeps its first layers and an
identity in place of its final norm. In the latter half the removed layers are replaced by modules that pass their input
on, and the last of them hands in the activations from the cut instead: whatever a trunk does between embedding and
first layer (learned positions, scaling, dropout) happens in the former half only, and module names stay those of the
whole model, so that adapters trained on the latter half load into the whole one.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from cloister.errors import ModelError
from cloister.model.anatomy import find_anatomy, find_head
from cloister.model.attention import Layout, packed
from cloister.model.last_layer import LastLayer


class _Absent(nn.Module):
    """Stands where a module of the other half was."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden


class _Entry(nn.Module):
    """Stands where the last former layer was and hands in the activations from the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        self.entries += 1
        # Whatever the trunk did before its first layer (GPT-2 adds learned positions) is undone here: the trunk was
        # called with the activations as `inputs_embeds`, and they continue unchanged.
        return self.given

    given: Tensor


class _Given(nn.Module):
    """Stands in for a trunk whose output is known, so that a model's own head code can run on it."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)


class Former:
    """Embedding and the first `cut` layers, frozen: what a party runs. Consumes `model`."""

    def __init__(self, model: PreTrainedModel, cut: int) -> None:
        anatomy = find_anatomy(model)
        self.trunk = anatomy.trunk(model)
        setattr(self.trunk, anatomy.layers_name, anatomy.layers(model)[:cut])
        setattr(self.trunk, anatomy.norm_name, nn.Identity())
        self.config = _config_part(model, range(cut))
        self.device = model.device

    @torch.no_grad()
    def __call__(
        self, ids_T: Tensor, position_T: Tensor, layout: Layout | None, cache: DynamicCache | None = None
    ) -> Tensor:
        """Activations at the cut, (T, D) in the model's dtype, of token ids (T)."""
        with packed(layout):
            out = self.trunk(
                input_ids=ids_T[None], position_ids=position_T[None], past_key_values=cache, use_cache=cache is not None
            )
        return out.last_hidden_state[0]  # type: ignore[no-any-return]

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.config)


class Whole:
    """The whole model behind the interface of `Latter`: its input is token ids. Used for baselines and oracles.

    Args:
        all_tokens: whether the last layer is computed for all tokens, even if the hidden states of some are wanted.
    """

    def __init__(self, model: PreTrainedModel, *, all_tokens: bool = False) -> None:
        self.model = model
        self.anatomy = find_anatomy(model)
        if not all_tokens:
            LastLayer.install(self.anatomy.layers(model)[-1])
        self.config = model.config
        self.device = model.device

    def hidden(
        self, ids_T: Tensor, position_T: Tensor, layout: Layout | None, cache: DynamicCache | None = None
    ) -> Tensor:
        """Hidden states after the final norm of token ids (T): (T, D), or (N, D) of the layout's queries."""
        with packed(layout):
            out = self.anatomy.trunk(self.model)(
                input_ids=ids_T[None], position_ids=position_T[None], past_key_values=cache, use_cache=cache is not None
            )
        return _wanted(out.last_hidden_state[0], layout)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits (N, V) by the model's own head code, soft caps and scaling included."""
        view = copy.copy(self.model)
        # A shallow copy shares all parameters; only the trunk is swapped for one that returns what it is given.
        view._modules = {**self.model._modules, self.anatomy.trunk_name: _Given()}
        return view(inputs_embeds=hidden_ND[None]).logits[0]  # type: ignore[no-any-return]

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.config)


class Latter(Whole):
    """Layers from `cut` on, final norm and head: what the enclave trains. Its input is activations.

    Consumes `model`. Not for concurrent calls.
    """

    def __init__(self, model: PreTrainedModel, cut: int) -> None:
        super().__init__(model)
        layers = self.anatomy.layers(model)
        for index in range(cut - 1):
            layers[index] = _Absent()
        self._entry = layers[cut - 1] = _Entry()
        for layer in layers[cut:]:
            for module in layer.modules():
                own = getattr(module, "layer_idx", None)
                if isinstance(own, int):  # caches of the latter half count from its own first layer
                    module.layer_idx = own - cut  # type: ignore[assignment]  # a plain attribute, not a submodule
        if find_head(model).weight is not model.get_input_embeddings().weight:
            model.set_input_embeddings(_Absent())
        self.config = _config_part(model, range(cut, self.anatomy.num_layers))

    def hidden(
        self, activation_TD: Tensor, position_T: Tensor, layout: Layout | None, cache: DynamicCache | None = None
    ) -> Tensor:
        """As `Whole.hidden`, of activations at the cut (T, D)."""
        self._entry.given = activation_TD[None]
        before = self._entry.entries
        try:
            with packed(layout):
                out = self.anatomy.trunk(self.model)(
                    inputs_embeds=activation_TD[None],
                    position_ids=position_T[None],
                    past_key_values=cache,
                    use_cache=cache is not None,
                )
        finally:
            del self._entry.given
        if self._entry.entries != before + 1:
            raise ModelError(
                "the trunk did not call each layer once in order, so it cannot be cut", where=type(self.model).__name__
            )
        return _wanted(out.last_hidden_state[0], layout)


def _wanted(hidden_TD: Tensor, layout: Layout | None) -> Tensor:
    return hidden_TD if layout is None or layout.query_N is None else hidden_TD[layout.query_N]


def _config_part(model: PreTrainedModel, layers: range) -> Any:
    """The model's configuration as a cache sees it that holds only `layers`."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in layers]
    return config
