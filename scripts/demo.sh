#!/usr/bin/env bash
# From a fresh machine to decisions: environment, demo images, memory bank, ReMIND, new images, one table.
# Further arguments go to train.py, e.g.  bash scripts/demo.sh --model uninet --flavor paper
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
prepare requirements.txt

python -m scripts.demo "$@"
