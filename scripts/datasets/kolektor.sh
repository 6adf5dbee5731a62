#!/usr/bin/env bash
# Train and test on KolektorSDD:  bash scripts/datasets/kolektor.sh DIR [flags of train.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
