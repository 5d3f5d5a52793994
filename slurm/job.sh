# shellcheck shell=bash
# Sourced by the batch scripts: run_job STAGE overrides …  starts launch/torchrun.sh on every node of the allocation, hands the warning
# signal on to the ranks, and puts the job back into the queue if it had to stop before its work was complete. Settings:
#
#   MASTER_ADDR    address of the first node (default: its name), where names do not resolve or another network is wanted
#   SRUN_OPTIONS   further options of srun, such as pyxis's --container-image=…; split at blanks
#   RUN_PREFIX     words before the command on every node, such as "apptainer exec --nv minitron.sif"; split at blanks
#   LAUNCH         folder of the launch scripts as the nodes see it (default: launch; in the image /opt/minitron/launch)

#: A job that leaves by itself without being complete comes back this often, and then no more: something keeps it from getting on.
MOST_RETURNS=100

refuse() {
    printf 'slurm: %s\n' "$*" >&2
    exit 2
}

# Slurm's variables are there and agree with each other.
check_job() {
    local name nodes num_nodes
    for name in SLURM_JOB_ID SLURM_JOB_NODELIST SLURM_NNODES; do
        [[ -n "${!name:-}" ]] || refuse "$name is not set: submit this script with sbatch"
    done
    nodes="$(scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null)" || refuse "SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST names no nodes"
    num_nodes="$(wc -l <<<"$nodes")"
    ((num_nodes == SLURM_NNODES)) || refuse "SLURM_NNODES=$SLURM_NNODES, but SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST names $num_nodes"
    ((${SLURM_NTASKS:-SLURM_NNODES} == SLURM_NNODES)) ||
        refuse "$SLURM_NTASKS tasks on $SLURM_NNODES nodes: each node's one task starts its ranks, so give --ntasks-per-node=1 and no --ntasks"
    [[ -n "${MASTER_ADDR:-}" ]] || MASTER_ADDR="$(head -n 1 <<<"$nodes")"
    MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}" # jobs that share a node do not share a port
    LAUNCH="${LAUNCH:-launch}"
    export MASTER_ADDR MASTER_PORT LAUNCH
    read -r -a srun_options <<<"${SRUN_OPTIONS:-}"
    read -r -a run_prefix <<<"${RUN_PREFIX:-}"
}

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

# Number and number of tasks of an array, as ranking.task=array takes them.
array_share() { printf '%s-of-%s\n' "$((SLURM_ARRAY_TASK_ID - ${SLURM_ARRAY_TASK_MIN:-0}))" "$SLURM_ARRAY_TASK_COUNT"; }

# srun hands the signal to every process of the step: the ranks write a checkpoint and leave with code 0, torchrun ignores it. Again and
# again, because ranks that are still loading their libraries do not hear it.
warn() {
    while kill -USR1 "$1" 2>/dev/null; do sleep 10; done
}

run_job() {
    local stage="$1" folder job step code=0 warned=0 warner="" question srun_options run_prefix
    shift
    check_job
    folder="$(run_folder "$@")"
    [[ -n "$folder" ]] || refuse "give run_dir=FOLDER or experiment=NAME"
    if [[ " $*" != *" run_dir="* ]]; then set -- "run_dir=$folder" "$@"; fi # what the job asks about is what the run writes
    question=("$stage" --finished "$folder")
    job="$SLURM_JOB_ID"
    if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then
        question=("$stage" --finished "$folder/ranking.tasks/$(array_share)")
        job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" # the number of an array's last task is also that of the whole array
    fi
    # One task a node, and each expands its own rank and number of GPUs: hence the single quotes. exec, so that no shell is left that a
    # signal would kill. --kill-on-bad-exit: when a node fails the others do not wait for it.
    # shellcheck disable=SC2016
    srun --kill-on-bad-exit=1 ${srun_options[@]+"${srun_options[@]}"} ${run_prefix[@]+"${run_prefix[@]}"} bash -c '
        export NNODES=$SLURM_NNODES NODE_RANK=$SLURM_NODEID
        if ((${SLURM_GPUS_ON_NODE:-0} > 0)); then export NPROC_PER_NODE=${NPROC_PER_NODE:-$SLURM_GPUS_ON_NODE}; fi
        exec bash "$LAUNCH/torchrun.sh" "$@"' minitron "$stage" "$@" &
    step=$!
    trap 'warned=1; if [[ -z "$warner" ]]; then warn "$step" & warner=$!; fi' USR1
    # `wait` also returns when the trap has run; the step is over when its process is gone.
    while kill -0 "$step" 2>/dev/null; do
        code=0
        wait "$step" || code=$?
    done
    trap '' USR1
    if [[ -n "$warner" ]]; then kill "$warner" 2>/dev/null || true; fi
    # Code 0 alone says nothing: ranks that were asked to stop leave with it, and tasks that wait for others.
    if ((warned || code == 0)) && ! is_finished "${question[@]}"; then
        if ((!warned && ${SLURM_RESTART_COUNT:-0} >= MOST_RETURNS)); then
            refuse "$folder is not complete, though job $job has come back $SLURM_RESTART_COUNT times"
        fi
        echo "slurm: $folder is not complete; job $job goes back into the queue"
        scontrol requeue "$job"
        sleep 30 # Slurm ends this script in a moment; one that leaves first may be taken for the job's end
    fi
    return "$code"
}

# True unless the command line says (with code 3) that the work is incomplete: a job that cannot tell is not started over and over.
# --overlap: the step before may still stand in Slurm's books. The code is printed, because srun would report it as an error.
is_finished() {
    local answer
    # shellcheck disable=SC2016
    answer="$(srun --overlap --nodes=1 --ntasks=1 ${srun_options[@]+"${srun_options[@]}"} ${run_prefix[@]+"${run_prefix[@]}"} bash -c '
        source "$LAUNCH/environment.sh" && "$(runtime_python)" "$LAUNCH/run.py" "$@" >/dev/null; echo "code=$?"' finished "$@")" || true
    [[ "$answer" != *code=3* ]]
}
