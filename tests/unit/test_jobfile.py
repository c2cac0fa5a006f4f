"""The job file: every fault is found at its line and in words; the job's identity is exactly its shared content."""

from __future__ import annotations

import hashlib
import json
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import JobError, ModelError, UsageError
from cloister.job import Job, Section
from cloister.jobfile import JobFaultsError, find_model, load_job, parse_job, render_job, resolve, shared_content
from cloister.jobfile.lines import index_lines
from cloister.jobfile.resolve import canonical_json, is_local

BASE = """\
[job]
name = "trial"

[model]
path = "model"

[training]
steps = 5

[[party]]
name = "a"
train = "a.jsonl"

[[party]]
name = "b"
"""
FILE = Path("job.toml")


def faults(text: str) -> list[tuple[str, str, str]]:
    """(where, message, hint) of every fault in a job file."""
    with pytest.raises(JobFaultsError) as caught:
        parse_job(text, FILE)
    return [(e.where, e.message, e.hint) for e in (caught.value, *caught.value.others)]


ONE_FAULT = [
    ("steps = 5", "stepz = 5", "job.toml:8: [training] stepz", "unknown key 'stepz'", "did you mean 'steps'?"),
    (
        "steps = 5",
        "steps = 5\nrank = 4",
        "job.toml:9: [training] rank",
        "unknown key 'rank'",
        "'rank' belongs to [adapter] or [party]",
    ),
    (
        "steps = 5",
        'steps = "5"',
        "job.toml:8: [training] steps",
        'expected a whole number, got the text "5"',
        "",
    ),
    ("steps = 5", "steps = true", "job.toml:8: [training] steps", "expected a whole number, got true", ""),
    (
        "steps = 5",
        "steps = 5.0",
        "job.toml:8: [training] steps",
        "expected a whole number, got the number 5.0",
        "",
    ),
    ("steps = 5", "steps = 0", "job.toml:8: [training] steps", "must be greater than or equal to 1, got 0", ""),
    (
        "steps = 5",
        "steps = 5\nlearning_rate = inf",
        "job.toml:9: [training] learning_rate",
        "must be a finite number, got inf",
        "",
    ),
    (
        "steps = 5",
        "steps = 5\nepochs = 1",
        "job.toml:8: [training] steps",
        "epochs and steps are both given: give exactly one of them",
        "",
    ),
    (
        "steps = 5",
        "",
        "job.toml:7: [training]",
        "says neither epochs nor steps: give exactly one of them",
        "",
    ),
    (
        "steps = 5",
        'steps = 5\nschedule = "linaer"',
        "job.toml:9: [training] schedule",
        'expected "cosine", "linear" or "constant", got the text "linaer"',
        'did you mean "linear"?',
    ),
    (
        "steps = 5",
        "steps = 5\nrounds = 3",
        "job.toml:9: [training] rounds",
        "unknown key 'rounds'",
        "'rounds' belongs to [federation]",
    ),
    (
        'name = "trial"',
        'name = "trial"\nmethod = "slcie"',
        "job.toml:3: [job] method",
        'expected "split" or "slice", got the text "slcie"',
        'did you mean "slice"?',
    ),
    (
        'name = "trial"',
        'name = "my trial"',
        "job.toml:2: [job] name",
        '"my trial" is not a valid name',
        "1 to 64 letters, digits, dots, dashes and underscores, beginning with a letter or digit",
    ),
    ('name = "trial"\n', "", "job.toml:1: [job] name", "'name' is missing", "expected a text"),
    ('name = "trial"', 'nmae = "trial"', "job.toml:2: [job] nmae", "unknown key 'nmae'", "did you mean 'name'?"),
    (
        'path = "model"',
        'path = "model"\ncut = -1',
        "job.toml:6: [model] cut",
        "must be at least 1 layer, got -1",
        "",
    ),
    (
        'path = "model"',
        'path = "model"\ncut = 1.5',
        "job.toml:6: [model] cut",
        "a share of the layers lies between 0 and 1, got 1.5; write a whole number for layers",
        "",
    ),
    (
        'path = "model"',
        'path = "model"\ncut = "auot"',
        "job.toml:6: [model] cut",
        'expected a whole number, a number or "auto", got the text "auot"',
        'did you mean "auto"?',
    ),
    ("[training]", "[trainning]", "job.toml:7: [trainning]", "unknown section [trainning]", "did you mean 'training'?"),
    (
        "[training]",
        "[privacy]\nepsilon = 8\n[training]",
        "job.toml:7: [privacy]",
        "unknown section [privacy]",
        "valid sections: job, model, data, adapter, training, party, enclave, transport, masking, federation, "
        "evaluation, release, inference, checkpoint",
    ),
    (
        "[training]",
        '[adapter]\nkind = "ia3"\n[training]',
        "job.toml:8: [adapter] kind",
        'expected "lora", "ptuning" or "spf", got the text "ia3"',
        "",
    ),
    (
        "[training]",
        '[adapter]\nkind = "spf"\nratio = 1.5\n[training]',
        "job.toml:9: [adapter] ratio",
        "must be less than or equal to 1, got 1.5",
        "",
    ),
    (
        "[training]",
        '[adapter]\nkind = "spf"\nratio = 0.0\n[training]',
        "job.toml:9: [adapter] ratio",
        "must be greater than 0, got 0.0",
        "",
    ),
    (
        "[training]",
        "[adapter]\nratio = 0.5\n[training]",
        "job.toml:8: [adapter] ratio",
        'is for kind "spf", not "lora"',
        "",
    ),
    (
        "[training]",
        '[adapter]\nkind = "spf"\ntarget_modules = ["q_proj"]\n[training]',
        "job.toml:9: [adapter] target_modules",
        'is for kind "lora", not "spf"',
        "",
    ),
    (
        "[training]",
        '[adapter]\nkind = "spf"\nunit = "row"\ntie_groups = true\n[training]',
        "job.toml:10: [adapter] tie_groups",
        'ties heads, but unit is "row"',
        "",
    ),
    (
        "[training]",
        '[adapter]\nkind = "spf"\nrow_modules = []\n[training]',
        "job.toml:9: [adapter] row_modules",
        'is empty, so no rows would be trained; kind = "lora" is LoRA alone',
        "",
    ),
    (
        "[training]",
        '[adapter]\nkind = "ptuning"\nrank = 8\n[training]',
        "job.toml:9: [adapter] rank",
        'is for kind "lora" or "spf", not "ptuning"',
        "",
    ),
    (
        "[training]",
        "[adapter]\nprefix_tokens = 4\n[training]",
        "job.toml:8: [adapter] prefix_tokens",
        'is for kind "ptuning", not "lora"',
        "",
    ),
    (
        "[training]",
        '[adapter]\nkind = "ptuning"\nreparametrise = 0.5\n[training]',
        "job.toml:9: [adapter] reparametrise",
        "expected true or false or a whole number, got the number 0.5",
        "",
    ),
    (
        "[training]",
        '[adapter]\ntarget_modules = ["q_proj", 3]\n[training]',
        "job.toml:8: [adapter] target_modules",
        "expected \"all-linear\" or a list, each of them a text, got the list ['q_proj', 3]",
        "",
    ),
    (
        "[training]",
        '[enclave]\nattester = "sev_snp"\n[training]',
        "job.toml:8: [enclave] attester",
        'expected "auto", "simulated", "tdx", "sev-snp", "sgx", "nitro", "dstack" or "tpm", got the text "sev_snp"',
        'did you mean "sev-snp"?',
    ),
    (
        "[training]",
        '[enclave]\nattester = "tdx"\ntpm = "/dev/tpmrm0"\n[training]',
        "job.toml:9: [enclave] tpm",
        'names a TPM, but attester is not "tpm"',
        "",
    ),
    (
        "[training]",
        "[enclave]\nprocesses = 0\n[training]",
        "job.toml:8: [enclave] processes",
        "must be greater than or equal to 1, got 0",
        "",
    ),
    (
        "[training]",
        '[enclave]\nsharding = "full"\n[training]',
        "job.toml:8: [enclave] sharding",
        '"full" spreads layers over processes, of which there is only 1',
        "",
    ),
    (
        "[training]",
        '[adapter]\nkind = "spf"\n[enclave]\nprocesses = 2\nsharding = "full"\n[training]',
        "job.toml:11: [enclave] sharding",
        '"full" parts the base\'s weights between processes, but kind "spf" trains rows of them',
        "",
    ),
    (
        'name = "trial"',
        'name = "trial"\nmethod = "slice"\n[enclave]\nprocesses = 2',
        "job.toml:5: [enclave] processes",
        'is for method "split"; with "slice" nothing is trained in the server\'s enclave',
        "",
    ),
    (
        "[training]",
        '[release]\nto = ["a", "c"]\n[training]',
        "job.toml:8: [release] to",
        "names 'c', which is not a party of this job",
        "",
    ),
    (
        "[training]",
        '[evaluation]\nbaselines = ["base", "lokal"]\n[training]',
        "job.toml:8: [evaluation] baselines",
        'expected a list, each of them "base", "local" or "central", got the text "lokal"',
        'did you mean "local"?',
    ),
    (
        "[training]",
        '[data]\ntemplate = "{prompt}"\n[training]',
        "job.toml:8: [data] template",
        "must hold {response} exactly once, holds it 0 times",
        "",
    ),
    ('name = "b"', 'name = "a"', "job.toml:15: [[party]] name", "'a' is already the name of party 1", ""),
    (
        'name = "b"',
        'name = "b"\npublic_key = "AB"',
        "job.toml:16: [[party]] public_key",
        '"AB" is not a valid public_key',
        "64 hexadecimal digits in lower case, as `cloister keygen` prints them",
    ),
    (
        'name = "b"',
        'name = "b"\ntrian = "x"',
        "job.toml:16: [[party]] trian",
        "unknown key 'trian'",
        "did you mean 'train'?",
    ),
    (
        'name = "a"',
        "name = ",
        "job.toml:11",
        "is not valid TOML: Invalid value, column 8",
        "the line reads: name =",
    ),
    (
        "[training]",
        "[training",
        "job.toml:7",
        "is not valid TOML: Expected ']' at the end of a table declaration, column 10",
        "the line reads: [training",
    ),
]


@pytest.mark.parametrize(("old", "new", "where", "message", "hint"), ONE_FAULT, ids=[f[1] for f in ONE_FAULT])
def test_a_fault_is_named_with_its_line_and_a_hint(old: str, new: str, where: str, message: str, hint: str) -> None:
    assert faults(BASE.replace(old, new, 1)) == [(where, message, hint)]


SLICE = BASE.replace('name = "trial"', 'name = "trial"\nmethod = "slice"') + '[[party]]\nname = "c"\n'

SLICE_MISFITS = [
    (
        'aggregation = "median"\nquorum = 2',
        "[federation] aggregation",
        '"median" needs updates of at least 3 parties in a round, not 2',
    ),
    ("quorum = 4", "[federation] quorum", "must be at most 3, the number of parties, got 4"),
    ("rounds = 6", "[federation] rounds", "must be at most 5, the number of steps, got 6"),
    (
        'aggregation = "svd"\nserver_optimiser = "momentum"',
        "[federation] server_optimiser",
        '"momentum" follows parameters over rounds; "svd" replaces them each time',
    ),
    (
        'server_optimiser = "adam"',
        "[federation] server_learning_rate",
        "must be at most 0.1 for adam, got 1.0: it moves a parameter that far",
    ),
    (
        "server_learning_rate = 0.5",
        "[federation] server_learning_rate",
        'is without effect: server_optimiser is "none"',
    ),
    (
        'aggregation = "ffa"\n[adapter]\nkind = "ptuning"',
        "[federation] aggregation",
        '"ffa" is for kind "lora", which has matrices A and B, not "ptuning"',
    ),
    (
        'aggregation = "svd"\n[adapter]\nkind = "ptuning"',
        "[federation] aggregation",
        '"svd" is for kind "lora", which has matrices A and B, not "ptuning"',
    ),
    (
        '[[party]]\nrank = 4\nname = "d"',
        "[[party]] rank",
        '4 differs from [adapter] rank: only aggregation = "svd" of kind "lora" allows that',
    ),
    (
        '[adapter]\nkind = "ptuning"\n[[party]]\nrank = 8\nname = "d"',
        "[[party]] rank",
        '8 differs from [adapter] rank: only aggregation = "svd" of kind "lora" allows that',
    ),
]


@pytest.mark.parametrize(("keys", "where", "message"), SLICE_MISFITS, ids=[f[0] for f in SLICE_MISFITS])
def test_rules_of_federation_that_do_not_fit_are_refused(keys: str, where: str, message: str) -> None:
    ((found, text, _),) = faults(f"{SLICE}[federation]\n{keys}\n")
    assert (found.partition(": ")[2], text) == (where, message)


@pytest.mark.parametrize(
    "keys",
    [
        'aggregation = "median"',
        'aggregation = "trimmed-mean"\nquorum = 3',
        'server_optimiser = "adam"\nserver_learning_rate = 0.01',
        'aggregation = "ffa"\nserver_optimiser = "momentum"',
        'aggregation = "svd"\n[[party]]\nname = "d"\nrank = 4',
        'rounds = 5\n[[party]]\nname = "d"\nrank = 8',
        "rounds = 5\nquorum = 2\nclip_norm = 0.5",
    ],
)
def test_rules_of_federation_that_fit_read_back_as_themselves(keys: str) -> None:
    job = parse_job(f"{SLICE}[federation]\n{keys}\n", FILE).job
    assert parse_job(render_job(job), FILE).job == job


def test_all_faults_are_reported_in_file_order_the_first_as_headline() -> None:
    text = BASE.replace("steps = 5", "steps = 0\nwarmpu = 0.1").replace('name = "trial"', "name = 3")
    text = text.replace('[model]\npath = "model"\n', "")
    found = faults(text)
    assert [where for where, _, _ in found] == [
        "job.toml:2: [job] name",
        "job.toml:6: [training] steps",
        "job.toml:7: [training] warmpu",
        "job.toml: [model]",
    ]
    with pytest.raises(JobFaultsError) as caught:
        parse_job(text, FILE)
    error = caught.value.to_json()["error"]
    assert set(error) == {"code", "message", "where", "hint"}
    assert error["where"] == found[0][0]
    assert all(where in error["hint"] for where, _, _ in found[1:])


def test_unreadable_job_files(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"No such file") as missing:
        load_job(tmp_path / "job.toml")
    assert missing.value.hint == "`cloister init` writes one to start from"
    with pytest.raises(JobError, match="cannot read the job file"):
        load_job(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'[job]\nname = "caf\xe9"\n')
    with pytest.raises(JobError, match="not UTF-8") as latin:
        load_job(tmp_path / "latin.toml")
    assert latin.value.where.endswith("latin.toml:2")
    (tmp_path / "big.toml").write_bytes(b"#" * (1 << 20 | 1))
    with pytest.raises(JobError, match="larger than 1 MiB"):
        load_job(tmp_path / "big.toml")


def test_windows_line_ends_and_byte_positions_do_not_shift_lines() -> None:
    assert faults(BASE.replace("steps = 5", "stepz = 5").replace("\n", "\r\n"))[0][0] == "job.toml:8: [training] stepz"


def test_the_example_jobs_load() -> None:
    paths = sorted((Path(__file__).parents[2] / "examples").glob("*/job.toml"))
    assert paths
    for path in paths:
        assert len(load_job(path).job.party) >= 2


# --- lines ------------------------------------------------------------------------------------------------------------

TRICKY = '''\
# [not] a header
top = """
[inside] = "a string"
key = 1
"""
[a]
"quoted key" = 'x # no comment'
list = [ # a comment with ]
  "]", """[""",
]
after = 1
dotted.inner = { x = 1, y = "}" }
[[b]]
one = 1
[[b]]
two = 'it''' + """
[b.sub]
deep = ''''
two quotes: ''
''''
last = 1
""".replace("it", "it'")


def test_lines_are_found_in_a_tricky_text() -> None:
    text = TRICKY.replace("two = 'it", "two = 'it'")
    tomllib.loads(text)
    found = index_lines(text)
    expected: dict[tuple[str | int, ...], int] = {
        ("top",): 2,
        ("a",): 6,
        ("a", "quoted key"): 7,
        ("a", "list"): 8,
        ("a", "after"): 11,
        ("a", "dotted", "inner"): 12,
        ("b", 0): 13,
        ("b", 0, "one"): 14,
        ("b", 1): 15,
        ("b", 1, "two"): 16,
        ("b", 1, "sub", "deep"): 18,
        ("b", 1, "sub", "last"): 21,
    }
    assert {path: found.find(path) for path in expected} == expected
    assert found.find(("a", "dotted", "inner", "x")) == 12, "keys inside an inline table are found at the table"
    assert found.find(("absent", "key")) is None


# --- paths ------------------------------------------------------------------------------------------------------------


def test_data_files_are_relative_to_the_job_file_and_missing_ones_are_named(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(BASE)
    (tmp_path / "a.jsonl").write_text("{}")
    loaded = load_job(tmp_path / "job.toml")
    assert loaded.data_file("a", "train") == (tmp_path / "a.jsonl").resolve()
    with pytest.raises(JobError, match="party 'b' has no test file") as unset:
        loaded.data_file("b", "test")
    assert unset.value.where == f"{tmp_path}/job.toml:14: [[party]] test"
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(JobError, match="the train data of party 'a' is missing") as missing:
        loaded.data_file("a", "train")
    assert missing.value.where == f"{tmp_path}/job.toml:12: [[party]] train"
    with pytest.raises(UsageError, match="no party 'c'") as stranger:
        loaded.data_file("c", "train")
    assert stranger.value.hint == "its parties are a, b"


def test_public_keys_are_filled_in_and_required() -> None:
    loaded = parse_job(BASE, FILE)
    with pytest.raises(JobError, match="party 'a' has no public key"):
        loaded.require_public_keys()
    filled = loaded.with_public_keys({"a": "0" * 64, "b": "1" * 64})
    filled.require_public_keys()
    assert [p.public_key for p in filled.job.party] == ["0" * 64, "1" * 64]


# --- the model folder -------------------------------------------------------------------------------------------------


def make_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"num_hidden_layers": 4}')
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("read by nobody")
    return folder


def test_model_files_are_found_and_hashed(tmp_path: Path) -> None:
    model = find_model(make_model(tmp_path / "m"))
    assert model.files == ("config.json", "model.safetensors", "tokenizer.json")
    counted: list[int] = []
    digests = model.digests(counted.append)
    assert digests["model.safetensors"] == hashlib.sha256(b"weights").hexdigest()
    assert sum(counted) == model.num_bytes
    assert model.config() == {"num_hidden_layers": 4}


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        ("config.json", "", "has no config.json"),
        ("tokenizer.json", "", "has no tokenizer"),
        ("model.safetensors", "", "no .safetensors files but no weights at all"),
        ("model.safetensors", "pytorch_model.bin", "but only pytorch_model.bin, a pickle, which is never loaded"),
    ],
)
def test_an_incomplete_model_folder_is_refused(tmp_path: Path, remove: str, add: str, message: str) -> None:
    folder = make_model(tmp_path / "m")
    (folder / remove).unlink()
    if add:
        (folder / add).write_bytes(b"")
    with pytest.raises(ModelError) as caught:
        find_model(folder, where="job.toml:5: [model] path")
    assert message in caught.value.message
    assert caught.value.where == "job.toml:5: [model] path"
    assert caught.value.hint


def test_a_missing_shard_and_a_broken_configuration_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks 1 of 2 weight files, such as model-2\.safetensors"):
        find_model(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="is not a JSON object"):
        find_model(folder)
    with pytest.raises(ModelError, match="does not exist"):
        find_model(tmp_path / "absent")


# --- identity ---------------------------------------------------------------------------------------------------------


def fields(model: type[Section], at: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], bool]]:
    """Every key of the job file with whether it is local, found by walking the models."""
    for name, field in model.model_fields.items():
        annotation: Any = field.annotation
        if get_origin(annotation) is list and isinstance(get_args(annotation)[0], type):
            inner = get_args(annotation)[0]
            if issubclass(inner, Section):
                yield from fields(inner, (*at, name, 1))
                continue
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield from fields(annotation, (*at, name))
        else:
            yield (*at, name), is_local(field)


OTHER: dict[tuple[str | int, ...], Any] = {
    ("job", "name"): "another",
    ("model", "cut"): 2,
    ("model", "revision"): "main",
    ("data", "template"): "{prompt}\n{response}",
    ("party", 1, "public_key"): "a" * 64,
    ("release", "to"): ["a"],
    ("inference", "allow"): ["b"],
    ("evaluation", "baselines"): ["local"],
    ("evaluation", "max_examples"): 7,
    ("training", "epochs"): 2.0,
    ("enclave", "threads"): 2,
}
"""Another valid value where one cannot be made from the type alone."""


def another_value(path: tuple[str | int, ...], value: object, annotation: Any) -> object:
    if path in OTHER:
        return OTHER[path]
    literals = [v for v in get_args(annotation) if isinstance(v, str)] if get_args(annotation) else []
    if len(literals) > 1:
        return next(v for v in literals if v != value)
    if isinstance(value, int | float):
        return value / 2 if isinstance(value, float) and value else value + 1
    return "other"


def changed(job: Job, path: tuple[str | int, ...]) -> Job:
    """The job with one key changed, without the checks that keys fit together."""
    section: Any = job
    trail = []
    for part in path[:-1]:
        trail.append((section, part))
        section = section[part] if isinstance(part, int) else getattr(section, part)
    key = str(path[-1])
    old = getattr(section, key)
    new = another_value(path, old, type(section).model_fields[key].annotation)
    assert new != old, f"no other value for {path}"
    replaced: Any = section.model_copy(update={key: new})
    for container, part in reversed(trail):
        if isinstance(part, int):
            replaced = [replaced if i == part else item for i, item in enumerate(container)]
        else:
            replaced = container.model_copy(update={part: replaced})
    assert isinstance(replaced, Job)
    return replaced


ALL_FIELDS = list(fields(Job))


@pytest.mark.parametrize(("path", "local"), ALL_FIELDS, ids=[".".join(map(str, p)) for p, _ in ALL_FIELDS])
def test_shared_keys_change_the_job_and_local_keys_do_not(path: tuple[str | int, ...], local: bool) -> None:
    job = parse_job(BASE, FILE).job
    before = canonical_json(shared_content(job))
    after = canonical_json(shared_content(changed(job, path)))
    assert (before == after) is local


def test_the_walk_finds_known_local_and_shared_keys() -> None:
    found = dict(ALL_FIELDS)
    assert {path for path, local in found.items() if local} == {
        ("model", "path"),
        ("party", 1, "train"),
        ("party", 1, "test"),
        ("enclave", "attester"),
        ("enclave", "tpm"),
        ("enclave", "collateral"),
        ("enclave", "policy"),
        ("enclave", "listen"),
        ("enclave", "threads"),
        ("enclave", "processes"),
        ("enclave", "sharding"),
        ("enclave", "device"),
        ("enclave", "repack"),
        ("enclave", "cache_mib"),
        ("enclave", "max_connections"),
        ("enclave", "max_bundle_mib"),
        ("masking", "accelerators"),
        ("masking", "pad_store"),
    }
    assert found[("training", "steps")] is False


def test_job_id_covers_model_policy_cut_and_version_but_not_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "elsewhere")
    loaded = parse_job(BASE, tmp_path / "job.toml")
    first = resolve(loaded, cut=1, policy_bytes=b"policy")
    assert first.job_id == hashlib.sha256(first.canonical).hexdigest()
    moved = parse_job(BASE.replace('"model"', '"elsewhere"'), tmp_path / "other.toml")
    assert resolve(moved, cut=1, policy_bytes=b"policy").job_id == first.job_id

    ids = {first.job_id}
    ids.add(resolve(loaded, cut=2, policy_bytes=b"policy").job_id)
    ids.add(resolve(loaded, cut=1, policy_bytes=b"another").job_id)
    for name in first.model.files:
        kept = (tmp_path / "model" / name).read_bytes()
        (tmp_path / "model" / name).write_bytes(kept + b" ")
        ids.add(resolve(loaded, cut=1, policy_bytes=b"policy").job_id)
        (tmp_path / "model" / name).write_bytes(kept)
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    ids.add(resolve(loaded, cut=1, policy_bytes=b"policy").job_id)
    monkeypatch.setattr("cloister.__version__", "99")
    ids.add(resolve(loaded, cut=1, policy_bytes=b"policy").job_id)
    assert len(ids) == 8


def test_canonical_form_is_sorted_compact_and_exact() -> None:
    assert canonical_json({"b": [0.1, 1e22], "a": "é"}) == '{"a":"é","b":[0.1,1e+22]}'.encode()
    with pytest.raises(JobError):
        canonical_json({"a": float("nan")})


# --- writing ----------------------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(path=texts, threads=st.none() | st.integers(1, 99), rate=st.floats(1e-9, 1e3), modules=st.lists(texts))
def test_a_written_job_reads_back_as_itself(path: str, threads: int | None, rate: float, modules: list[str]) -> None:
    job = parse_job(BASE, FILE).job
    job = job.model_copy(
        update={
            "model": job.model.model_copy(update={"path": path, "cut": 0.25}),
            "enclave": job.enclave.model_copy(update={"threads": threads}),
            "training": job.training.model_copy(update={"learning_rate": rate}),
            "adapter": job.adapter.model_copy(update={"target_modules": modules}),
        }
    )
    assert parse_job(render_job(job), FILE).job == job


def test_a_written_job_has_no_keys_of_another_kind_of_adapter() -> None:
    job = parse_job(BASE + '[adapter]\nkind = "ptuning"\nreparametrise = 64\n', FILE).job
    written = render_job(job)
    assert parse_job(written, FILE).job == job
    assert written.partition("[adapter]\n")[2].startswith(
        'kind = "ptuning"\nprefix_tokens = 16\nreparametrise = 64\n\n'
    )


def test_spf_is_refused_with_slice() -> None:
    text = BASE.replace('name = "trial"', 'name = "trial"\nmethod = "slice"', 1) + '[adapter]\nkind = "spf"\n'
    [(where, message, _)] = faults(text)
    assert where.endswith("[adapter] kind")
    assert message.startswith('"spf" is for method "split": it changes rows of the base\'s own weights')
