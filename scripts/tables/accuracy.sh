#!/usr/bin/env bash
# The table of accuracy, as one command that goes on where it stopped:
#   bash scripts/tables/accuracy.sh --data mvtec=DIR kolektor=DIR ... [--dry-run | --table] [flags]
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
prepare requirements.txt
python -m scripts.tables.accuracy "$@"
