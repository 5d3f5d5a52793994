# shellcheck shell=bash
# Sourced by the batch scripts: run_job STAGE overrides …  starts launch/torchrun.sh on every node of the allocation, hands the warning
# signal on to the ranks, and puts the job back into the queue if it had to stop before the run was complete.

# Prints the run folder that the overrides name, as the command line would choose it; the job must know it to ask whether it is finished.
run_folder() {
    local argument experiment="" folder=""
    for argument in "$@"; do
        case "$argument" in
            run_dir=*) folder="${argument#run_dir=}" ;;
            experiment=*) experiment="${argument#experiment=}" ;;
        esac
    done
    printf '%s\n' "${folder:-${experiment:+runs/$experiment}}"
}

run_job() {
    local stage="$1" folder step code=0 warned=0
    shift
    folder="$(run_folder "$@")"
    if [[ -z "$folder" ]]; then
        echo "slurm: give run_dir=FOLDER or experiment=NAME" >&2
        return 2
    fi
    if [[ " $*" != *" run_dir="* ]]; then set -- "run_dir=$folder" "$@"; fi # what the job asks about is what the run writes
    # Set MASTER_ADDR where the nodes' names do not resolve, or to take another network.
    MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a node do not share a port
    export MASTER_ADDR MASTER_PORT
    # One task a node, and each expands its own rank and number of GPUs: hence the single quotes. exec, so that no shell is left that a
    # signal would kill. --kill-on-bad-exit: when a node fails the others do not wait for it.
    # shellcheck disable=SC2016
    srun --kill-on-bad-exit=1 bash -c '
        export NNODES=$SLURM_NNODES NODE_RANK=$SLURM_NODEID
        if ((${SLURM_GPUS_ON_NODE:-0} > 0)); then export NPROC_PER_NODE=${NPROC_PER_NODE:-$SLURM_GPUS_ON_NODE}; fi
        exec bash launch/torchrun.sh "$@"' minitron "$stage" "$@" &
    step=$!
    # srun hands the signal to every process of the step: the ranks write a checkpoint and leave with code 0, torchrun ignores it.
    trap 'warned=1; kill -USR1 "$step"' USR1
    # `wait` also returns when the trap has run; the step is over when its process is gone.
    while kill -0 "$step" 2>/dev/null; do
        code=0
        wait "$step" || code=$?
    done
    trap - USR1
    if ((warned)) && ! is_finished "$folder"; then
        echo "slurm: $folder is not complete; job $SLURM_JOB_ID goes back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$code"
}

# True unless the command line says (with code 3) that the run is incomplete: a job that cannot tell is not started over and over.
is_finished() {
    local code=0
    bash -c 'source launch/environment.sh && exec "$(runtime_python)" launch/run.py --finished "$1"' finished "$1" || code=$?
    ((code != 3))
}
