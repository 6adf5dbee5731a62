#!/usr/bin/env bash
# Train and test on VisA (release or prepared):  bash scripts/visa.sh DIR [--category candle] [flags of train.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/dataset.sh" visa "$@"
