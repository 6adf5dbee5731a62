#!/usr/bin/env bash
# All that a GPU is needed for, in under ten minutes; each row is written as it comes:
#   bash benchmarks/gpu.sh --data DIR [--output DIR] [--peer-python PYTHON] [--device cpu --small]
# DIR holds the folders mvtec, kolektor and ped2; what is missing is left out. --small tries everything in little.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
data="" output=/tmp/uninet-gpu device=cuda peer=() small=()
while (($#)); do
    case "$1" in
        --data) data=$2 && shift 2 ;;
        --output) output=$2 && shift 2 ;;
        --device) device=$2 && shift 2 ;;
        --peer-python) peer=(--peer-python "$2") && shift 2 ;;
        --small) small=(yes) && shift ;;
        *) echo "error: unknown flag $1; see the head of benchmarks/gpu.sh" >&2 && exit 2 ;;
    esac
done
mkdir -p "$output" && rm -f "$output/GPU.md"
table=$output/rows.md began=$SECONDS
echo "commit $(git rev-parse --short HEAD), $device; rows in $table" | tee "$table"

row() { # WHAT, COMMAND...: its last line and seconds become a row
    local what=$1 log start=$SECONDS code=0
    log=$output/$(tr -c 'a-zA-Z0-9\n' - <<< "$what").log
    shift
    "$@" > "$log" 2>&1 || code=$?
    echo "| $what | $(grep -v '^ *$' "$log" | tail -1 | cut -c1-160) | exit $code | $((SECONDS - start)) s |" | tee -a "$table"
}

iterations=1200 every=100 rounds=3 little=() tiny=()
if ((${#small[@]})); then
    iterations=8 every=2 rounds=1 little=(--size 64 --precision fp32 --threads 1)
    tiny=(--backbone test_efficientnet --weights random --set data.image_size=64 --set train.batch_size=2 --set data.train_limit=16 --precision fp32)
fi

echo "| what | found | exit | seconds |
| --- | --- | --- | --- |" | tee -a "$table"
# 1. a replayed step and a replayed prediction are the plain ones, for every model and setting
row "graphs equal launches" env UNINET_SLOW_TESTS=1 python -m pytest -n 0 tests/test_inference.py tests/test_step.py -k "graph or plain"
# 2. beside the peer; the table is written after each line
row "speed" python benchmarks/run.py --device "$device" --shape peer --only train --only one --only many --rounds "$rounds" \
    ${peer[@]+"${peer[@]}"} ${little[@]+"${little[@]}"} --markdown "$output/GPU.md"
# 3. our recipe on one category: seconds of training to 97 image AUROC, with a graph and without
remind() { # GRAPH STEPS
    row "ReMIND on screw, graph $1, $2 steps" python benchmarks/time_to.py --at 0.97 --output "$output/runs" -- --dataset mvtec \
        --data-root "$data/mvtec" --category screw --model remind --backbone tf_efficientnet_lite0 --precision bf16 \
        --iterations "$2" --set "eval.every=$every" --select best --device "$device" --graph "$1" ${tiny[@]+"${tiny[@]}"}
}
remind auto "$iterations"
remind off "$((iterations / 4))"
# 4. rows of the results that are not there yet; those that are cost nothing
if ((${#small[@]})); then exit; fi
row "Ped2" bash scripts/tables/accuracy.sh --data "ped2=$data/ped2" --datasets ped2 --device "$device" --precision bf16 \
    --models uninet-paper uninet-released recontrast --iterations 800 --set data.image_size=256 --runs "$output/accuracy"
row "KolektorSDD" bash scripts/tables/accuracy.sh --data "kolektor=$data/kolektor" --datasets kolektor --device "$device" \
    --precision bf16 --models uninet-paper uninet-released --iterations 300 --runs "$output/accuracy"
echo "all in $((SECONDS - began)) s" | tee -a "$table"
