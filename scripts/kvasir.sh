#!/usr/bin/env bash
# Train and test on Kvasir-SEG:  bash scripts/kvasir.sh DIR [flags of train.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/dataset.sh" kvasir "$@"
