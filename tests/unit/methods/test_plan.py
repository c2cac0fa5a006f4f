"""The plan's arithmetic against the real thing: PEFT's parameter count, torch's operation counter, sealed bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from cloister.adapters.add import add_adapter
from cloister.cli import main
from cloister.data.payload import write_payload
from cloister.data.prepare import prepare
from cloister.job import AdapterSection
from cloister.jobfile import LoadedJob, load_job
from cloister.methods import estimate, plan, plan_split
from cloister.methods.estimate import ModelSize, PartCount
from cloister.model import attention
from cloister.model.cut import Former, Latter
from cloister.progress import Silent
from cloister.report.plan import PlanReport
from tests.unit.data.tiny_tokenizers import tiny_tokenizer

HIDDEN, LAYERS, CUT, MAX_TOKENS = 64, 4, 1, 128

JOB = f"""\
[job]
name = "tiny"
[model]
path = "model"
cut = {CUT}
[adapter]
rank = 4
[training]
epochs = 2.0
batch_tokens = 512
max_tokens = {MAX_TOKENS}
[[party]]
name = "north"
train = "train.jsonl"
test = "test.jsonl"
[evaluation]
baselines = ["base", "local", "central"]
max_examples = 30
"""


def tiny_model() -> LlamaForCausalLM:
    attention.install()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=HIDDEN,
        intermediate_size=192,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.requires_grad_(False)
    return model


def tiny_size() -> ModelSize:
    shapes = {name: tuple(p.shape) for name, p in tiny_model().named_parameters()}
    sizes = [4 * sum(sum(s) for s in estimate.matrices(shapes, first).values()) for first in (CUT, 0)]
    return estimate.measure_model(
        shapes, layers=LAYERS, cut=CUT, hidden=HIDDEN, vocabulary=512, adapter=sizes[0], whole_adapter=sizes[1]
    )


@pytest.fixture
def job(tmp_path: Path) -> LoadedJob:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer("bos").save_pretrained(tmp_path / "model")
    for name, count in (("train", 120), ("test", 50)):
        rows = [
            {
                "prompt": f"Question {i}: is the dose of drug {i * 7919 % 100}{' too' * (i % 9)} high?\nAnswer:",
                "response": "yes" if i % 2 else "no",
                **({"choices": ["yes", "no"], "answer": 1 - i % 2} if i % 3 == 0 else {}),
            }
            for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "job.toml").write_text(JOB)
    return load_job(tmp_path / "job.toml")


def test_parameters_are_those_of_the_two_halves_and_of_peft() -> None:
    model, size = tiny_model(), tiny_size()
    assert size.total == sum(p.numel() for p in model.parameters())
    assert size.former == sum(p.numel() for p in model.model.layers[:CUT].parameters())
    assert size.latter == sum(p.numel() for p in model.model.layers[CUT:].parameters())
    assert size.widest == 192
    adapted = add_adapter(Latter(model, CUT), AdapterSection(rank=4), first_layer=CUT, seed=0)
    assert size.adapter == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_only_matrices_of_layers_are_counted_as_linear() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (16, 8),
        "model.layers.0.q_proj.weight": (8, 8),
        "model.layers.1.q_proj.weight": (8, 8),
        "model.layers.1.norm.weight": (8,),
    }
    assert estimate.matrices(shapes) == {"model.layers.0.q_proj": (8, 8), "model.layers.1.q_proj": (8, 8)}
    assert estimate.matrices(shapes, 1) == {"model.layers.1.q_proj": (8, 8)}


def test_operations_of_the_former_half_are_those_that_torch_counts() -> None:
    size, former = tiny_size(), Former(tiny_model(), CUT)
    tokens = MAX_TOKENS
    with FlopCounterMode(display=False) as counter:
        former(torch.arange(tokens), torch.arange(tokens), None)
    counted = counter.get_total_flops()
    # What attention costs is an upper bound: torch's counter sees it only with some kernels.
    layers_only = 2 * (size.former - 2 * HIDDEN) * tokens
    assert layers_only <= counted <= estimate.former_operations(size, tokens, tokens) * 1.01


def test_operations_of_a_training_step_are_those_that_torch_counts() -> None:
    size, model = tiny_size(), tiny_model()
    latter = Latter(model, CUT)
    add_adapter(latter, AdapterSection(rank=4), first_layer=CUT, seed=0)
    tokens, targets = MAX_TOKENS, 40
    with FlopCounterMode(display=False) as counter:
        hidden_TD = latter.hidden(torch.randn(tokens, HIDDEN), torch.arange(tokens), None)
        latter.logits(hidden_TD[:targets]).logsumexp(-1).sum().backward()  # type: ignore[no-untyped-call]
    part = PartCount(records=1, tokens=tokens, targets=targets, packs=1, groups=1)
    expected = estimate.training_operations(size, part, 1.0, tokens, whole=False)
    assert expected / 1.35 <= counter.get_total_flops() <= expected * 1.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_bundles_have_the_planned_size(job: LoadedJob, dtype: str) -> None:
    tokenizer = tiny_tokenizer("bos")
    data = prepare(job.job, tokenizer, job.data_file("north", "train"), job.data_file("north", "test"))
    counted = plan_split.count_party(job, "north", tokenizer)
    for kind, part in data.parts.items():
        assert counted.parts[kind].records == part.records
        exact = PartCount(
            records=part.records,
            tokens=sum(map(len, part.packs)),
            targets=sum(len(p.target_pos_N) for p in part.packs),
            packs=len(part.packs),
            groups=sum(len(p.group_role_G) for p in part.packs),
        )
        if kind != "validation":  # six records, guessed from the training records
            assert counted.parts[kind].tokens == pytest.approx(exact.tokens, rel=0.06)
        written: list[bytes] = []
        packs = [p.with_activations(torch.zeros(len(p), 256)) for p in part.packs]
        write_payload(written.append, packs, part.examples, dtype)
        planned = estimate.bundle_bytes(exact, 256, dtype, 1 << 20, scored=kind != "train")
        assert planned == pytest.approx(sum(map(len, written)), rel=0.03), kind


def test_a_job_is_planned_as_it_would_run(job: LoadedJob) -> None:
    report = plan.plan_job(job, progress=Silent())
    assert (report.layers, report.former_layers, report.hidden_size) == (LAYERS, CUT, HIDDEN)
    assert report.parties[0].records.model_dump() == {"train": 114, "validation": 6, "test": 30}
    assert [role.role for role in report.roles] == ["party", "enclave"]
    party, enclave = report.roles
    assert enclave.bytes_up == party.bytes_up > party.disk_bytes > 0
    assert set(report.timing) == {"preparing", "former layers", "training", "scoring", "baselines"}
    assert all(seconds > 0 for seconds in report.timing.values())
    assert enclave.seconds == pytest.approx(report.timing["training"] + report.timing["scoring"])
    tokens = plan_split.count_party(job, "north", tiny_tokenizer("bos")).parts["train"].tokens
    assert report.steps == pytest.approx(2 * tokens / 512, rel=0.25)
    assert any("job_id will differ" in warning for warning in report.warnings)


def test_a_sample_stands_for_the_whole(job: LoadedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = plan_split.count_party(job, "north", tiny_tokenizer("bos"))
    monkeypatch.setattr(plan_split, "_SAMPLE", 40)
    sampled = plan_split.count_party(job, "north", tiny_tokenizer("bos"))
    assert (exact.sampled, sampled.sampled) == (False, True)
    for kind, part in exact.parts.items():
        assert sampled.parts[kind].records == part.records
        assert sampled.parts[kind].tokens == pytest.approx(part.tokens, rel=0.1)


@pytest.mark.parametrize("share", [0.0, 0.004, 0.05, 0.3, 0.49])
@pytest.mark.parametrize("records", [2, 3, 50, 120])
def test_validation_records_are_counted_as_they_are_chosen(job: LoadedJob, records: int, share: float) -> None:
    path = job.path.parent / "few.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "response": "r"}) + "\n" for i in range(records)))
    changed = job.job.model_copy(update={"data": job.job.data.model_copy(update={"validation": share})})
    parts = prepare(changed, tiny_tokenizer("bos"), path, job.data_file("north", "test")).parts
    chosen = parts["validation"].records if "validation" in parts else 0
    assert plan_split._validation_count(records, share) == chosen


def test_memory_grows_with_what_it_should_grow_with() -> None:
    size = tiny_size()
    small = estimate.enclave_memory(size, 4.0, 0.0, 0.0, 0)
    assert estimate.enclave_memory(size, 4.0, 0.0, 0.0, 1 << 30) - small == 1 << 30
    assert estimate.enclave_memory(size, 4.0, 1e6, 0.0, 0) - small == 1.8e6
    assert estimate.enclave_memory(size, 2.0, 0.0, 0.0, 0) < small
    assert small == estimate.ENCLAVE_BYTES + 4 * (size.latter + 512 * HIDDEN + HIDDEN) + 16 * size.adapter


def test_a_half_that_is_not_used_stays_in_its_file_unless_its_dtype_is_changed() -> None:
    size, part = tiny_size(), PartCount()
    mapped, read = (estimate.party_memory(s, [part], 4.0, MAX_TOKENS, 0.0) for s in (size, replace(size, mapped=False)))
    assert read - mapped == 4 * size.latter


def test_untied_ends_are_counted_apart() -> None:
    tied = tiny_size()
    untied = replace(tied, total=tied.total + 512 * HIDDEN)
    assert tied.end == untied.end == 512 * HIDDEN + HIDDEN


def test_a_model_too_large_to_rehearse_is_said_to_be(job: LoadedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_split, "rehearsal_bytes", lambda *_: 1 << 60)
    report = plan.plan_job(job, progress=Silent())
    job.path.write_text(JOB + "[enclave]\nrepack = false\n")
    without = plan.plan_job(load_job(job.path), progress=Silent())
    assert without.roles[-1].memory_bytes < report.roles[-1].memory_bytes
    assert any("would not fit here" in warning for warning in report.warnings)
    assert all(seconds > 0 for seconds in report.timing.values())
    assert all(role.memory_bytes > 0 for role in report.roles)


def test_times_of_a_device_are_said_to_be_those_of_processors(job: LoadedJob) -> None:
    job.path.write_text(JOB + '[enclave]\ndevice = "cuda"\n')
    warnings = plan.plan_job(load_job(job.path), progress=Silent()).warnings
    assert any("this machine's processors, not of cuda" in warning for warning in warnings)


def test_the_command_prints_a_plan_and_nothing_else(job: LoadedJob, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(job.path), "--json"]) == 0
    printed = capfd.readouterr()
    assert PlanReport.model_validate_json(printed.out).job_name == "tiny"
    assert printed.err == ""
    assert main(["plan", str(job.path)]) == 0
    assert "north" in capfd.readouterr().out


def test_a_cut_outside_the_model_is_refused_at_its_line(job: LoadedJob, capfd: pytest.CaptureFixture[str]) -> None:
    job.path.write_text(JOB.replace(f"cut = {CUT}", f"cut = {LAYERS}"))
    assert main(["plan", str(job.path)]) == 2
    assert f"{job.path}:5: [model] cut" in capfd.readouterr().err
