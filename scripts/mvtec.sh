#!/usr/bin/env bash
# Train and test on MVTec AD:  bash scripts/mvtec.sh DIR [--category screw] [--setting multi-class] [further flags]
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
prepare requirements.txt
[[ $# -ge 1 && "$1" != -* ]] || { echo "usage: bash scripts/mvtec.sh DATA_ROOT [flags of train.py]" >&2; exit 2; }
root=$1
shift
python train.py --config configs/mvtec.yaml --data-root "$root" --resume "$@"
