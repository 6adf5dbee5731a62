#!/usr/bin/env bash
# Train and test on Kvasir-SEG:  bash scripts/datasets/kvasir.sh DIR [flags of train.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
