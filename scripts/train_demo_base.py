"""Train the demo's base model and tokenizer from nothing, on generated text, on one core.

    python scripts/train_demo_base.py                      # remakes src/cloister/assets/demo/base
    python scripts/train_demo_base.py --steps 20 --out X   # a short run, to see that two of them give the same bytes

The text comes from `cloister.data.synthetic_corpus`. Two runs with the same arguments on one machine write identical
files. Another processor or version of torch rounds differently; the model is then as good but not the same bytes.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

# Before the imports: these libraries read their settings when they are loaded.
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cloister.data.synthetic_corpus import Document, pretraining_documents

BASE = Path(__file__).resolve().parents[1] / "src" / "cloister" / "assets" / "demo" / "base"
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
VOCABULARY = 1280
CONTEXT = 512
DOCUMENTS_PER_STEP = 16
NO_LOSS = -100
"""The target that transformers leaves out of the loss."""
GROUP_STEPS = 32
"""Steps whose documents are sorted by length together."""
TOKENIZER_DOCUMENTS = 20_000
PEAK_LEARNING_RATE = 5e-3
WARMUP_STEPS = 60
FINAL_SHARE = 0.02
"""Learning rate at the end, as a share of the peak."""


def main() -> None:
    """Train, save and say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BASE, help="folder for model and tokenizer")
    parser.add_argument("--steps", type=int, default=3600, help=f"of {DOCUMENTS_PER_STEP} documents each")
    parser.add_argument("--seed", type=int, default=2024)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    begin = time.monotonic()
    tokenizer = train_tokenizer(args.seed)
    model = LlamaForCausalLM(model_config(tokenizer))
    loss = train_model(model, token_batches(tokenizer, args.steps, args.seed), args.steps)
    save(model, tokenizer, args.out)
    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(
        f"{model.num_parameters():,} parameters, final loss {loss:.4f} nats per token, "
        f"{time.monotonic() - begin:.0f} s, {size:,} bytes in {args.out}"
    )


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text round-trips, and a text begins with <bos>."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator((d.text for d in pretraining_documents(TOKENIZER_DOCUMENTS, seed)), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, bos_token=BOS, eos_token=EOS, model_max_length=CONTEXT
    )


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """A Llama of six layers, so that the demo's cut leaves several on both sides."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        initializer_range=0.1,  # 1 / sqrt(hidden_size); the usual 0.02 is for wide models and learns slowly here
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def token_batches(
    tokenizer: PreTrainedTokenizerFast, count: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield `count` pairs of token ids and targets, both (DOCUMENTS_PER_STEP, T) int64, padded on the right.

    A document is a row of its own, ended by <eos>. Documents of similar length stand together, so that little is
    padding: a group of batches is sorted by length and its batches are taken in random order.
    """
    documents = pretraining_documents(count * DOCUMENTS_PER_STEP, seed)
    order = torch.Generator().manual_seed(seed)
    while group := list(islice(documents, GROUP_STEPS * DOCUMENTS_PER_STEP)):
        rows = sorted((token_row(tokenizer, document) for document in group), key=lambda row: len(row[0]))
        for index in torch.randperm(len(rows) // DOCUMENTS_PER_STEP, generator=order).tolist():
            batch = rows[index * DOCUMENTS_PER_STEP : (index + 1) * DOCUMENTS_PER_STEP]
            yield padded([r[0] for r in batch], tokenizer.pad_token_id), padded([r[1] for r in batch], NO_LOSS)


def token_row(tokenizer: PreTrainedTokenizerFast, document: Document) -> tuple[list[int], list[int]]:
    """Token ids of a document with <eos>, and the targets: the same, but NO_LOSS where the text is unscored."""
    encoded = tokenizer(document.text, return_offsets_mapping=True)
    ids = [*encoded["input_ids"], tokenizer.eos_token_id]
    scored = [end > document.unscored for _, end in encoded["offset_mapping"]] + [True]
    return ids, [i if s else NO_LOSS for i, s in zip(ids, scored, strict=True)]


def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
    """Rows as one tensor (len(rows), longest)."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])


def train_model(model: LlamaForCausalLM, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int) -> float:
    """Next-token training with AdamW, warm-up and cosine; returns the mean loss of the last 50 steps in nats."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_share(step, steps))
    losses = []
    begin = time.monotonic()
    for step, (id_BT, target_BT) in enumerate(batches, start=1):
        loss = model(input_ids=id_BT, labels=target_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            print(f"step {step} of {steps}: loss {losses[-1]:.4f}, {time.monotonic() - begin:.0f} s", flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


def learning_rate_share(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then cosine down to FINAL_SHARE."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(steps - WARMUP_STEPS, 1)
    return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in bfloat16, its generation settings and the tokenizer as a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
