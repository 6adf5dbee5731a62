#!/usr/bin/env bash
# Train and test on one dataset; the other scripts of this folder source this one, and their names say which dataset.
name=$(basename "$0" .sh)
usage="usage: bash scripts/datasets/$name.sh DATA_ROOT [flags of train.py, which python train.py --help lists]"
case "${1:-}" in
    -h | --help) echo "$usage"; exit ;;
    "" | -*) echo "$usage" >&2; exit 2 ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
root=$(absolute "$1")
shift
prepare requirements.txt
again=--resume # goes on with a run that was stopped
[[ " $* " == *" --overwrite "* ]] && again=
python train.py --dataset "$name" --data-root "$root" $again "$@"
