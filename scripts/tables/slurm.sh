#!/usr/bin/env bash
# Every table of the paper on a Slurm cluster: one array over datasets, categories, models and seeds.
#   bash scripts/tables/slurm.sh --data DIR [--tables "01 06"] [--seeds "0 1 2"] [--tasks 100] [-- flags of sbatch]
# Runs that tables share are trained once. A task takes every N-th run and goes on with unfinished ones, so the same
# command, given again, finishes what was killed. Afterwards scripts/tables/tableNN.sh fills the tables (docs/SCALING.md).
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"

run_task() { # LIST TASKS: the share of this task of the array; a failure does not stop the others
    local list=$1 tasks=$2 failed=0 line words
    while IFS= read -r line <&3; do
        read -ra words <<< "$line"
        echo "$line" >&2
        "${words[@]}" --resume --quiet || failed=1
    done 3< <(awk -v n="$tasks" -v i="$SLURM_ARRAY_TASK_ID" 'NR % n == (i + 1) % n' "$list")
    return "$failed"
}

usage="usage: bash scripts/tables/slurm.sh --data DIR [--tables \"01 06\"] [--seeds \"0 1\"] [--tasks N] [-- flags of sbatch]
(default: all tables, seed 0, 100 tasks of one GPU, 8 cores, 32 GB and 24 hours)"
usage() {
    echo "error: $1; ${usage%%$'\n'*}" >&2
    exit 2
}
[[ " -h --help " != *" ${1:-} "* ]] || { echo "$usage"; exit; }

if [[ "${1:-}" == --task ]]; then # called by Slurm
    prepare requirements.txt
    run_task "$2" "$3"
    exit
fi

data="" tables="01 02 03 04 05 06 07 08 09 10 11 12 library unias" seeds=0 tasks=100
while (($#)) && [[ "$1" != -- ]]; do
    (($# > 1)) || usage "$1 needs a value"
    case "$1" in
        --data) data=$2 ;;
        --tables) tables=$2 ;;
        --seeds) seeds=$2 ;;
        --tasks) tasks=$2 ;;
        *) usage "unknown flag $1" ;;
    esac
    shift 2
done
(($#)) && shift # the --
[[ -n "$data" ]] || usage "where are the datasets? --data is missing"
[[ "$tasks" =~ ^[1-9][0-9]*$ ]] || usage "--tasks is '$tasks', not a number from 1 on"
[[ "$PWD$data" != *[[:space:]]* ]] || usage "paths with spaces do not work here; found '$PWD' and '$data'"
command -v sbatch > /dev/null || { echo "error: there is no sbatch here; run this where Slurm is" >&2; exit 1; }

prepare requirements.txt
mkdir -p checkpoints/slurm
list=checkpoints/slurm/runs-$(date +%Y%m%d-%H%M%S)-$$.txt
# shellcheck disable=SC2086 (both are several words)
python -m scripts.tables.reproduce $tables --data "$data" --seeds $seeds --dry-run | awk '/^python / && !seen[$0]++' > "$list"
runs=$(wc -l < "$list")
((tasks < runs)) || tasks=$runs
echo "$runs runs in $tasks tasks; the list: $list"
sbatch --job-name=uninet --chdir="$PWD" --array="0-$((tasks - 1))" --output=checkpoints/slurm/%A_%a.log \
    --gres=gpu:1 --cpus-per-task=8 --mem=32G --time=24:00:00 --requeue "$@" \
    --wrap="bash scripts/tables/slurm.sh --task $list $tasks"
