#!/usr/bin/env bash
# minitron under the DeepSpeed launcher:  bash launch/deepspeed.sh distill engine=deepspeed engine.zero_stage=3 …
#
#   NPROC_PER_NODE  processes on each node (default: the GPUs there, or 1)
#   HOSTFILE        for several nodes: lines of the form `name slots=8`, reached by pdsh; the checkout has the same path on all
#   MASTER_ADDR     the address of the first node, if its name is not to be asked for
#   MASTER_PORT     a port (default 29500); one node alone takes the next free one
#   MINITRON_LOGS   folder of the ranks' logs (default: <run folder>/logs); rank 0 is on the screen too
set -euo pipefail

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

python="$(runtime_python)"
working_folder="$PWD"
count_processes
choose_logs "$@"
set_rank_environment "$python" "$NUM_PROCESSES"

# --no_local_rank: else the launcher appends --local_rank=N, which Hydra refuses. The CLI reads LOCAL_RANK.
options=(--no_local_rank --no_python)
port="${MASTER_PORT:-29500}"
if [[ -n "${HOSTFILE:-}" ]]; then
    [[ -r "$HOSTFILE" ]] || fail "HOSTFILE=$HOSTFILE cannot be read"
    if grep -Evq '^[[:space:]]*(#.*)?$|^[[:space:]]*[^[:space:]#]+[[:space:]]+slots=[0-9]+[[:space:]]*(#.*)?$' "$HOSTFILE"; then
        fail "HOSTFILE=$HOSTFILE has lines that are not of the form 'name slots=8'"
    fi
    grep -q 'slots=' "$HOSTFILE" || fail "HOSTFILE=$HOSTFILE names no node"
    options+=(--hostfile "$(cd "$(dirname "$HOSTFILE")" && pwd)/$(basename "$HOSTFILE")")
else
    free="$(free_port "$python" "$port")"
    if [[ "$free" != "$port" ]]; then say "port $port is taken: $free instead"; fi
    port="$free"
fi
options+=(--master_port "$port")
if [[ -n "${NPROC_PER_NODE:-}" ]]; then options+=(--num_gpus "$NPROC_PER_NODE"); fi
if [[ -n "${MASTER_ADDR:-}" ]]; then options+=(--master_addr "$MASTER_ADDR"); fi

# With several nodes the launcher puts its own current directory on the ranks' import path, and `kernels` at the repository root must not
# be there. It starts in launch/, which is on the path of run.py anyway; `env -C` brings the ranks back to the user's folder, and carries
# the settings that the launcher would leave behind.
cd "$MINITRON_LAUNCH"
run_launcher "$python" deepspeed --quiet "${options[@]}" env -C "$working_folder" "${RANK_SETTINGS[@]}" "$python" "$MINITRON_LAUNCH/run.py" "$@"
