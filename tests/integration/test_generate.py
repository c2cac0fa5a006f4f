"""A run that serves: split inference is the merged model's greedy decoding, within the job's rules, until Ctrl-C."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cloister.agreement.job import open_job
from cloister.channel.rpc import Session
from cloister.crypto.keys import PartyKey
from cloister.errors import CapacityError, ProtocolError, TransportError, VerificationError
from cloister.jobfile import load_job
from cloister.methods.export import export_run
from cloister.methods.generate import generate_local
from cloister.party.ask import open_query_session
from cloister.progress import Silent
from cloister.report.outputs import GenerateReport
from tests.integration.search import canary, files_under, holding, left_elsewhere, text_forms, without
from tests.integration.tiny_job import Command, alive, children_of, finish, started, write_job

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for children in /proc"),
]

QUOTA = 30
PROMPTS = ["north test: what is 3 and 3?", "Question:", "yes no maybe the heart"]
NEW_TOKENS = 8
SECRET = canary("query")
RULES = {"allow": ["north"], "returns": "top-k", "top_k": 3, "quota_tokens": QUOTA}


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A run whose report is written and whose enclave answers; the adapter went to "north"."""

    out: Path
    command: Command
    folder: Path
    since: float

    def ask(self, party: str, *prompts: str, tokens: int = NEW_TOKENS) -> GenerateReport:
        return generate_local(self.out, party, prompts, max_new_tokens=tokens, raw=False, progress=Silent())

    def session(self, party: str, *, insecure_simulated: bool = True) -> Session:
        """A party's own program, which may ask anything."""
        opened = open_job(load_job(self.out / "job.toml"), progress=Silent())
        key = PartyKey.load(self.key(party))
        return open_query_session(opened, party, key, self.address, insecure_simulated=insecure_simulated)

    def key(self, party: str) -> Path:
        return self.out / "parties" / party / "party.key"

    def traces(self) -> list[Path]:
        """Files with the text of a query, but for what `cloister generate` printed for the one who asked."""
        files = [*files_under(self.folder), *left_elsewhere(self.since, besides=self.folder)]
        return holding(without(files, self.folder / "secret" / "stdout"), *text_forms(SECRET))

    @property
    def address(self) -> str:
        return str(json.loads((self.out / "enclave" / "address").read_text())["address"])


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("serving")
    changes = {"model": {"path": str(tiny_model_folder)}, "inference": RULES, "evaluation": {"baselines": []}}
    job, out, since = write_job(folder, changes), folder / "out", time.time()
    with started("run", job, "--out", out, "--serve", "--json", "--progress", "json", folder=folder) as command:
        command.wait_for((out / "report.json").exists, "report", timeout_s=250.0)
        yield Serving(out=out, command=command, folder=folder, since=since)


@pytest.fixture(scope="module")
def merged(serving: Serving) -> Path:
    to = serving.folder / "merged"
    export_run(serving.out, to, merge=True)
    return to


def activation(tokens: int = 2, width: int = 32) -> bytes:
    return bytes(safetensors.torch.save({"activation": torch.zeros(tokens, width)}))


def test_split_inference_is_the_merged_models_greedy_decoding(serving: Serving, merged: Path) -> None:
    options = [option for prompt in PROMPTS for option in ("--prompt", prompt)]
    arguments = ["generate", serving.out / "job.toml", "--party", "north", "--key", serving.key("north"), *options]
    arguments += ["--enclave", serving.address, "--insecure-simulated", "--max-new-tokens", NEW_TOKENS, "--json"]
    asked = finish(*arguments, folder=serving.folder / "ask")
    assert asked.process.returncode == 0, asked.stdout + asked.stderr
    report = GenerateReport.model_validate_json(asked.stdout)
    assert not report.attestation.hardware
    tokenizer = AutoTokenizer.from_pretrained(merged)
    tuned = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(load_job(serving.out / "job.toml").job.model.path).eval()
    changed = 0
    for prompt, answer in zip(PROMPTS, report.answers, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        greedy = [model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False) for model in (tuned, base)]
        expected, untuned = [out[0, ids.shape[1] :].tolist() for out in greedy]
        assert answer.token_ids == [token for token in expected if token != tokenizer.eos_token_id]
        assert answer.response == tokenizer.decode(expected, skip_special_tokens=True).strip()
        changed += expected != untuned
        for token, alternatives in zip(answer.token_ids, answer.alternatives, strict=True):
            assert len(alternatives) == RULES["top_k"]
            assert alternatives[0].text == tokenizer.decode([token])
            assert [a.logprob for a in alternatives] == sorted((a.logprob for a in alternatives), reverse=True)
    assert changed, "the base model gives the same answers: this shows nothing about the adapter"


def test_log_probabilities_are_the_merged_models(serving: Serving, merged: Path) -> None:
    report = serving.ask("north", PROMPTS[0], tokens=1)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    with torch.no_grad():
        logits_V = model(**tokenizer(PROMPTS[0], return_tensors="pt")).logits[0, -1]
    expected = torch.log_softmax(logits_V, -1).topk(3).values
    (alternatives,) = report.answers[0].alternatives
    assert torch.allclose(torch.tensor([a.logprob for a in alternatives]), expected, atol=1e-5)


def test_a_party_that_the_job_does_not_allow_is_refused(serving: Serving) -> None:
    with pytest.raises(VerificationError) as caught:
        serving.ask("south", PROMPTS[0])
    assert (caught.value.code, caught.value.where) == ("inference", "south")


def test_a_simulated_enclave_is_not_asked_without_a_word(serving: Serving) -> None:
    with pytest.raises(VerificationError) as caught:
        serving.session("north", insecure_simulated=False)
    assert caught.value.code == "simulated"


def test_a_query_of_another_party_or_session_does_not_exist(serving: Serving) -> None:
    with serving.session("north") as north, serving.session("south") as south:
        query = north.request("query.open", {})["id"]
        with pytest.raises(VerificationError):
            south.request("query.step", {"id": query, "activation": activation()})
        with pytest.raises(ProtocolError, match="no such query"):
            north.request("query.step", {"id": os.urandom(16), "activation": activation()})
        with pytest.raises(ProtocolError, match="shape"):
            north.request("query.step", {"id": query, "activation": activation(width=31)})
        assert north.request("query.close", {"id": query}) == {}


def test_the_text_of_a_query_is_left_nowhere(serving: Serving) -> None:
    """Of one that is answered, of one that is too long, of one by a party that may not ask."""
    call = ("generate", serving.out, "--max-new-tokens", 1, "--json")
    asked = finish(*call, "--prompt", SECRET, "--party", "north", folder=serving.folder / "secret")
    assert asked.process.returncode == 0, asked.stdout + asked.stderr
    assert SECRET in asked.stdout
    assert SECRET not in asked.stderr
    for party, prompt, code in (("north", SECRET * 1000, "capacity"), ("south", SECRET, "inference")):
        refused = finish(*call, "--prompt", prompt, "--party", party, folder=serving.folder / code)
        assert json.loads(refused.stdout)["error"]["code"] == code
    assert serving.traces() == []


def test_the_quota_ends_an_answer_and_then_refuses(serving: Serving) -> None:
    (last,) = serving.ask("north", "It is", tokens=QUOTA).answers
    assert (last.finish, 0 < last.tokens < QUOTA) == ("quota", True)
    with serving.session("north") as session:
        query = session.request("query.open", {})["id"]
        with pytest.raises(CapacityError, match="quota"):
            session.request("query.step", {"id": query, "activation": activation()})


def test_ctrl_c_ends_a_serving_run_and_its_children(serving: Serving) -> None:
    enclave = children_of(serving.command.process.pid)
    assert len(enclave) == 1, "the parties have left and the enclave has stayed"
    serving.command.interrupt()
    assert serving.command.end(30.0) == 130
    assert not alive(enclave)
    assert "Traceback" not in serving.command.stderr
    assert serving.traces() == []
    with pytest.raises(TransportError) as caught:
        serving.ask("north", "It is")
    assert f"--out {serving.out} --serve" in caught.value.hint
