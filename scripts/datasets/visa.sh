#!/usr/bin/env bash
# Train and test on VisA (release or prepared):  bash scripts/datasets/visa.sh DIR [--category candle] [flags of train.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
