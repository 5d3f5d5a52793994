#!/usr/bin/env bash
# A search over many jobs:  NUM_TASKS=8 bash slurm/search.sh experiment=… run_dir=…
# Submits, from the repository root: a job that scores and lists the candidates, an array whose tasks train a share of them each, and a job
# that ranks them when all tasks have ended. Then `sbatch slurm/compress.sbatch` with the same overrides goes on from the ranking.
#
#   NUM_TASKS   tasks of the array (default 8); AT_ONCE limits how many run at the same time
#   SBATCH_*    sbatch's own variables (SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_GPUS_PER_NODE, …) hold for all three
set -euo pipefail

if (($# == 0)); then
    echo "slurm: give the overrides of the search, at least experiment=NAME or run_dir=FOLDER" >&2
    exit 2
fi
num_tasks="${NUM_TASKS:-8}"
if ! [[ "$num_tasks" =~ ^[1-9][0-9]*$ ]]; then
    echo "slurm: NUM_TASKS=$num_tasks is no number of tasks" >&2
    exit 2
fi
first="$(sbatch --parsable --job-name=minitron-candidates slurm/compress.sbatch 'recipe.stages=[importance,search]' "$@")"
tasks="$(sbatch --parsable --array="0-$((num_tasks - 1))${AT_ONCE:+%$AT_ONCE}" --dependency="afterok:${first%%;*}" --kill-on-invalid-dep=yes \
    slurm/search_array.sbatch "$@")"
# afterany: when a task has failed the ranking starts and says which candidates are missing, instead of staying in the queue for ever.
ranking="$(sbatch --parsable --job-name=minitron-rank --dependency="afterany:${tasks%%;*}" slurm/search_array.sbatch "$@")"
echo "slurm: candidates $first, tasks $tasks, ranking $ranking"
