#!/usr/bin/env bash
# minitron under torchrun:  NPROC_PER_NODE=8 bash launch/torchrun.sh distill experiment=…
#
#   NPROC_PER_NODE  processes on this node (default: its GPUs, or 1)
#   NNODES          nodes (default 1); with more than one, on every node also:
#   NODE_RANK       0 … NNODES-1
#   MASTER_ADDR     the address of node 0
#   MASTER_PORT     a free port there (default 29500)
#   MAX_RESTARTS    how often torchrun starts the ranks again when one dies (default 0); they go on from the last checkpoint
set -euo pipefail

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

python="$(runtime_python)"
if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    num_gpus="$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)"
else
    num_gpus="$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)"
fi
num_processes="${NPROC_PER_NODE:-$((num_gpus > 0 ? num_gpus : 1))}"
num_cores="$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')"

# Without it torch takes all cores in each process (torchrun: one), and processes that share cores wait for each other's threads.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((num_cores > num_processes ? num_cores / num_processes : 1))}"
# Collectives that DeepSpeed calls are deprecated in torch: one warning per call site and rank.
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning}"
# Hydra cuts the trace of an error short, which makes the log of a failed rank useless.
export HYDRA_FULL_ERROR="${HYDRA_FULL_ERROR:-1}"
# A killed rank loses what stands in its output buffer.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"
# After a SIGTERM torchrun gives the ranks this many seconds to write their checkpoint, then kills them (its own default: 30).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
# SIGUSR1 asks the ranks to checkpoint and leave. torchrun itself would die of it and take them along; the ranks set their own handler.
trap '' USR1

if ((${NNODES:-1} > 1)); then
    # The static rendezvous: the dynamic one (c10d) prints broken-pipe traces when its host leaves first.
    rendezvous=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?is needed when NNODES > 1}"
        --master-addr "${MASTER_ADDR:?is needed when NNODES > 1}" --master-port "${MASTER_PORT:-29500}")
else
    rendezvous=(--standalone)
fi

run_script torchrun "$python" "${rendezvous[@]}" --nproc-per-node "$num_processes" --max-restarts "${MAX_RESTARTS:-0}" "$MINITRON_LAUNCH/run.py" "$@"
