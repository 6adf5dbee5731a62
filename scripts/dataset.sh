#!/usr/bin/env bash
# Train and test on one dataset; called by scripts/NAME.sh:  bash scripts/dataset.sh NAME DATA_ROOT [flags of train.py]
name=$1
shift
if [[ $# -lt 1 || "$1" == -* ]]; then
    echo "usage: bash scripts/$name.sh DATA_ROOT [flags of train.py]" >&2
    exit 2
fi
root=$1
shift
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
root=$(absolute "$root")
prepare requirements.txt
python train.py --config "configs/$name.yaml" --data-root "$root" --resume "$@"
