"""Packs as bytes, as they lie in a sealed bundle, and back again without trust in who wrote them.

Legend: T = tokens, D = model dimension, B = blocks of a row, N = targets, G = groups.

One pack is one safetensors blob. Activations travel as fp32, as bf16, or as int8 with one bf16 scale per block of 64
values (1.03 bytes per value): the largest magnitude of a block becomes 127. "bfloat16-deflate" is bf16 without loss in
about 1.33 bytes per value: of the 8 bits of an exponent 2.6 are information, so exponents are Huffman-coded (DEFLATE,
RFC 1951, without matches); sign and mantissa, which are as good as random, are the other byte as it is.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from cloister.data.packing import LAYOUT, TENSORS, Pack
from cloister.errors import ModelError, ProtocolError
from cloister.model.attention import Layout

BLOCK = 64
_INTEGERS = (*LAYOUT, *TENSORS[1:])
_WIRE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bfloat16-deflate": torch.bfloat16}
_BESIDE = {"int8": "scale", "bfloat16-deflate": "exponent"}
"""What travels beside the activations."""
_RAW_DEFLATE = -15


@dataclass(frozen=True, kw_only=True)
class Schema:
    """What a receiver may expect of every pack of a job."""

    activation_dtype: str
    hidden: int
    vocabulary: int
    max_tokens: int


def encode_pack(pack: Pack, dtype: str) -> bytes:
    """Bytes of a pack whose `given` are activations (T, D).

    Raises:
        ModelError: an activation is not finite.
    """
    activation = pack.given.float() if dtype == "int8" else pack.given.to(_WIRE[dtype])
    # Checked as they travel: the largest fp32 numbers are infinite in bf16.
    if not _is_finite(activation):
        raise ModelError(
            "the former layers gave activations that are not finite",
            where="activations at the cut",
            hint="bfloat16 models may need dtype = 'float32'; check the model's weights",
        )
    tensors = {n: getattr(pack.layout if n in LAYOUT else pack, n).to(torch.int32) for n in _INTEGERS}
    if dtype == "int8":
        tensors["activation"], tensors["scale"] = _quantise(activation)
    elif dtype == "bfloat16-deflate":
        tensors["activation"], tensors["exponent"] = _deflate(activation)
    else:
        tensors["activation"] = activation
    return bytes(safetensors.torch.save(tensors))


def decode_pack(blob: bytes, schema: Schema, dtype: torch.dtype, where: str) -> Pack:
    """The pack in `unverified blob`, its activations in `dtype`.

    Every shape, dtype, index and value is checked, so that whatever a party sends is a pack or an error.

    Raises:
        ProtocolError: anything else; `where` is repeated in it.
    """
    try:
        tensors = safetensors.torch.load(blob)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as exc:
        raise ProtocolError(f"a pack is not a safetensors blob: {exc}", where=where) from exc
    beside = _BESIDE.get(schema.activation_dtype)
    expected = {*_INTEGERS, "activation"} | ({beside} if beside else set())
    _require(set(tensors) == expected, f"a pack holds {sorted(tensors)}, not {sorted(expected)}", where)
    activation_TD = _activation(tensors, schema, where).to(dtype)
    _require(_is_finite(activation_TD), "activations are not finite", where)
    integers = {n: _integers(tensors[n], n, where) for n in _INTEGERS}
    count_T, count_N, count_G = len(activation_TD), len(integers["target_pos_N"]), len(integers["group_role_G"])
    for name, value in integers.items():
        count = {"T": count_T, "N": count_N, "G": count_G}[name[-1]]
        _require(len(value) == count, f"{name} has {len(value)} entries, not {count}", where)
    _require(1 <= count_T <= schema.max_tokens, f"a pack has {count_T} tokens, allowed are {schema.max_tokens}", where)
    _require(count_N >= 1 and count_G >= 1, "a pack has no targets", where)
    limits = {
        "document_T": (0, count_T), "branch_T": (0, count_T), "position_T": (0, schema.max_tokens),
        "target_pos_N": (0, count_T), "target_id_N": (0, schema.vocabulary), "target_group_N": (0, count_G),
        "group_example_G": (0, 2**31), "group_role_G": (-1, 2**16),
    }  # fmt: skip
    for name, (low, high) in limits.items():
        value = integers[name]
        _require(bool((value >= low).all() and (value < high).all()), f"{name} leaves [{low}, {high})", where)
    layout = Layout(**{n: integers.pop(n) for n in LAYOUT})
    return Pack(given=activation_TD, layout=layout, **integers)


def _activation(tensors: dict[str, Tensor], schema: Schema, where: str) -> Tensor:
    activation = tensors["activation"]
    of_bytes = {"int8": torch.int8, "bfloat16-deflate": torch.uint8}
    wanted = of_bytes.get(schema.activation_dtype) or _WIRE[schema.activation_dtype]
    _require(activation.dtype == wanted, f"activations are {activation.dtype}, not {wanted}", where)
    _require(
        activation.dim() == 2 and activation.shape[1] == schema.hidden,
        f"activations have the shape {tuple(activation.shape)}, not (T, {schema.hidden})",
        where,
    )
    if schema.activation_dtype == "int8":
        scale = tensors["scale"]
        blocks = -(-schema.hidden // BLOCK)
        _require(scale.dtype == torch.bfloat16 and scale.shape == (len(activation), blocks), "scales do not fit", where)
        activation = _dequantise(activation, scale)
    if schema.activation_dtype == "bfloat16-deflate":
        coded = tensors["exponent"]
        _require(coded.dtype == torch.uint8 and coded.dim() == 1, "exponents are not a row of bytes", where)
        activation = _inflate(activation, coded, where)
    return activation


def _integers(value: Tensor, name: str, where: str) -> Tensor:
    _require(value.dtype == torch.int32 and value.dim() == 1, f"{name} is not a row of int32", where)
    return value.long()


def _require(fact: bool, otherwise: str, where: str) -> None:
    if not fact:
        raise ProtocolError(otherwise, where=where, hint="the party must make its bundle anew with the job's settings")


def _is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. A NaN becomes both extremes; one pass is 8 times as fast as `isfinite`."""
    return values.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def max_bytes(dtype: str, tokens: int, hidden: int) -> int:
    """The most that activations (T, D) of a pack take as they travel."""
    values = tokens * hidden
    if dtype == "int8":
        return values + 2 * tokens * -(-hidden // BLOCK)
    if dtype == "bfloat16-deflate":
        return 2 * values + values // 1000 + 64  # DEFLATE stores what it cannot code, with 5 bytes for each block
    return values * _WIRE[dtype].itemsize


def _deflate(activation_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(sign and mantissa, uint8 (T, D); coded exponents, uint8 row) of bf16 values."""
    bits_TD = activation_TD.contiguous().view(torch.int16).numpy().view(np.uint16)
    rest_TD = ((bits_TD >> 8) & 0x80 | bits_TD & 0x7F).astype(np.uint8)
    coder = zlib.compressobj(1, zlib.DEFLATED, _RAW_DEFLATE, strategy=zlib.Z_HUFFMAN_ONLY)
    coded = coder.compress((bits_TD >> 7).astype(np.uint8).tobytes()) + coder.flush()
    return torch.from_numpy(rest_TD), torch.frombuffer(bytearray(coded), dtype=torch.uint8)


def _inflate(rest_TD: Tensor, coded: Tensor, where: str) -> Tensor:
    """bf16 (T, D) from what `_deflate` gives; no more than one exponent for each value is ever decoded."""
    coder = zlib.decompressobj(_RAW_DEFLATE)
    try:
        exponents = coder.decompress(coded.numpy().tobytes(), rest_TD.numel() + 1)
    except zlib.error as exc:
        raise ProtocolError(f"exponents cannot be decoded: {exc}", where=where) from exc
    exact = len(exponents) == rest_TD.numel() and coder.eof and not coder.unused_data
    _require(exact, "there is not one exponent for each value", where)
    rest = rest_TD.numpy().astype(np.uint16)
    bits_TD = (rest & 0x80) << 8 | np.frombuffer(exponents, np.uint8).reshape(rest.shape).astype(np.uint16) << 7
    return torch.from_numpy((bits_TD | rest & 0x7F).view(np.int16)).view(torch.bfloat16)


def _quantise(activation_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 (T, D), bf16 scales (T, B)); values are rounded to the nearest multiple of their block's scale."""
    blocks_TBK = _blocks(activation_TD)
    scale_TB = (blocks_TBK.abs().amax(-1) / 127).to(torch.bfloat16)
    # One bf16 step up: no block of zeros divides by zero, and the largest value is never clipped by a rounded scale.
    scale_TB = torch.nextafter(scale_TB, torch.tensor(torch.inf, dtype=torch.bfloat16))
    q_TBK = (blocks_TBK / scale_TB.float()[..., None]).round().clamp(-127, 127)
    return q_TBK.flatten(1)[:, : activation_TD.shape[1]].to(torch.int8), scale_TB


def _dequantise(q_TD: Tensor, scale_TB: Tensor) -> Tensor:
    return (_blocks(q_TD.float()) * scale_TB.float()[..., None]).flatten(1)[:, : q_TD.shape[1]]


def _blocks(value_TD: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(value_TD, (0, -value_TD.shape[1] % BLOCK))
    return padded.view(len(value_TD), -1, BLOCK)
