#!/usr/bin/env bash
# Train and test on APTOS as scripts/prepare/aptos.py writes it:  bash scripts/datasets/aptos.sh DIR [flags of train.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
