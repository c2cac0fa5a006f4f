"""Job files that `cloister init` writes, one for each adapter and method. A test reads each with the real loader."""

from __future__ import annotations

from typing import Literal, get_args

from cloister.errors import UsageError

AdapterKind = Literal["lora", "ptuning", "spf"]
Method = Literal["split", "slice"]


def job_template(adapter: AdapterKind = "lora", method: Method = "split") -> str:
    """A commented job file.

    Raises:
        UsageError: the two do not go together.
    """
    if adapter == "spf" and method == "slice":
        raise UsageError(
            "spf does not go with the method slice: it changes rows of the base's own weights, which an untrusted "
            "accelerator holds there",
            hint="--method split, or --adapter lora or ptuning",
        )
    text = _HEAD + _METHODS[method] + _DATA + _ADAPTERS[adapter] + _TRAINING + _PARTIES + _ENCLAVE
    return text + (_TRANSPORT if method == "split" else _SLICE) + _RESULTS


def choices() -> list[tuple[AdapterKind, Method]]:
    """All that there are templates for."""
    return [
        (adapter, method)
        for method in get_args(Method)
        for adapter in get_args(AdapterKind)
        if (adapter, method) != ("spf", "slice")
    ]


_HEAD = """\
# A Cloister job: several parties fine-tune one model.
# Paths are relative to the folder of this file. Lines marked "local" may differ on each machine; everybody must agree
# on everything else, since it is hashed into the job's identity. `cloister plan`
# checks this file without starting anything.

[job]
name = "my-job"
"""

_METHODS: dict[Method, str] = {
    "split": """\
method = "split"            # former layers at the parties, latter layers trained in the server's enclave
seed = 0

[model]
path = "model"              # local: a Hugging Face folder with config.json, tokenizer and *.safetensors
cut = "auto"                # former layers: a number, a share such as 0.25, or "auto" (a third)
dtype = "float32"           # or "bfloat16"
""",
    "slice": """\
method = "slice"            # each party trains in an enclave of its own; an accelerator holds the frozen weights and
                            # sees masked numbers only; a server's enclave aggregates
seed = 0

[model]
path = "model"              # local: a Hugging Face folder with config.json, tokenizer and *.safetensors
dtype = "float32"           # or "bfloat16"
""",
}

_DATA = """
[data]
format = "auto"             # prompt-response, prompt-completion (TRL) or messages (chat template)
# template = "{prompt}\\n{response}"   # text around a record; without it one space joins prompt and response
truncation = "left"         # the side of the prompt that is dropped when a record is longer than max_tokens
validation = 0.05           # share of the training records kept for choosing the best checkpoint
"""

_ADAPTERS: dict[AdapterKind, str] = {
    "lora": """
[adapter]
kind = "lora"               # matrices of low rank beside frozen ones
rank = 8
alpha = 16.0                # scale is alpha / rank
dropout = 0.0
target_modules = "all-linear"   # or a list of names such as ["q_proj", "v_proj"]
""",
    "ptuning": """
[adapter]
kind = "ptuning"            # P-tuning v2: trained keys and values in front of each layer's own
prefix_tokens = 16
reparametrise = false       # true, or a hidden size: a perceptron computes them while they are trained
""",
    "spf": """
[adapter]
kind = "spf"                # chosen rows of the base's own weights, with LoRA beside them
ratio = 0.5                 # share of heads of q, k and v, and of rows of the MLP's input projections
criterion = "l1"            # ranked by norm of weights; or "l2", "grad" (first training step), "random"
unit = "head"               # or "row": what is chosen in q, k and v
tie_groups = false          # true: a key/value head together with the query heads that use it
# row_modules = ["q_proj", "up_proj"]   # or "all-linear"; left out: q, k, v and the MLP's input projections
rank = 8                    # of LoRA
alpha = 16.0
dropout = 0.0
# lora_modules = ["o_proj"] # or "all-linear", or [] for none; left out: the attention output projection
""",
}

_TRAINING = """
[training]
epochs = 2.0                # or steps = 500; exactly one of them
batch_tokens = 4096         # tokens per optimiser step
max_tokens = 512            # longest record
learning_rate = 2e-3
schedule = "cosine"         # or "linear", "constant"
warmup = 0.05
max_grad_norm = 1.0
evaluations = 4             # how often the validation loss is measured
keep = "best"               # or "last"

# One block for each party. On one machine (`cloister run`) keys are made for you; across machines each party runs
# `cloister keygen`, and its public key stands here.
"""

_PARTIES = """\
[[party]]
name = "north"
# public_key = "64 hexadecimal digits"
train = "north/train.jsonl" # local: JSONL, CSV or Parquet
test = "north/test.jsonl"   # local

[[party]]
name = "south"
# public_key = "64 hexadecimal digits"
train = "south/train.jsonl"
test = "south/test.jsonl"
"""

_ENCLAVE = """
[enclave]
attester = "auto"           # local: "auto" takes what the machine has; or tdx, sev-snp, sgx, nitro, dstack, tpm
# collateral = "collateral.json"  # local: the vendor's endorsements, by `cloister attest fetch`
# policy = "policy.toml"    # which enclaves the parties accept; its content is part of the job
"""

_TRANSPORT = """
[transport]
activation_dtype = "bfloat16"   # float32 is exact, bfloat16 half of it, int8 a quarter; bfloat16-deflate a third
chunk_mib = 1
"""

_SLICE = """
[masking]
pads = "precomputed"        # or "dual": two accelerators of different operators, no work beforehand
bits = 8                    # of a frozen weight; 16 is exacter and twice the work
# accelerators = ["unix:accelerator.sock"]   # local: on this machine, or "HOST:PORT#KEY"; two for "dual"
# pad_store = "pads"        # local: made by `cloister pads`; left out: computed when the party starts

[federation]
rounds = 4                  # a party's steps are spread evenly over them
aggregation = "mean"        # or "ffa", "svd" (LoRA), "trimmed-mean", "median"
local_state = "average"     # of the optimiser's moments between rounds, or "reset"
server_optimiser = "none"   # or "momentum", "adam"
# clip_norm = 1.0           # longest change that one party may send in a round
# quorum = 2                # parties that end a round once deadline_s is over; all of them if left out
deadline_s = 3600.0
"""

_RESULTS = """
[evaluation]
baselines = ["base"]        # add "local" (each party alone) and "central" (all data in one place; one machine only)
# max_examples = 500        # test records per party

[release]
to = "none"                 # or a list of parties that get the adapter; "none": use by split inference only

[inference]
allow = "all"               # or "none", or a list of parties
returns = "token"           # or "top-k"
quota_tokens = 100000       # new tokens that one party may have generated

[checkpoint]
count = 4                   # sealed states in a run, from which it goes on after a crash; 0 makes none
# quorum = 2                # parties that must sign a checkpoint and whose shares open it; all of them if left out
"""
