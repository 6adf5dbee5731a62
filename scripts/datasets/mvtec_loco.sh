#!/usr/bin/env bash
# Train and test on MVTec LOCO AD:  bash scripts/datasets/mvtec_loco.sh DIR [--category pushpins] [further flags of train.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
