#!/usr/bin/env bash
# minitron under the DeepSpeed launcher:  bash launch/deepspeed.sh distill engine=deepspeed engine.zero_stage=3 …
#
#   NPROC_PER_NODE  processes on each node (default: the GPUs there, or 1)
#   HOSTFILE        for several nodes: lines of the form `name slots=8`, reached by pdsh; the checkout has the same path on all
#   MASTER_ADDR, MASTER_PORT
set -euo pipefail

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

python="$(runtime_python)"
working_folder="$PWD"

# --no_local_rank: else the launcher appends --local_rank=N, which Hydra refuses. The CLI reads LOCAL_RANK.
options=(--no_local_rank --no_python)
if [[ -n "${HOSTFILE:-}" ]]; then options+=(--hostfile "$(cd "$(dirname "$HOSTFILE")" && pwd)/$(basename "$HOSTFILE")"); fi
if [[ -n "${NPROC_PER_NODE:-}" ]]; then options+=(--num_gpus "$NPROC_PER_NODE"); fi
if [[ -n "${MASTER_ADDR:-}" ]]; then options+=(--master_addr "$MASTER_ADDR"); fi
if [[ -n "${MASTER_PORT:-}" ]]; then options+=(--master_port "$MASTER_PORT"); fi

# The same as in torchrun.sh, where the reasons stand. The launcher passes variables that begin with PYTHON on to other nodes.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning}"
export HYDRA_FULL_ERROR="${HYDRA_FULL_ERROR:-1}"
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"
trap '' USR1

# With several nodes the launcher puts its own current directory on the ranks' import path, and `kernels` at the repository root must not
# be there. It starts in launch/, which is on the path of run.py anyway; `env -C` brings the ranks back to the user's folder.
cd "$MINITRON_LAUNCH"
run_script deepspeed "$python" "${options[@]}" env -C "$working_folder" "$python" "$MINITRON_LAUNCH/run.py" "$@"
