#!/usr/bin/env bash
# Train and test on CVC-ColonDB:  bash scripts/datasets/colondb.sh DIR [flags of train.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
