#!/usr/bin/env bash
# Train and test on MVTec AD 2:  bash scripts/datasets/mvtec_ad2.sh DIR [--category can] [further flags of train.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
