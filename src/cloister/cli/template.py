"""The job file that `cloister init` writes. A test reads it back with the real loader."""

JOB_TEMPLATE = """\
# A Cloister job: several parties fine-tune one model by the method "split".
# Paths are relative to the folder of this file. Lines marked "local" may differ on each machine; everybody must agree
# on everything else, since it is hashed into the job's identity. `cloister plan`
# checks this file without starting anything.

[job]
name = "my-job"
method = "split"            # former layers at the parties, latter layers trained in the enclave
seed = 0

[model]
path = "model"              # local: a Hugging Face folder with config.json, tokenizer and *.safetensors
cut = "auto"                # former layers: a number, a share such as 0.25, or "auto" (a third)
dtype = "float32"           # or "bfloat16"

[data]
format = "auto"             # prompt-response, prompt-completion (TRL) or messages (chat template)
# template = "{prompt}\\n{response}"   # text around a record; without it one space joins prompt and response
truncation = "left"         # the side of the prompt that is dropped when a record is longer than max_tokens
validation = 0.05           # share of the training records kept for choosing the best checkpoint

[adapter]
kind = "lora"
rank = 8
alpha = 16.0
dropout = 0.0
target_modules = "all-linear"   # or a list of names such as ["q_proj", "v_proj"]

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

[enclave]
attester = "auto"           # local: "auto" takes what the machine has; or tdx, sev-snp, sgx, nitro, dstack, tpm
# collateral = "collateral.json"  # local: the vendor's endorsements, by `cloister attest fetch`
# policy = "policy.toml"    # which enclaves the parties accept; its content is part of the job

[transport]
activation_dtype = "bfloat16"   # float32 is exact, bfloat16 half of it, int8 a quarter
chunk_mib = 1

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
