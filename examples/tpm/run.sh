#!/usr/bin/env bash
# Run job.toml against a software TPM, from start to finish. Usage: examples/tpm/run.sh [RUN_FOLDER]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
bin=${CLOISTER_BIN:-$here/../../.venv/bin}
out=${1:-$here/../../runs/tpm}
tpm=swtpm:127.0.0.1:2321

command -v swtpm >/dev/null || { echo "this needs a software TPM: apt install swtpm" >&2; exit 1; }

echo "1. A software TPM, new and empty"
state=$(mktemp -d)
swtpm socket --tpm2 --tpmstate "dir=$state" --server type=tcp,port=2321 --flags not-need-init,startup-clear \
  --log "file=$state/log" &
trap 'kill $! 2>/dev/null; wait; rm -rf "$state"' EXIT
for _ in $(seq 100); do
  kill -0 $! || { cat "$state/log" >&2; exit 1; }
  (exec 3<>/dev/tcp/127.0.0.1/2321) 2>/dev/null && break
  sleep 0.05
done

echo "2. Records of five hospitals"
"$bin/python" -c "from pathlib import Path; from cloister.data.synthetic import write_demo_data as write; \
write(Path('$here/data'), seed=20260, train=24, test=10)"

echo "3. The policy: this TPM's key, enrolled, and this program"
rm -f "$here/policy.toml"
"$bin/cloister" attest measure --type tpm --policy-out "$here/policy.toml" > /dev/null
"$bin/cloister" attest enrol --tpm "$tpm" --json |
  "$bin/python" -c 'import json, sys; print("\n" + json.load(sys.stdin)["policy"], end="")' >> "$here/policy.toml"
cat "$here/policy.toml"

echo "4. The job; a TPM hides nothing, so this takes a flag"
"$bin/cloister" run "$here/job.toml" --out "$out" --insecure-not-confidential

echo "5. The receipt, by that policy"
"$bin/cloister" verify "$out" --policy "$here/policy.toml"
