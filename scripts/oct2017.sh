#!/usr/bin/env bash
# Train and test on OCT2017:  bash scripts/oct2017.sh DIR [flags of train.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/dataset.sh" oct2017 "$@"
