#!/usr/bin/env bash
# Train and test on UCSD Ped2:  bash scripts/datasets/ped2.sh DIR [flags of train.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
