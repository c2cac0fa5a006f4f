"""A pack survives the wire as far as its type allows, and whatever else comes is a ProtocolError."""

from __future__ import annotations

import functools
import tracemalloc
import zlib
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cloister.data.activations import BLOCK, Schema, decode_pack, encode_pack, max_bytes
from cloister.errors import ModelError, ProtocolError
from tests.unit.data.tiny_packs import equal_packs, random_pack

DTYPES = ["float32", "bfloat16", "bfloat16-deflate", "int8"]


def _schema(dtype: str, hidden: int = 80) -> Schema:
    return Schema(activation_dtype=dtype, hidden=hidden, vocabulary=97, max_tokens=40)


@functools.cache
def _blob(dtype: str, hidden: int = 80) -> bytes:
    return encode_pack(random_pack([7, 12, 3], 97, hidden=hidden), dtype)


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("bfloat16-deflate", torch.bfloat16)],
)
def test_floats_come_back_exactly(dtype: str, computed: torch.dtype) -> None:
    pack = random_pack([7, 12, 3], 97, hidden=80)
    pack = pack.with_activations(pack.given.to(computed))
    assert equal_packs(decode_pack(encode_pack(pack, dtype), _schema(dtype), computed, "a"), pack)


def test_fp32_activations_as_bf16_are_rounded_to_nearest() -> None:
    pack = random_pack([7], 97, hidden=80)
    decoded = decode_pack(encode_pack(pack, "bfloat16"), _schema("bfloat16"), torch.float32, "a")
    assert torch.equal(decoded.given, pack.given.bfloat16().float())


@pytest.mark.parametrize("hidden", [1, 64, 80])
def test_coded_bf16_has_every_bit_of_bf16(hidden: int) -> None:
    """Every finite bit pattern: zeros of both signs, subnormals, the largest."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    values = bits[torch.isfinite(bits)][torch.randperm(2**16 - 2**9, generator=torch.Generator().manual_seed(0))]
    for start in range(0, len(values) - 7 * hidden, 7 * hidden):
        given = values[start : start + 7 * hidden].view(7, hidden)
        pack = random_pack([7], 97, hidden=hidden).with_activations(given)
        blob = encode_pack(pack, "bfloat16-deflate")
        found = decode_pack(blob, _schema("bfloat16-deflate", hidden), torch.bfloat16, "a").given
        assert torch.equal(found.view(torch.int16), given.view(torch.int16))


def test_coded_bf16_takes_two_thirds_of_bf16() -> None:
    sizes = {dtype: len(_blob(dtype, 2048)) for dtype in ("bfloat16", "bfloat16-deflate")}
    assert sizes["bfloat16-deflate"] <= 0.70 * sizes["bfloat16"]


@settings(deadline=None)
@given(st.data())
def test_a_pack_takes_no_more_than_its_bound(data: st.DataObject) -> None:
    """What codes worst: every exponent equally often."""
    dtype, hidden = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(1, 300))
    bits = torch.randint(0, 0x7F7F, (9, hidden), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    pack = random_pack([9], 97, hidden=hidden).with_activations(bits.to(torch.int16).view(torch.bfloat16))
    tensors = safetensors.torch.load(encode_pack(pack, dtype))
    travelling = [tensors[n] for n in ("activation", "scale", "exponent") if n in tensors]
    assert sum(t.numel() * t.element_size() for t in travelling) <= max_bytes(dtype, 9, hidden)


def _coded(content: bytes) -> bytes:
    return _with("bfloat16-deflate", exponent=torch.frombuffer(bytearray(content), dtype=torch.uint8))


def _raw_deflate(content: bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return coder.compress(content) + coder.flush()


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 9,
        b"\0",
        _raw_deflate(b"\x7f" * (22 * 80 - 1)),
        _raw_deflate(b"\x7f" * (22 * 80 + 1)),
        _raw_deflate(b"\x7f" * (22 * 80)) + b"more",
        _raw_deflate(b"\x7f" * (22 * 80))[:-1],
        _raw_deflate(b"\x7f" * 50_000_000),
    ],
    ids=["garbage", "empty", "too few", "too many", "trailing bytes", "cut off", "bomb"],
)
def test_exponents_are_exactly_as_many_as_values(content: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="exponent"):
            decode_pack(_coded(content), _schema("bfloat16-deflate"), torch.float32, "a")
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_coded_infinities_are_refused() -> None:
    content = _raw_deflate(b"\xff" * (22 * 80))
    with pytest.raises(ProtocolError, match="not finite"):
        decode_pack(_coded(content), _schema("bfloat16-deflate"), torch.float32, "a")


@pytest.mark.parametrize("hidden", [1, 64, 80, 256])
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30, 0.0])
def test_int8_errs_by_half_a_scale_at_most(size: float, hidden: int) -> None:
    """The scale is the block's largest magnitude / 127, rounded to bf16 (8 bits) and one step up, so it exceeds that by
    1.5 steps of 2^-7 at most. Rounding to a multiple of it errs by half of it, and fp32 arithmetic adds 2^-22.
    """
    pack = random_pack([20], 97, hidden=hidden)
    value = pack.given * size
    value[3, : hidden // 2] *= 1e3  # an outlier coarsens its own block only
    decoded = decode_pack(
        encode_pack(pack.with_activations(value), "int8"), _schema("int8", hidden), torch.float32, "a"
    )
    assert equal_packs(decoded, pack, but=("given",))
    blocks = list(zip(value.split(BLOCK, 1), decoded.given.split(BLOCK, 1), strict=True))
    for true, got in blocks:
        largest = true.abs().amax(1, keepdim=True)
        bound = largest / 127 * (1 + 1.5 / 128) / 2 + largest * 2**-22 + 1e-38
        assert bool(((true - got).abs() <= bound).all())
    assert len(blocks) == -(-hidden // BLOCK)


@pytest.mark.parametrize("hidden", [256, 320, 1000, 2048])
def test_int8_takes_half_of_bf16(hidden: int) -> None:
    sizes = {}
    for dtype in ("int8", "bfloat16"):
        tensors = safetensors.torch.load(_blob(dtype, hidden))
        sizes[dtype] = sum(t.numel() * t.element_size() for n, t in tensors.items() if n in ("activation", "scale"))
    assert sizes["int8"] <= 0.52 * sizes["bfloat16"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_party_does_not_send_what_is_not_finite(dtype: str, value: float) -> None:
    pack = random_pack([7], 97, hidden=80)
    pack.given[3, 5] = value
    with pytest.raises(ModelError, match="not finite"):
        encode_pack(pack, dtype)


def test_what_is_finite_in_fp32_but_not_in_bf16_is_refused_by_both_sides() -> None:
    pack = random_pack([7], 97, hidden=80)
    pack.given[3, 5] = torch.finfo(torch.float32).max
    with pytest.raises(ModelError, match="not finite"):
        encode_pack(pack, "bfloat16")
    with pytest.raises(ProtocolError, match="not finite"):
        decode_pack(encode_pack(pack, "float32"), _schema("float32"), torch.bfloat16, "a")


def _with(dtype: str, **changes: Tensor | None) -> bytes:
    tensors: dict[str, Any] = safetensors.torch.load(_blob(dtype)) | changes
    return bytes(safetensors.torch.save({n: t for n, t in tensors.items() if t is not None}))


def _own(dtype: str, name: str) -> Tensor:
    return safetensors.torch.load(_blob(dtype))[name].clone()


def _set(dtype: str, name: str, value: float) -> bytes:
    tensor = _own(dtype, name)
    tensor.view(-1)[2] = value
    return _with(dtype, **{name: tensor})


INTEGERS = ["document_T", "branch_T", "position_T", "target_pos_N", "target_id_N", "target_group_N", "group_example_G"]
INTEGERS += ["group_role_G"]
BEYOND = {
    "document_T": 22,
    "branch_T": 22,
    "position_T": 40,
    "target_pos_N": 22,
    "target_id_N": 97,
    "target_group_N": 3,
}
BEYOND |= {"group_role_G": 2**16}

MALFORMED: dict[str, tuple[str, bytes]] = {
    "empty": ("float32", b""),
    "garbage": ("float32", b"\xff" * 100),
    "short": ("float32", _blob("float32")[:-1]),
    "long": ("float32", _blob("float32") + b"\0"),
    "no exponents": ("bfloat16-deflate", _with("bfloat16-deflate", exponent=None)),
    "exponents of another type": (
        "bfloat16-deflate",
        _with("bfloat16-deflate", exponent=torch.zeros(4, dtype=torch.int32)),
    ),
    "plain bf16 as coded": ("bfloat16-deflate", _blob("bfloat16")),
    "no scale": ("int8", _with("int8", scale=None)),
    "scale too many": ("float32", _with("float32", scale=torch.ones(22, 2, dtype=torch.bfloat16))),
    "other dtype": ("float32", _blob("bfloat16")),
    "other hidden": ("float32", _blob("float32", 81)),
    "flat activations": ("float32", _with("float32", activation=torch.zeros(22 * 80))),
    "scalar activations": ("float32", _with("float32", activation=torch.tensor(1.0))),
    "fp32 scales": ("int8", _with("int8", scale=torch.ones(22, 2))),
    "too few scales": ("int8", _with("int8", scale=torch.ones(22, 1, dtype=torch.bfloat16))),
    "nan": ("float32", _set("float32", "activation", torch.nan)),
    "inf": ("bfloat16", _set("bfloat16", "activation", torch.inf)),
    "nan scale": ("int8", _set("int8", "scale", torch.nan)),
    "inf scale": ("int8", _set("int8", "scale", torch.inf)),
    "huge scale": ("int8", _set("int8", "scale", 3e38)),
    "no targets": (
        "float32",
        _with("float32", **{n: torch.zeros(0, dtype=torch.int32) for n in INTEGERS if n[-1] == "N"}),
    ),
    "no groups": (
        "float32",
        _with("float32", **{n: torch.zeros(0, dtype=torch.int32) for n in INTEGERS if n[-1] == "G"}),
    ),
    "too many tokens": ("float32", encode_pack(random_pack([20, 21], 97, hidden=80), "float32")),
    **{f"{n} missing": ("float32", _with("float32", **{n: None})) for n in [*INTEGERS, "activation"]},
    **{f"{n} too short": ("float32", _with("float32", **{n: _own("float32", n)[:-1]})) for n in INTEGERS},
    **{f"{n} int64": ("float32", _with("float32", **{n: _own("float32", n).long()})) for n in INTEGERS},
    **{f"{n} square": ("float32", _with("float32", **{n: _own("float32", n)[None]})) for n in INTEGERS},
    **{f"{n} scalar": ("float32", _with("float32", **{n: torch.tensor(1, dtype=torch.int32)})) for n in INTEGERS},
    **{f"{n} below": ("float32", _set("float32", n, -2)) for n in INTEGERS},
    **{f"{n} beyond": ("float32", _set("float32", n, limit)) for n, limit in BEYOND.items()},
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_pack_is_refused_with_its_place(case: str) -> None:
    dtype, blob = MALFORMED[case]
    with pytest.raises(ProtocolError) as refused:
        decode_pack(blob, _schema(dtype), torch.float32, "party a, pack 3")
    assert refused.value.where == "party a, pack 3"


@settings(max_examples=300, deadline=None)
@given(dtype=st.sampled_from(DTYPES), data=st.data())
def test_bytes_changed_anywhere_give_a_sound_pack_or_a_protocol_error(dtype: str, data: st.DataObject) -> None:
    blob = bytearray(_blob(dtype))
    header = 8 + int.from_bytes(blob[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, header - 1) | st.integers(0, len(blob) - 1))
        blob[place] = data.draw(st.integers(0, 255) | st.sampled_from(list(b'0123456789"[]{},:')))
    try:
        pack = decode_pack(bytes(blob), _schema(dtype), torch.float32, "a")
    except ProtocolError:
        return
    assert bool(torch.isfinite(pack.given).all())
    assert 1 <= len(pack) <= 40
    assert int(pack.target_pos_N.max()) < len(pack)
    assert int(pack.target_id_N.max()) < 97


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_protocol_error(blob: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_pack(blob, _schema("float32"), torch.float32, "a")


def test_packs_of_a_whole_document_tree_keep_their_branches() -> None:
    pack = random_pack([12], 97, hidden=80)
    branch_T = torch.tensor([0] * 6 + [1] * 3 + [2] * 3)
    pack = replace(pack, layout=replace(pack.layout, branch_T=branch_T))
    decoded = decode_pack(encode_pack(pack, "float32"), _schema("float32"), torch.float32, "a")
    assert equal_packs(decoded, pack)
