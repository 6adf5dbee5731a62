#!/usr/bin/env bash
# Train and test on OCT2017:  bash scripts/datasets/oct2017.sh DIR [flags of train.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
