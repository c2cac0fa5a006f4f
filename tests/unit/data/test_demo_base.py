"""The bundled base model: small, loads offline, reads notes, and does not know the tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from cloister.data import synthetic
from cloister.data.synthetic import Dice, draw_facts, generate_party, write_note
from cloister.data.synthetic_words import KINDS, LABELS, SPECIALITIES

BASE = Path(synthetic.__file__).parents[1] / "assets" / "demo" / "base"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(BASE, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(BASE, local_files_only=True, dtype=torch.float32).eval()


def test_all_files_together_are_small() -> None:
    """At most 3 MB, weights as safetensors only."""
    files = [f for f in BASE.parent.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 3_000_000
    assert {f.suffix for f in files} <= {".json", ".safetensors", ".md"}


def test_the_model_is_a_llama_that_can_be_cut(model: LlamaForCausalLM) -> None:
    """Six layers, grouped-query attention, tied embeddings, context of 512, all weights finite."""
    config = model.config
    assert isinstance(model, LlamaForCausalLM)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (6, 4, 2)
    assert config.tie_word_embeddings
    assert config.max_position_embeddings == 512
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "text", ["Cardiology. 64 man.", "naïve café £5, 体温 38.5 °C 🙂", "two  blanks,\n\ttab", *LABELS, ""]
)
def test_the_tokenizer_returns_any_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """Byte-level BPE loses nothing, whether or not it has met the letters; a text begins with <bos>."""
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


def test_model_and_tokenizer_agree(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Same vocabulary and special tokens; generation ends at <eos>."""
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().weight.shape[0]
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    for settings in (model.config, model.generation_config):
        assert (settings.pad_token_id, settings.bos_token_id, settings.eos_token_id) == special
    assert len(set(special)) == 3


def test_demo_records_fit_the_context(tokenizer: PreTrainedTokenizerFast) -> None:
    """No record of the demo is ever truncated, even in packs of 128 tokens."""
    for speciality in SPECIALITIES:
        for record in generate_party(speciality.name, "train", 500, 0):
            assert len(tokenizer(f"{record['prompt']} {record['response']}")["input_ids"]) < 128


@torch.inference_mode()
def test_the_base_reads_a_note(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Asked for the kind of the finding it answers rightly nearly always, so former layers carry what tasks need."""
    right = 0
    dice = Dice("reading", 0)
    for index in range(100):
        facts = draw_facts(dice, SPECIALITIES[index % 5], dice.below(12))
        ids = tokenizer(write_note(dice, SPECIALITIES[index % 5], facts) + "\nKind:", return_tensors="pt")
        guess = model(**ids).logits[0, -1].argmax().item()
        right += guess == tokenizer(f" {KINDS[facts.kind]}", add_special_tokens=False)["input_ids"][0]
    assert right >= 90


@torch.inference_mode()
def test_the_base_does_not_know_the_tasks(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Choosing among the twelve labels it is right about as often as by chance (1/12), far from the 90 % of tuning."""
    right = total = 0
    for speciality in SPECIALITIES:
        for record in generate_party(speciality.name, "test", 40, 0):
            if record["task"] != "triage":
                continue
            batch = tokenizer([f"{record['prompt']} {label}" for label in LABELS], return_tensors="pt", padding=True)
            log_p = model(**batch).logits[:, :-1].log_softmax(-1)
            target = batch["input_ids"][:, 1:]
            mask = batch["attention_mask"][:, 1:]
            score = (log_p.gather(-1, target[..., None])[..., 0] * mask).sum(-1)
            right += int(score.argmax()) == record["answer"]
            total += 1
    assert total == 120
    assert right <= 24  # 1/12 would be 10; beyond 24 lies a chance of 1 in 20 000
