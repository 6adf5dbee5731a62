#!/usr/bin/env bash
# The table of accuracy, as one command that goes on where it stopped:
#   bash scripts/accuracy.sh --data mvtec=DIR kolektor=DIR ... [--dry-run | --table] [flags of scripts/accuracy.py]
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
prepare requirements.txt
python scripts/accuracy.py "$@"
