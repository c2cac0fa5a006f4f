"""The arithmetic of `cloister plan`: operations, bytes and memory, from sizes alone. Pure functions.

Legend: a *pass* is one forward pass of one token. One multiply-add counts as two operations.

    pass through layers    2 x their parameters + 4 x max_tokens x hidden per layer (scores and values of attention;
                           the packed mask is dense, so each token meets a whole pack)
    head                   2 x hidden x vocabulary per target (only targets reach it)
    training step          2 x pass: the frozen weights need no weight gradients, so backward costs what forward does;
                           plus 4 x trainable parameters per token for the adapter's own weight gradients and forward
    time                   operations / (measured rate of a matrix product of the model's shape x EFFICIENCY)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Shapes = Mapping[str, Sequence[int]]
"""Tensor name to shape, as in a model's safetensors files."""

BYTES = {"float32": 4.0, "bfloat16": 2.0, "bfloat16-deflate": 1.34, "int8": 1.0 + 2 / 64}
"""Per value. int8 carries one bfloat16 scale for 64 values; coded exponents are as long as those of normal noise."""

EFFICIENCY = 0.4
"""Share of a bare matrix product's rate that a whole layer reaches (norms, attention, small shapes, Python)."""

PROCESS_BYTES = 440 << 20
"""Resident memory of a process that has loaded torch, transformers and PEFT and nothing else."""
ENCLAVE_BYTES = 660 << 20
"""The same of an enclave that has trained: what autograd, the optimiser and gRPC bring with them."""
BACKWARD = 1.8
"""Most memory of a step over what its forward pass keeps: gradients of activations come to it as those are used up."""
PREPARING_S = 0.9
"""Processor time of a role before its first pass, besides reading weights: records, sessions, manifest."""
WEIGHTS_PER_S = 1e9
"""Bytes of weights that a process maps and touches in a second."""

_PACK_HEADER_BYTES = 900
"""Header of a pack's safetensors blob plus its three entries in the payload's index."""
_PACK_INTEGERS_PER_TOKEN = 12
"""Document, branch and position, each an int32."""
_PACK_INTEGERS_PER_TARGET = 12
"""Position, id and group of a target."""
_GROUP_BYTES = 8
_EXAMPLE_BYTES = 140
"""A test example's entry in the table of examples."""
_CHUNK_BYTES = 20
"""Length field and tag of a sealed chunk."""
_FRAME_SHARE = 0.001
"""gRPC frames and control messages, as a share of what they carry."""
_RESULT_BYTES_PER_EXAMPLE = 400
"""A test example's scores by one system as a line of JSON, as the party gets them back, encrypted."""
_SESSION_BYTES_UP, _SESSION_BYTES_DOWN = 16_000, 24_000
"""Evidence, manifest, checkpoints' signatures, progress, receipt: what five parties' small jobs measured; it matters
in small ones only."""

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
"""The first number in a tensor's name is its layer's: experts and other lists lie inside layers."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What the arithmetic needs of a model, cut after `cut` of its `layers`. Parameters are counts."""

    layers: int
    cut: int
    hidden: int
    vocabulary: int
    former: int
    """Parameters of the former layers, without the embedding (a look-up costs no operations)."""
    latter: int
    """Parameters of the latter layers, without the head."""
    total: int
    adapter: int
    """Trainable parameters in the latter layers."""
    whole_adapter: int
    """The same on all layers, as the baselines train it."""
    widest: int
    """Output width of the widest projection, which bounds the activations that a layer keeps for backward."""
    mapped: bool = True
    """Whether the weight files have the job's dtype: they are mapped then, and what is not used stays on disk."""

    @property
    def end(self) -> int:
        """Parameters outside the layers that one half uses: the embedding, or the head; both where they are one."""
        outer, table = self.total - self.former - self.latter, self.vocabulary * self.hidden
        return outer - table if outer >= 2 * table else outer


@dataclass(frozen=True, kw_only=True)
class PartCount:
    """One kind of a party's data after packing."""

    records: int = 0
    tokens: int = 0
    targets: int = 0
    packs: int = 0
    groups: int = 0


def measure_model(
    shapes: Shapes,
    *,
    layers: int,
    cut: int,
    hidden: int,
    vocabulary: int,
    adapter: int,
    whole_adapter: int,
    mapped: bool = True,
) -> ModelSize:
    """Sort a model's tensors into its two halves.

    Args:
        adapter: parameters that are trained in the latter layers; `whole_adapter`: in all layers.
        mapped: see `ModelSize`.
    """
    by_layer = {name: _layer(name) for name in shapes}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    return ModelSize(
        layers=layers,
        cut=cut,
        hidden=hidden,
        vocabulary=vocabulary,
        former=sum(sizes[n] for n, layer in by_layer.items() if layer is not None and layer < cut),
        latter=sum(sizes[n] for n, layer in by_layer.items() if layer is not None and layer >= cut),
        total=sum(sizes.values()),
        adapter=adapter,
        whole_adapter=whole_adapter,
        widest=max((max(shape) for shape in matrices(shapes).values()), default=hidden),
        mapped=mapped,
    )


def matrices(shapes: Shapes, first_layer: int = 0) -> dict[str, tuple[int, ...]]:
    """Shapes of the linear weights in the layers from `first_layer` on, by module."""
    return {
        name.removesuffix(".weight"): tuple(shape)
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and _is_behind(name, first_layer)
    }


def former_operations(model: ModelSize, tokens: int, max_tokens: int) -> float:
    """A party's passes through the former layers."""
    return tokens * _pass(model.former, model.cut, model.hidden, max_tokens)


def scoring_operations(model: ModelSize, part: PartCount, max_tokens: int, *, whole: bool) -> float:
    """Forward passes of one part through the latter half or the whole model, head included."""
    return part.tokens * _half_pass(model, max_tokens, whole) + _head(model, part.targets)


def training_operations(model: ModelSize, part: PartCount, passes: float, max_tokens: int, *, whole: bool) -> float:
    """`passes` times over one part, forward and backward, of the latter half or of the whole model."""
    adapter = model.whole_adapter if whole else model.adapter
    per_token = 2 * _half_pass(model, max_tokens, whole) + 4 * adapter
    return passes * (part.tokens * per_token + 2 * _head(model, part.targets))


def bundle_bytes(part: PartCount, hidden: int, activation_dtype: str, chunk_bytes: int, *, scored: bool) -> int:
    """Size of a sealed bundle of one part. `scored` parts carry a table of examples."""
    if part.packs == 0:
        return 0
    payload = (
        part.tokens * (hidden * BYTES[activation_dtype] + _PACK_INTEGERS_PER_TOKEN)
        + part.targets * _PACK_INTEGERS_PER_TARGET
        + part.groups * _GROUP_BYTES
        + part.packs * _PACK_HEADER_BYTES
        + (part.records * _EXAMPLE_BYTES if scored else 0)
    )
    return int(payload + math.ceil(payload / chunk_bytes) * _CHUNK_BYTES)


def bytes_up(bundles: int) -> int:
    """What a party sends: its bundles, framed, and its share of the session."""
    return int(bundles * (1 + _FRAME_SHARE)) + _SESSION_BYTES_UP


def bytes_down(test_examples: int, systems: int, adapter_bytes: int) -> int:
    """What a party gets back: scores of its own examples by each system, the session, and a released adapter."""
    return test_examples * systems * _RESULT_BYTES_PER_EXAMPLE + adapter_bytes + _SESSION_BYTES_DOWN


def party_memory(
    model: ModelSize, parts: Sequence[PartCount], parameter_bytes: float, max_tokens: int, copied_bytes: float
) -> int:
    """Peak resident memory of a party: embedding and former layers, all packed tokens, one pack in work.

    Args:
        copied_bytes: of weights that are repacked.
    """
    held = model.end + model.former if model.mapped else model.total
    integers = sum(8 * (4 * p.tokens + 3 * p.targets + 2 * p.groups) for p in parts)
    working = max_tokens * (6 * model.hidden + 2 * model.widest) * parameter_bytes
    return int(PROCESS_BYTES + held * parameter_bytes + copied_bytes + integers + working)


def enclave_memory(
    model: ModelSize, parameter_bytes: float, kept_bytes: float, copied_bytes: float, cache_bytes: int
) -> int:
    """Peak resident memory of the enclave.

    Args:
        kept_bytes: what a pack's forward pass keeps for the backward pass.
        copied_bytes: of weights that are repacked, for both directions, and the largest of them while it is copied.
        cache_bytes: decrypted activations that it keeps between epochs, at most `[enclave] cache_mib`.
    """
    held = model.end + model.latter if model.mapped else model.total
    optimiser = 16 * model.adapter  # weight, gradient and AdamW's two moments, fp32 each
    step = BACKWARD * kept_bytes + optimiser
    return int(ENCLAVE_BYTES + held * parameter_bytes + copied_bytes + step + cache_bytes)


def preparing_seconds(model: ModelSize, parameter_bytes: float, roles: int, cpus: int) -> float:
    """From starting on the job to the first pass, of all roles on one machine."""
    return roles * (PREPARING_S + model.total * parameter_bytes / WEIGHTS_PER_S) / min(cpus, roles)


def seconds(operations: float, operations_per_s: float) -> float:
    """Time for some work at a measured rate of bare matrix products."""
    return operations / (operations_per_s * EFFICIENCY)


def pooled(parts: Sequence[PartCount]) -> PartCount:
    """Several parts as one."""
    return PartCount(
        records=sum(p.records for p in parts),
        tokens=sum(p.tokens for p in parts),
        targets=sum(p.targets for p in parts),
        packs=sum(p.packs for p in parts),
        groups=sum(p.groups for p in parts),
    )


def _pass(parameters: int, layers: int, hidden: int, max_tokens: int) -> float:
    return 2.0 * parameters + 4.0 * layers * max_tokens * hidden


def _half_pass(model: ModelSize, max_tokens: int, whole: bool) -> float:
    latter = _pass(model.latter, model.layers - model.cut, model.hidden, max_tokens)
    return latter + (_pass(model.former, model.cut, model.hidden, max_tokens) if whole else 0.0)


def _head(model: ModelSize, targets: int) -> float:
    return 2.0 * model.hidden * model.vocabulary * targets


def _layer(name: str) -> int | None:
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


def _is_behind(name: str, first_layer: int) -> bool:
    layer = _layer(name)
    return layer is not None and layer >= first_layer


def silo_memory(model: ModelSize, trainable: int, max_tokens: int, *, packs: int) -> int:
    """Peak resident memory of a party's enclave in method `slice`: it never holds the frozen matrices of layers.

    Args:
        packs: in flight at once, each with the activations that its backward pass needs.
    """
    embedding = 2 * model.vocabulary * model.hidden  # bfloat16
    kept = 4 * packs * model.layers * max_tokens * (8 * model.hidden + 4 * model.widest)
    masked = 3 * 4 * packs * max_tokens * (model.hidden + model.widest)  # what is sent, its pad, what comes back
    head = 3 * packs * max_tokens * model.vocabulary * 4  # products, logits, their gradient: one pack at most
    return int(PROCESS_BYTES + embedding + kept + masked + head + 16 * trainable)


def accelerator_memory(groups: Sequence[tuple[int, int]], parts: int, max_tokens: int, *, silos: int) -> int:
    """Peak resident memory of an accelerator in method `slice`.

    Args:
        groups: (inputs, outputs) of each group of layers that share an input, the head included.
        parts: int8 matrices that each weight is in. silos: parties that it serves at a time.
    """
    weights = parts * sum(inputs * outputs for inputs, outputs in groups)
    widest = max(inputs + parts * outputs for inputs, outputs in groups)
    # Requests and replies as int32, and the request as four int8 limbs beside it.
    return int(PROCESS_BYTES + weights + 2 * silos * 8 * max_tokens * widest)


def update_bytes(trainable: int, *, moments: bool) -> int:
    """A party's update, or a round's state: the adapter as float32, and AdamW's two moments of each parameter."""
    return trainable * 4 * (3 if moments else 1)


def server_memory(state_bytes: int, parties: int) -> int:
    """Peak resident memory of the server's enclave in method `slice`: no model, but updates of all parties, a state
    before and after, the best one, and the mean in float64."""
    return int(PROCESS_BYTES + state_bytes * (parties + 3 + 2))


def between_layers(model: ModelSize, max_tokens: int) -> float:
    """Operations for one token in one pass of what a party's enclave keeps: attention and adapters of all layers."""
    return 4.0 * model.layers * max_tokens * model.hidden + 4.0 * model.whole_adapter
