#!/usr/bin/env bash
# Everything that needs a GPU, in one go under ten minutes: correctness first, then figures into docs/benchmarks/<device>/.
#   bash benchmarks/gpu.sh [OUT_FOLDER]
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
out="${1:-$root/docs/benchmarks}"
cd "$root/tests" || exit 1 # not the repository root: a bare `kernels` folder on the import path confuses transformers
export PYTHONPATH="$root/tests:${PYTHONPATH:-}"
"$python" -c 'import minitron' 2>/dev/null || { link="$(mktemp -d)"; ln -s "$root/minitron" "$link/minitron"; export PYTHONPATH="$link:$PYTHONPATH"; }

status=0
"$python" -m minitron.ops.build || status=$? # compiled once here, so that no measurement waits for a compiler
"$python" -m pytest -m gpu "$root/tests" -q || status=$?
"$python" "$root/benchmarks/kd_loss.py" --out "$out" || status=$?
"$python" "$root/benchmarks/sparse_matmul.py" --out "$out" || status=$?
# Random weights in the shapes of Llama-3.1-8B and its 4B student: how fast a step is beside plain training of the same student.
"$python" "$root/benchmarks/distill.py" --shapes 8b-4b --micro 1 --length 8192 --rounds 12 --dtype bf16 --ways ours cross_entropy --out "$out" || status=$?
exit "$status"
