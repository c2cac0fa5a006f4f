"""A Llama of a given shape with random weights, for benchmarks that need no meaning."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cloister.data.packing import Pack
from cloister.model.attention import Layout


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a benchmark runs on."""

    hidden: int = 2048
    layers: int = 4
    vocabulary: int = 32_000
    tokens: int = 512
    """Of an optimiser step."""
    packs: int = 1
    """That the tokens of a step are spread over."""
    rank: int = 8

    @property
    def weights(self) -> int:
        """Parameters of the base model; embedding and head are one."""
        return sum(p.numel() for p in _meta(self).parameters())

    @property
    def pack_tokens(self) -> int:
        return self.tokens // self.packs

    def arguments(self) -> list[str]:
        """As `silo/bench.py` takes them."""
        return [f"{name}={value}" for name, value in asdict(self).items()]

    @classmethod
    def of(cls, arguments: list[str]) -> Shape:
        pairs = (argument.partition("=") for argument in arguments)
        return cls(**{name: int(value) for name, _, value in pairs})


def config(shape: Shape) -> LlamaConfig:
    """Llama's proportions: the MLP is 8/3 as wide, heads have 64 dimensions, or 128 from a width of 1024 on."""
    heads = shape.hidden // (128 if shape.hidden >= 1024 and shape.hidden % 128 == 0 else 64)
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=-(-shape.hidden * 8 // 3 // 128) * 128,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max(2048, shape.tokens),
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )


def _meta(shape: Shape) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(config(shape))


def write_model(shape: Shape, folder: Path) -> None:
    """Random weights, float32, as `save_pretrained` writes them."""
    torch.manual_seed(0)
    LlamaForCausalLM(config(shape)).save_pretrained(folder)


def packs(shape: Shape) -> list[Pack]:
    """One step's packs: one document each, a target at every token but the last."""
    generator = torch.Generator().manual_seed(1)
    return [
        _pack(torch.randint(3, shape.vocabulary, (shape.pack_tokens,), generator=generator)) for _ in range(shape.packs)
    ]


def _pack(ids_T: Tensor) -> Pack:
    count = len(ids_T)
    position_T = torch.arange(count)
    zeros_N = torch.zeros(count - 1, dtype=torch.int64)
    return Pack(
        given=ids_T,
        layout=Layout(document_T=torch.zeros_like(ids_T), branch_T=torch.zeros_like(ids_T), position_T=position_T),
        target_pos_N=position_T[:-1],
        target_id_N=ids_T[1:],
        target_group_N=zeros_N,
        group_example_G=torch.zeros(1, dtype=torch.int64),
        group_role_G=torch.zeros(1, dtype=torch.int64),
    )
