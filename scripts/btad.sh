#!/usr/bin/env bash
# Train and test on BTAD:  bash scripts/btad.sh DIR [--category 01] [further flags of train.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/dataset.sh" btad "$@"
