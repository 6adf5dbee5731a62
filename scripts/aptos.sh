#!/usr/bin/env bash
# Train and test on APTOS as scripts/prepare_aptos.py writes it:  bash scripts/aptos.sh DIR [flags of train.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/dataset.sh" aptos "$@"
