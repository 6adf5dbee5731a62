#!/usr/bin/env bash
# Train and test on BTAD:  bash scripts/datasets/btad.sh DIR [--category 01] [further flags of train.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
