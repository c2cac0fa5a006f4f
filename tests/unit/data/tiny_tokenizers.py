"""Tokenizers of the usual kinds, trained on a few sentences when asked for."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "The patient has a fever and a cough. Is it flu? Yes, it is.",
    "Question: which drug lowers blood pressure? Answer: an ACE inhibitor such as ramipril.",
    "Question: what is the dose? Answer: 5 mg twice daily, with food; stop if a rash appears.",
    "yes no maybe the heart the lung the liver\n### Response:\n### Input:\n",
] * 3

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
KINDS = ("plain", "bos", "bos-eos", "trimmed", "metaspace", "chat")


def _sentencepiece(specials: list[str]) -> Tokenizer:
    """BPE over words that begin with a visible space; bytes stand for characters outside the vocabulary."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=200, special_tokens=specials, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    vocab = model["vocab"] | {f"<0x{b:02X}>": len(model["vocab"]) + b for b in range(256)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m) for m in model["merges"]], byte_fallback=True))
    inner.add_special_tokens(specials)
    inner.normalizer = trained.normalizer
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return inner


@cache
def tiny_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One of KINDS.

    plain: byte-level BPE, nothing added (GPT-2). bos: a begin-of-text token is put first (Llama 3). bos-eos: and an
    end-of-text token last. trimmed: offsets leave spaces out (RoBERTa). metaspace: SentencePiece-like BPE with byte
    fallback and bos (Llama 2). chat: byte-level, bos, and a chat template that ends each message with <|end|>.
    """
    specials = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    if kind == "metaspace":
        inner = _sentencepiece(specials)
    else:
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        )
        inner.train_from_iterator(TEXT, trainer)
    first, last = ("" if kind in ("plain", "trimmed") else "<s> "), (" </s>" if kind == "bos-eos" else "")
    framed = processors.TemplateProcessing(
        single=f"{first}$A{last}", special_tokens=[("<s>", specials.index("<s>")), ("</s>", specials.index("</s>"))]
    )
    byte_level = processors.ByteLevel(trim_offsets=kind == "trimmed")
    inner.post_processor = framed if kind == "metaspace" else processors.Sequence([byte_level, framed])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",  # noqa: S106 - not a password
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        clean_up_tokenization_spaces=False,
    )
    if kind == "chat":
        tokenizer.chat_template = CHAT
    return tokenizer
