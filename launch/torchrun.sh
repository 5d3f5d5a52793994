#!/usr/bin/env bash
# minitron under torchrun:  NPROC_PER_NODE=8 bash launch/torchrun.sh distill experiment=…
#
#   NPROC_PER_NODE      processes on this node (default: its GPUs, or 1)
#   NNODES              nodes (default 1); with more than one, on every node also:
#   NODE_RANK           0 … NNODES-1
#   MASTER_ADDR         the address of node 0
#   MASTER_PORT         a free port there (default 29500); one node alone finds a free one by itself
#   RENDEZVOUS_TIMEOUT  seconds to wait for node 0 and the others (default 600)
#   MAX_RESTARTS        how often torchrun starts the ranks again when one dies (default 0); they go on from the last checkpoint
#   MINITRON_LOGS       folder of the ranks' logs (default: <run folder>/logs); rank 0 is on the screen too
set -euo pipefail

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

python="$(runtime_python)"
count_processes
choose_logs "$@"
set_rank_environment "$python" "$NUM_PROCESSES"

if ((${NNODES:-1} > 1)); then
    for name in NODE_RANK MASTER_ADDR; do [[ -n "${!name:-}" ]] || fail "$name is not set, and NNODES=$NNODES nodes need it"; done
    ((NODE_RANK < NNODES)) || fail "NODE_RANK=$NODE_RANK does not exist: $NNODES nodes have the numbers 0 to $((NNODES - 1))"
    export NNODES NODE_RANK MASTER_ADDR MASTER_PORT="${MASTER_PORT:-29500}"
    if ((NODE_RANK == 0)) && [[ "$(free_port "$python" "$MASTER_PORT")" != "$MASTER_PORT" ]]; then
        fail "port $MASTER_PORT of $MASTER_ADDR, this node, is taken: give every node another MASTER_PORT"
    fi
    # The static rendezvous: the dynamic one (c10d) prints broken-pipe traces when its host leaves first.
    rendezvous=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"
        --rdzv-conf "timeout=${RENDEZVOUS_TIMEOUT:-600}")
else
    # The address: without it torchrun asks for its own host's name, and waits for minutes in a container whose name leads nowhere.
    rendezvous=(--standalone --local-addr 127.0.0.1)
fi

run_launcher "$python" torchrun "${rendezvous[@]}" --nproc-per-node "$NUM_PROCESSES" --max-restarts "${MAX_RESTARTS:-0}" "$MINITRON_LAUNCH/run.py" "$@"
