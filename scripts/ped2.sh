#!/usr/bin/env bash
# Train and test on UCSD Ped2:  bash scripts/ped2.sh DIR [flags of train.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/dataset.sh" ped2 "$@"
